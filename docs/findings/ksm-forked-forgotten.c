// SPDX-License-Identifier: GPL-2.0
/*
 * ksm-forked-forgotten: an mremap() in a parent makes the reverse map lose the page that its child inherited.
 *
 *     page                      0   1   2   3   4      A, B: KSM pages; other letters: pages of their own
 *     parent, merged          | A | A | B | B | . |
 *     child, forked           | A | A | B | B | . |    known to KSM by the parent's rmap items only
 *     parent, 3 moves to 4    | A | A | B | . | c |    un-merged, and filled anew
 *     parent, ksmd scans it   | A | A | B | . | c |    drops the rmap item for page 3
 *     child, not yet scanned  | A | A | B | B | . |    nothing leads to its page 3 any more
 *
 * The child has some thousand mergeable pages more below these. So ksmd takes a while to come to its page 3, and it is
 * stopped in the meantime.
 *
 * Expected: the kernel finds all mappings of A, and all mappings of B, when it migrates these pages. On a kernel with
 * the bug it does not find the child's page 3, and B cannot be migrated.
 *
 *     gcc -O2 -Wall -o ksm-forked-forgotten ksm-forked-forgotten.c && ./ksm-forked-forgotten
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

enum { MORE = 4096 };

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

static void move(unsigned char *from, int pages, unsigned char *to)
{
	size_t length = pages * page_size;

	if (mremap(from, length, length, MREMAP_MAYMOVE | MREMAP_FIXED, to) != to)
		cannot("mremap() fails");
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

/* How many pages KSM counts as merged for a process. */
static long merging(pid_t pid)
{
	char path[64], text[32];

	snprintf(path, sizeof(path), "/proc/%d/ksm_merging_pages", pid);
	if (!get(path, text, sizeof(text)))
		cannot("needs /proc/PID/ksm_merging_pages (Linux 5.19)");
	return atol(text);
}

/* How many pages ksmd keeps track of for this process; 0 before Linux 6.1. */
static long items(void)
{
	char text[64];
	long value = 0;

	if (get("/proc/self/ksm_stat", text, sizeof(text)))
		sscanf(text, "ksm_rmap_items %ld", &value);
	return value;
}

/* Give the child more mergeable memory, say so, and wait for the end. */
static void child(unsigned char *more, int ready)
{
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	map(more, MORE);
	madvise(more, MORE * page_size, MADV_MERGEABLE);
	for (int n = 0; n < MORE; n++)
		fill(more + n * page_size, 1000 + n);
	if (write(ready, "", 1) == 1)
		pause();
	_exit(CANNOT_TELL);
}

/*
 * Let ksmd scan in small steps, until it has seen that the page has moved away: it has dropped the rmap item of the old
 * place, or keeps it, and has one more for the new place.
 */
static void scan_parent(void)
{
	long before = items();

	put(KSM "pages_to_scan", "64");
	put(KSM "sleep_millisecs", "20");
	put(KSM "run", "1");
	for (int tries = 0; merging(getpid()) > 3 && items() <= before; tries++) {
		if (tries == 300000)
			cannot("ksmd does not come to this process in five minutes");
		usleep(1000);
	}
	put(KSM "run", "0");
}

int main(void)
{
	unsigned char *area, *more, *pages;
	int ready[2], found, unseen;
	uint64_t ksm_page;
	pid_t pid;
	char byte;

	page_size = sysconf(_SC_PAGESIZE);
	ksm_begin();
	area = reserve(MORE + 6);
	more = area;
	pages = area + (MORE + 1) * page_size;

	map(pages, 4);
	madvise(pages, 4 * page_size, MADV_MERGEABLE);
	for (int n = 0; n < 4; n++)
		fill(pages + n * page_size, n / 2);
	scan();
	ksm_page = frame(getpid(), pages + 2 * page_size);
	if (frame(getpid(), pages) != frame(getpid(), pages + page_size) ||
	    ksm_page != frame(getpid(), pages + 3 * page_size) || merging(getpid()) != 4)
		cannot("KSM does not merge equal pages");

	if (pipe(ready) || (pid = fork()) < 0)
		cannot("no process");
	if (pid == 0)
		child(more, ready[1]);
	close(ready[1]);
	if (read(ready[0], &byte, 1) != 1)
		cannot("the child ended");
	unseen = merging(pid);
	move(pages + 3 * page_size, 1, pages + 4 * page_size);
	fill(pages + 4 * page_size, 2);
	scan_parent();
	if (merging(pid) != unseen)
		cannot("ksmd has come by the child already; try again");

	printf("A process with KSM pages forked, and moved one away. ksmd has scanned it, and not yet its child.\n");
	if (frame(pid, pages + 3 * page_size) != ksm_page)
		cannot("the child does not have the KSM page");
	if (!follows(pages) || frame(pid, pages) != frame(getpid(), pages))
		cannot("the KSM page that did not move cannot be migrated either");
	printf("The KSM page that both still have everywhere can be migrated.\n");
	found = follows(pages + 2 * page_size);
	printf("The KSM page that the parent moved away from, and the child has twice, %s be migrated.\n",
	       found ? "can" : "cannot");
	kill(pid, SIGKILL);
	waitpid(pid, NULL, 0);
	return conclude(!found);
}
