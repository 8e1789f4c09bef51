// SPDX-License-Identifier: GPL-2.0
/*
 * dontunmap-part-unlocks: MREMAP_DONTUNMAP of a part of locked memory unlocks all of it.
 *
 *     page                          0   1   2       L: locked, l: not locked any more, -: empty and not locked
 *     locked                      | L | L | . |
 *     moved, MREMAP_DONTUNMAP     | L | - | L |     on a kernel with the bug: | l | - | L |
 *     unmapped                    | . | . | . |
 *
 * Expected: page 0 does not move, and stays locked; VmLck in /proc/self/status is nothing in the end. On a kernel with
 * the bug page 0 is not locked any more, and counts as locked for as long as the process lives.
 *
 *     gcc -O2 -Wall -o dontunmap-part-unlocks dontunmap-part-unlocks.c && ./dontunmap-part-unlocks
 *
 * It needs root, to lock memory.
 * Exit status: 0 the kernel behaves, 1 the kernel has the bug, 77 it cannot tell here.
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
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

static void move_and_leave(unsigned char *from, int pages, unsigned char *to)
{
	int flags = MREMAP_MAYMOVE | MREMAP_FIXED | 4 /* MREMAP_DONTUNMAP */;
	size_t length = pages * page_size;

	if (syscall(SYS_mremap, from, length, length, flags, to) != (long)to)
		cannot("needs MREMAP_DONTUNMAP (Linux 5.7)");
}

/* A size in kB, by its name at the beginning of a line of a file in /proc. */
static long size_of(const char *path, const char *name)
{
	FILE *file = fopen(path, "re");
	char line[256];
	long size = -1;

	while (file && size < 0 && fgets(line, sizeof(line), file))
		if (!strncmp(line, name, strlen(name)))
			size = atol(line + strlen(name));
	if (file)
		fclose(file);
	if (size < 0)
		cannot("needs /proc/meminfo and /proc/PID/status");
	return size;
}

static long locked(void)
{
	return size_of("/proc/self/status", "VmLck:") * 1024 / page_size;
}

/* Whether the mapping at an address is locked: "lo" among its flags in /proc/self/smaps. */
static int is_locked(unsigned char *at)
{
	FILE *file = fopen("/proc/self/smaps", "re");
	unsigned long start, end;
	int here = 0, found = -1;
	char line[1024];

	while (file && found < 0 && fgets(line, sizeof(line), file)) {
		if (sscanf(line, "%lx-%lx ", &start, &end) == 2)
			here = start <= (unsigned long)at && (unsigned long)at < end;
		else if (here && !strncmp(line, "VmFlags:", 8))
			found = strstr(line, " lo") != NULL;
	}
	if (file)
		fclose(file);
	if (found < 0)
		cannot("needs VmFlags in /proc/PID/smaps");
	return found;
}

int main(void)
{
	unsigned char *area;
	int stays;
	long left;

	page_size = sysconf(_SC_PAGESIZE);
	if (geteuid())
		cannot("needs root, which may lock memory");
	if (locked() != 0)
		cannot("all memory is locked already");
	area = reserve(3);
	map(area, 2);
	if (mlock(area, 2 * page_size))
		cannot("mlock() fails");
	move_and_leave(area + page_size, 1, area + 2 * page_size);
	stays = is_locked(area);
	munmap(area, 3 * page_size);
	left = locked();

	printf("A process locked 2 pages, and moved the second with MREMAP_DONTUNMAP.\n");
	printf("The first one is %s.\n", stays ? "locked" : "not locked any more");
	printf("Everything was unmapped, and %ld pages count as locked.\n", left);
	return conclude(!stays || left != 0);
}
