// SPDX-License-Identifier: GPL-2.0
/*
 * ksm-fork-counters: a forked child starts with its parent's KSM counters.
 *
 * The program lets KSM merge four pages, stops ksmd, forks, and reads the counters of the child.
 *
 * Expected: they are 0, because ksmd has never seen the child. On a kernel with the bug they are those of the parent.
 *
 *     gcc -O2 -Wall -o ksm-fork-counters ksm-fork-counters.c && ./ksm-fork-counters
 *
 * It needs root and KSM. KSM's settings are as before when it ends.
 * Exit status: 0 the kernel behaves, 1 the kernel has the bug, 77 it cannot tell here.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <sys/wait.h>
#include <unistd.h>

enum { BEHAVES = 0, BUG = 1, CANNOT_TELL = 77 };

static long page_size;

static void cannot(const char *what)
{
	printf("Cannot tell: %s.\n", what);
	exit(CANNOT_TELL);
}

static int conclude(int bug)
{
	printf("%s\n", bug ? "The kernel is wrong." : "The kernel behaves.");
	return bug ? BUG : BEHAVES;
}

static int put(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC);
	int done = fd >= 0 && write(fd, text, strlen(text)) == (ssize_t)strlen(text);

	if (fd >= 0)
		close(fd);
	return done;
}

/* Read the first line of a file. */
static int get(const char *path, char *text, size_t size)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t length = fd < 0 ? -1 : read(fd, text, size - 1);

	if (fd >= 0)
		close(fd);
	text[length < 0 ? 0 : length] = '\0';
	text[strcspn(text, "\n")] = '\0';
	return length >= 0;
}

#define KSM "/sys/kernel/mm/ksm/"

/* Settings with which ksmd scans everything at once, and what was there before. */
static struct {
	const char *path, *value;
	char before[32];
} knobs[] = {
	{ KSM "advisor_mode", "none", "" }, /* since 6.8; a change resets pages_to_scan */
	{ KSM "smart_scan", "0", "" }, /* since 6.7 */
	{ KSM "pages_to_scan", "100000", "" },
	{ KSM "sleep_millisecs", "0", "" },
	{ KSM "run", "0", "" },
};

#define KNOBS (sizeof(knobs) / sizeof(*knobs))

static void ksm_end(void)
{
	put(KSM "run", "0");
	for (size_t n = 0; n < KNOBS; n++)
		if (knobs[n].before[0])
			put(knobs[n].path, knobs[n].before);
}

static void interrupted(int number)
{
	(void)number;
	ksm_end();
	_exit(CANNOT_TELL);
}

static void ksm_begin(void)
{
	for (size_t n = 0; n < KNOBS; n++) {
		char text[64], *chosen;

		if (!get(knobs[n].path, text, sizeof(text)))
			continue;
		/* A choice looks like "[none] scan-time". */
		chosen = strchr(text, '[') ? strchr(text, '[') + 1 : text;
		chosen[strcspn(chosen, "]")] = '\0';
		snprintf(knobs[n].before, sizeof(knobs[n].before), "%.31s", chosen);
	}
	if (!put(KSM "run", "0"))
		cannot("needs root, and CONFIG_KSM");
	atexit(ksm_end);
	signal(SIGHUP, interrupted);
	signal(SIGINT, interrupted);
	signal(SIGTERM, interrupted);
	for (size_t n = 0; n < KNOBS; n++)
		put(knobs[n].path, knobs[n].value);
}

static long full_scans(void)
{
	char text[32];

	return get(KSM "full_scans", text, sizeof(text)) ? atol(text) : 0;
}

/* Merging takes two full scans. The scan under way may have passed our pages, so that three are enough. */
static void scan(void)
{
	long goal = full_scans() + 3;

	put(KSM "run", "1");
	for (int tries = 0; full_scans() < goal; tries++) {
		if (tries == 120000)
			cannot("ksmd does not scan all memory three times in two minutes");
		usleep(1000);
	}
	put(KSM "run", "0");
}

static void map(unsigned char *at, int pages)
{
	int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED;

	if (mmap(at, pages * page_size, PROT_READ | PROT_WRITE, flags, -1, 0) == MAP_FAILED)
		cannot("no memory");
}

/* Address space with nothing in it. */
static unsigned char *reserve(int pages)
{
	void *got = mmap(NULL, pages * page_size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (got == MAP_FAILED)
		cannot("no address space");
	return got;
}

/* Fill a page with bytes that are random, so that KSM merges it with our pages of the same number and no others. */
static void fill(unsigned char *page, int number)
{
	static uint64_t salt;

	if (!salt && getrandom(&salt, sizeof(salt), 0) != sizeof(salt))
		cannot("needs getrandom()");
	for (size_t n = 0; n < page_size / sizeof(uint64_t); n++)
		((uint64_t *)page)[n] = salt + number * 0x9e3779b97f4a7c15 + n;
}

/* A counter of a process: how many pages are merged, or how many ksmd keeps track of. */
static long counter(pid_t pid, const char *file, const char *format)
{
	char path[64], text[256];
	long value = 0;

	snprintf(path, sizeof(path), "/proc/%d/%s", pid, file);
	if (!get(path, text, sizeof(text)) || sscanf(text, format, &value) != 1)
		cannot("needs /proc/PID/ksm_merging_pages and ksm_stat (Linux 6.1)");
	return value;
}

int main(void)
{
	long merged, items, child_merged, child_items;
	unsigned char *pages;
	pid_t pid;

	page_size = sysconf(_SC_PAGESIZE);
	ksm_begin();
	pages = reserve(4);
	map(pages, 4);
	madvise(pages, 4 * page_size, MADV_MERGEABLE);
	for (int n = 0; n < 4; n++)
		fill(pages + n * page_size, 0);
	scan();
	merged = counter(getpid(), "ksm_merging_pages", "%ld");
	items = counter(getpid(), "ksm_stat", "ksm_rmap_items %ld");
	if (merged != 4)
		cannot("KSM does not merge equal pages");

	pid = fork();
	if (pid < 0)
		cannot("no process");
	if (pid == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		for (;;)
			pause();
	}
	child_merged = counter(pid, "ksm_merging_pages", "%ld");
	child_items = counter(pid, "ksm_stat", "ksm_rmap_items %ld");
	kill(pid, SIGKILL);
	waitpid(pid, NULL, 0);

	printf("A process has %ld merged pages, and ksmd keeps track of %ld pages of it.\n", merged, items);
	printf("Its new child, which ksmd has never seen, has %ld and %ld.\n", child_merged, child_items);
	return conclude(child_merged != 0 || child_items != 0);
}
