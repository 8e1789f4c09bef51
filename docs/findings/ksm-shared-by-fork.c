// SPDX-License-Identifier: GPL-2.0
/*
 * ksm-shared-by-fork: KSM in a child makes the reverse map lose the parent's mapping of a page that both share.
 *
 *     page                       0   1   2      A: a KSM page; other letters: ordinary pages
 *     parent                   | a | a | b |
 *     child, forked            | a | a | b |    the same pages; 0 and 1 are mergeable in the child only
 *     parent, after a merge    | a | A | b |    KSM has made a KSM page of page 1 where it was
 *     child, after a merge     | A | A | b |
 *
 * Expected: the kernel finds all mappings of pages 0 and 1 when it migrates them. On a kernel with the bug it does not
 * find the parent's page 1, and the page cannot be migrated.
 *
 *     gcc -O2 -Wall -o ksm-shared-by-fork ksm-shared-by-fork.c && ./ksm-shared-by-fork
 *
 * It needs root, KSM, and two NUMA nodes or memory failure. KSM's settings are as before when it ends.
 * Exit status: 0 the kernel behaves, 1 the kernel has the bug, 77 it cannot tell here.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <sys/syscall.h>
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

/* Fill a page with bytes that are random, so that KSM merges it with our pages of the same number and no others. */
static void fill(unsigned char *page, int number)
{
	static uint64_t salt;

	if (!salt && getrandom(&salt, sizeof(salt), 0) != sizeof(salt))
		cannot("needs getrandom()");
	for (size_t n = 0; n < page_size / sizeof(uint64_t); n++)
		((uint64_t *)page)[n] = salt + number * 0x9e3779b97f4a7c15 + n;
}

/* What /proc/PID/pagemap says of a page. */
static uint64_t pagemap(pid_t pid, const unsigned char *at)
{
	off_t offset = (uintptr_t)at / page_size * sizeof(uint64_t);
	uint64_t entry;
	char path[64];
	int fd;

	snprintf(path, sizeof(path), "/proc/%d/pagemap", pid);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0 || pread(fd, &entry, sizeof(entry), offset) != sizeof(entry))
		cannot("needs root, and CONFIG_PROC_PAGE_MONITOR");
	close(fd);
	return entry;
}

/* The number of the page frame at an address, 0 if no page is present. */
static uint64_t frame(pid_t pid, const unsigned char *at)
{
	uint64_t entry = pagemap(pid, at), number = entry & ((1ULL << 55) - 1);

	if (!(entry >> 63))
		return 0;
	if (!number)
		cannot("needs root, to see the numbers of page frames");
	return number;
}

/*
 * Have the kernel move a page of this process to another frame, for which it must find each of its mappings. It goes to
 * another NUMA node. If there is none, its frame is taken out of use, which lasts until the next boot.
 */
static int follows(unsigned char *at)
{
	uint64_t before = frame(getpid(), at);

	for (int tries = 0; tries < 5; tries++) {
		void *where = at;
		int status = -1, node;

		syscall(SYS_move_pages, 0, 1L, &where, NULL, &status, 0);
		node = status == 0;
		if (syscall(SYS_move_pages, 0, 1L, &where, &node, &status, 4 /* MPOL_MF_MOVE_ALL */) < 0 &&
		    (errno == ENODEV || errno == EACCES || errno == ENOSYS) &&
		    madvise(at, page_size, 101 /* MADV_SOFT_OFFLINE */) < 0 && errno == EINVAL)
			cannot("needs two NUMA nodes (numa=fake=2), or CONFIG_MEMORY_FAILURE");
		if (frame(getpid(), at) != before)
			return 1;
		usleep(1000 << tries);
	}
	return 0;
}

/* Let KSM merge some pages, say so, and wait for the end. */
static void child(unsigned char *pages, int count, int ready)
{
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (!madvise(pages, count * page_size, MADV_MERGEABLE) && write(ready, "", 1) == 1)
		pause();
	_exit(CANNOT_TELL);
}

int main(void)
{
	int flags = MAP_PRIVATE | MAP_ANONYMOUS, ready[2], merged, found = 1;
	unsigned char *pages;
	pid_t pid;
	char byte;

	page_size = sysconf(_SC_PAGESIZE);
	ksm_begin();
	pages = mmap(NULL, 3 * page_size, PROT_READ | PROT_WRITE, flags, -1, 0);
	if (pages == MAP_FAILED)
		cannot("no memory");
	for (int n = 0; n < 3; n++)
		fill(pages + n * page_size, n / 2);

	if (pipe(ready) || (pid = fork()) < 0)
		cannot("no process");
	if (pid == 0)
		child(pages, 2, ready[1]);
	close(ready[1]);
	if (read(ready[0], &byte, 1) != 1)
		cannot("the child ended");
	scan();

	merged = frame(pid, pages) == frame(pid, pages + page_size);
	printf("A process forked, and its child let KSM merge two equal pages that both share. KSM %s them.\n",
	       merged ? "merged" : "did not merge");
	if (!follows(pages + 2 * page_size))
		cannot("a page that both share and that is not mergeable cannot be migrated either");
	for (int n = 0; n < 2; n++) {
		int moved = follows(pages + n * page_size);

		printf("Page %d of the parent %s be migrated.\n", n, moved ? "can" : "cannot");
		found = found && moved;
	}
	kill(pid, SIGKILL);
	waitpid(pid, NULL, 0);
	return conclude(!found);
}
