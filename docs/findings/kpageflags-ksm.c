// SPDX-License-Identifier: GPL-2.0
/*
 * kpageflags-ksm: /proc/kpageflags reports every anonymous page as a KSM page.
 *
 * The program writes to a page, which KSM cannot merge because nobody asked for that, and reads its flags.
 *
 * Expected: KPF_ANON is set, and KPF_KSM is not. On a kernel with the bug both are set.
 *
 *     gcc -O2 -Wall -o kpageflags-ksm kpageflags-ksm.c && ./kpageflags-ksm
 *
 * It needs root.
 * Exit status: 0 the kernel behaves, 1 the kernel has the bug, 77 it cannot tell here.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
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

int main(void)
{
	unsigned char *page;
	uint64_t flags;
	int anon, ksm;

	page_size = sysconf(_SC_PAGESIZE);
	page = reserve(1);
	map(page, 1);
	*page = 1;
	flags = kpageflags(frame(getpid(), page));
	anon = flags >> 12 & 1; /* KPF_ANON */
	ksm = flags >> 21 & 1; /* KPF_KSM */
	printf("The flags of a page that was never merged are %#llx.\n", (unsigned long long)flags);
	if (!anon)
		cannot("the page is not shown as anonymous");
	printf("KPF_KSM is %s.\n", ksm ? "set" : "not set");
	return conclude(ksm);
}
