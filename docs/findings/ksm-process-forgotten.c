// SPDX-License-Identifier: GPL-2.0
/*
 * ksm-process-forgotten: ksmd turns off PR_SET_MEMORY_MERGE of a process that has no mergeable memory at the moment.
 *
 * A child offers all of its memory to KSM with PR_SET_MEMORY_MERGE, and makes each mapping that it has unmergeable again.
 * ksmd scans. Then the child asks whether its new memory will be mergeable.
 *
 * Expected: it will, because nobody has turned that off. On a kernel with the bug ksmd has.
 *
 *     gcc -O2 -Wall -o ksm-process-forgotten ksm-process-forgotten.c && ./ksm-process-forgotten
 *
 * It needs root, KSM and Linux 6.4. KSM's settings are as before when it ends.
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

/* Make every mapping of this process unmergeable. It allocates nothing, which would make new ones. */
static void nothing_mergeable(void)
{
	static char text[65536];
	int fd = open("/proc/self/maps", O_RDONLY | O_CLOEXEC);
	size_t length = 0;
	ssize_t more;

	if (fd < 0)
		_exit(CANNOT_TELL);
	while ((more = read(fd, text + length, sizeof(text) - 1 - length)) > 0)
		length += more;
	close(fd);
	for (char *line = text; line && *line; line = strchr(line, '\n') ? strchr(line, '\n') + 1 : NULL) {
		char *end;
		uintptr_t from = strtoul(line, &end, 16), to = strtoul(end + 1, NULL, 16);

		madvise((void *)from, to - from, MADV_UNMERGEABLE);
	}
}

int main(void)
{
	int begin[2], scanned[2], status, merges;
	unsigned char *page;
	char byte = 0;
	pid_t pid;

	page_size = sysconf(_SC_PAGESIZE);
	ksm_begin();
	/* ksmd sleeps while no memory at all is mergeable. */
	page = reserve(1);
	map(page, 1);
	madvise(page, page_size, MADV_MERGEABLE);
	*page = 1;
	if (pipe(begin) || pipe(scanned))
		cannot("no pipe");
	pid = fork();
	if (pid < 0)
		cannot("no process");
	if (pid == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		if (prctl(67 /* PR_SET_MEMORY_MERGE */, 1L, 0L, 0L, 0L))
			_exit(CANNOT_TELL);
		nothing_mergeable();
		if (write(begin[1], &byte, 1) != 1 || read(scanned[0], &byte, 1) != 1)
			_exit(CANNOT_TELL);
		merges = prctl(68 /* PR_GET_MEMORY_MERGE */, 0L, 0L, 0L, 0L);
		_exit(merges == 1 ? BEHAVES : merges == 0 ? BUG : CANNOT_TELL);
	}
	close(begin[1]);
	if (read(begin[0], &byte, 1) == 1) {
		scan();
		if (write(scanned[1], &byte, 1) != 1)
			cannot("the child has ended");
	}
	if (waitpid(pid, &status, 0) != pid || !WIFEXITED(status) || WEXITSTATUS(status) == CANNOT_TELL)
		cannot("needs PR_SET_MEMORY_MERGE (Linux 6.4)");
	printf("A process has PR_SET_MEMORY_MERGE and nothing mergeable at the moment, and ksmd has scanned it.\n");
	printf("PR_GET_MEMORY_MERGE says %ld.\n", (long)(WEXITSTATUS(status) == BEHAVES));
	return conclude(WEXITSTATUS(status) == BUG);
}
