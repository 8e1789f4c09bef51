// SPDX-License-Identifier: GPL-2.0
/*
 * ksm-swapcache-scanned: a swapped-out KSM page that ksmd scans meanwhile is lost when it is read back.
 *
 *     page                            0   1   2   3      A, B: KSM pages; s: a swap entry
 *     merged                        | A | A | B | B |
 *     one mapping each              | A | . | B | . |
 *     page 2 is swapped out         | A | . | s | . |    B stays in the swap cache
 *     ksmd scans                    | A | . | s | . |    and forgets page 2
 *     read                          | A | . | B | . |
 *
 * Expected: the kernel finds the mappings of page 0 and of page 2 when it migrates these pages. On a kernel with the
 * bug page 2 has the KSM page, and no migration finds it there until ksmd has scanned again.
 *
 *     gcc -O2 -Wall -o ksm-swapcache-scanned ksm-swapcache-scanned.c && ./ksm-swapcache-scanned
 *
 * It needs root, KSM, swap, and two NUMA nodes or memory failure. KSM's settings are as before when it ends.
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
#include <sys/random.h>
#include <sys/syscall.h>
#include <sys/uio.h>
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

/* What /proc/kpageflags says of a page frame. */
static uint64_t kpageflags(uint64_t number)
{
	uint64_t flags;
	int fd = open("/proc/kpageflags", O_RDONLY | O_CLOEXEC);

	if (fd < 0 || pread(fd, &flags, sizeof(flags), number * sizeof(flags)) != sizeof(flags))
		cannot("needs root, and /proc/kpageflags");
	close(fd);
	return flags;
}

static int is_swap_entry(const unsigned char *at)
{
	return (pagemap(getpid(), at) >> 62) == 1;
}

/*
 * Swap a page out, and keep it in the swap cache: a pipe holds a reference to it. Without that, it stays there only
 * until it is written, which takes long on a slow swap device.
 */
static void swap_out(unsigned char *at, int pipe_ends[2])
{
	struct iovec vector = { at, page_size };
	uint64_t number = frame(getpid(), at);

	if (pipe(pipe_ends) || vmsplice(pipe_ends[1], &vector, 1, 0) != page_size)
		cannot("vmsplice() fails");
	for (int tries = 0; tries < 20 && !is_swap_entry(at); tries++) {
		if (madvise(at, page_size, 21 /* MADV_PAGEOUT */))
			cannot("needs MADV_PAGEOUT (Linux 5.4)");
		usleep(1000);
	}
	if (!is_swap_entry(at))
		cannot("the page is not swapped out; needs free swap space");
	if (!(kpageflags(number) >> 13 & 1))
		cannot("the page has left the swap cache already");
}

static void look(const unsigned char *at)
{
	(void)*(const volatile unsigned char *)at;
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

int main(void)
{
	unsigned char *stays, *scanned, *area;
	uint64_t ksm_page;
	int ends[2], found;

	page_size = sysconf(_SC_PAGESIZE);
	ksm_begin();
	area = reserve(4);
	stays = area;
	scanned = area + 2 * page_size;

	map(area, 4);
	madvise(area, 4 * page_size, MADV_MERGEABLE);
	for (int n = 0; n < 4; n++)
		fill(area + n * page_size, n / 2);
	scan();
	ksm_page = frame(getpid(), scanned);
	if (frame(getpid(), stays) != frame(getpid(), stays + page_size) ||
	    ksm_page != frame(getpid(), scanned + page_size))
		cannot("KSM does not merge equal pages");
	/* MADV_PAGEOUT passes over pages that are mapped more than once. */
	munmap(stays + page_size, page_size);
	munmap(scanned + page_size, page_size);

	swap_out(scanned, ends);
	scan();
	look(scanned);
	close(ends[0]);
	close(ends[1]);

	printf("A KSM page was swapped out, ksmd scanned, and the page was read back from the swap cache.\n");
	if (!follows(stays))
		cannot("a KSM page that was not swapped out cannot be migrated either");
	printf("A KSM page that was not swapped out can be migrated.\n");
	printf("The page that was read back is %s.\n",
	       frame(getpid(), scanned) == ksm_page ? "the same KSM page" : "a copy");
	found = follows(scanned);
	printf("It %s be migrated.\n", found ? "can" : "cannot");
	return conclude(!found);
}
