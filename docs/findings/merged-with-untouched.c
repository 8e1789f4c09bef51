// SPDX-License-Identifier: GPL-2.0
/*
 * merged-with-untouched: pages that mremap() moves next to memory that was never touched are lost to the reverse map
 * (CVE-2026-23077).
 *
 *     page                                0   1        4   5      -: nothing was written here yet
 *     mapped, written                   | . | . |    | a | b |
 *     moved with MREMAP_DONTUNMAP       | a | b |    | - | - |
 *     the first of them moved back      | . | . |    | a | - |    one VMA again
 *
 * Expected: the kernel finds the mapping of page 4 when it migrates that page. On a kernel with the bug no VMA is
 * linked to the anon_vma of page 4, and no migration finds it.
 *
 * The kernel may have freed that anon_vma. Do not run this on a machine that you need.
 *
 *     gcc -O2 -Wall -o merged-with-untouched merged-with-untouched.c && ./merged-with-untouched
 *
 * It needs root, and two NUMA nodes or memory failure.
 * Exit status: 0 the kernel behaves, 1 the kernel has the bug, 77 it cannot tell here.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
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

static void move_and_leave(unsigned char *from, int pages, unsigned char *to)
{
	int flags = MREMAP_MAYMOVE | MREMAP_FIXED | 4 /* MREMAP_DONTUNMAP */;
	size_t length = pages * page_size;

	if (syscall(SYS_mremap, from, length, length, flags, to) != (long)to)
		cannot("needs MREMAP_DONTUNMAP (Linux 5.7)");
}

int main(void)
{
	unsigned char *area, *home, *control;
	int found;

	page_size = sysconf(_SC_PAGESIZE);
	area = reserve(8);
	home = area + 4 * page_size;
	control = reserve(1);
	map(control, 1);
	*control = 1;

	map(home, 2);
	home[0] = home[page_size] = 1;
	move_and_leave(home, 2, area);
	/* Two pages become one, as mremap() shrinks the mapping before it moves it. */
	if (mremap(area, 2 * page_size, page_size, MREMAP_MAYMOVE | MREMAP_FIXED, home) != home)
		cannot("mremap() fails");

	printf("Two pages were moved away, and the first was moved back, next to memory that was never touched.\n");
	if (!follows(control))
		cannot("a page that did not move cannot be migrated either");
	printf("A page that did not move can be migrated.\n");
	found = follows(home);
	printf("The page that was moved back %s be migrated.\n", found ? "can" : "cannot");
	return conclude(!found);
}
