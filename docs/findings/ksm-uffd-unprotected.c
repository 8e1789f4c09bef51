// SPDX-License-Identifier: GPL-2.0
/*
 * ksm-uffd-unprotected: KSM takes the write protection of userfaultfd off a page that it replaces.
 *
 *     page                      0  1
 *     written with the same   | A  A |
 *     write-protected         | w  w |      by UFFDIO_WRITEPROTECT
 *     scanned by ksmd         | w  w |      expected
 *
 * Expected: both pages are still protected, whether merged or not. On a kernel with the bug one is not, which KSM has
 * replaced by the other: the next write to it is not reported.
 *
 *     gcc -O2 -Wall -o ksm-uffd-unprotected ksm-uffd-unprotected.c && ./ksm-uffd-unprotected
 *
 * It needs root, KSM and userfaultfd's write protection. KSM's settings are as before when it ends.
 * Exit status: 0 the kernel behaves, 1 the kernel has the bug, 77 it cannot tell here.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
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

/* How many of two pages userfaultfd write-protects: bit 57 of their entries in pagemap. */
static int protected(pid_t pid, const unsigned char *at)
{
	return (pagemap(pid, at) >> 57 & 1) + (pagemap(pid, at + page_size) >> 57 & 1);
}

static unsigned char *equal_pages(int byte)
{
	unsigned char *at = mmap(NULL, 2 * page_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (at == MAP_FAILED)
		cannot("no memory");
	memset(at, byte, 2 * page_size);
	if (madvise(at, 2 * page_size, MADV_MERGEABLE))
		cannot("needs CONFIG_KSM");
	return at;
}

int main(void)
{
	struct uffdio_api api = { .api = UFFD_API };
	struct uffdio_register request;
	struct uffdio_writeprotect protect;
	unsigned char *pages, *control;
	int fd, before, after;

	page_size = sysconf(_SC_PAGESIZE);
	if (geteuid())
		cannot("needs root, to control KSM");
	ksm_begin();
	fd = syscall(SYS_userfaultfd, O_CLOEXEC);
	if (fd < 0 || ioctl(fd, UFFDIO_API, &api))
		cannot("needs CONFIG_USERFAULTFD=y");
	pages = equal_pages(1);
	/* Something else between them, so that they are different mappings. */
	mmap(NULL, page_size, PROT_NONE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	control = equal_pages(2);
	request = (struct uffdio_register){
		.range = { .start = (uintptr_t)pages, .len = 2 * page_size },
		.mode = UFFDIO_REGISTER_MODE_WP,
	};
	protect = (struct uffdio_writeprotect){ .range = request.range, .mode = UFFDIO_WRITEPROTECT_MODE_WP };
	if (ioctl(fd, UFFDIO_REGISTER, &request) || ioctl(fd, UFFDIO_WRITEPROTECT, &protect))
		cannot("needs userfaultfd's write protection");
	before = protected(getpid(), pages);
	scan();
	after = protected(getpid(), pages);

	printf("Two equal pages were write-protected by a userfaultfd, and ksmd scanned.\n");
	printf("Protected before the scan: %ld of 2.\n", (long)before);
	printf("Protected after the scan: %ld of 2.\n", (long)after);
	if (before != 2)
		cannot("pagemap does not show the protection");
	if (frame(getpid(), control) != frame(getpid(), control + page_size))
		cannot("ksmd merges no other pages either");
	return conclude(after != 2);
}
