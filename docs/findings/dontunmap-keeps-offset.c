// SPDX-License-Identifier: GPL-2.0
/*
 * dontunmap-keeps-offset: memory that was moved before and is emptied by MREMAP_DONTUNMAP keeps the page offset of its
 * first place.
 *
 *     page                                  1  2    8  9  10 11 12 13   20 21     -: emptied, n: new memory
 *     mapped, written                     | a  a | .  .  .  .  .  .  | .  .  |
 *     moved                               | .  . | .  .  a  a  .  .  | .  .  |
 *     moved on with MREMAP_DONTUNMAP      | .  . | .  .  -  -  .  .  | a  a  |
 *     new memory mapped on both sides     | .  . | n  n  -  -  n  n  | a  a  |
 *
 * Expected: pages 8 to 13 are one mapping, as they are without the first move. On a kernel with the bug they are three.
 * The memory is mapped with MAP_NORESERVE, because the kernels with dontunmap-committed merge no other.
 *
 *     gcc -O2 -Wall -o dontunmap-keeps-offset dontunmap-keeps-offset.c && ./dontunmap-keeps-offset
 *
 * It needs root, as the programs beside it do, although any process can do the same.
 * Exit status: 0 the kernel behaves, 1 the kernel has the bug, 77 it cannot tell here.
 */
#define _GNU_SOURCE
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

/* Map memory that does not count in Committed_AS. */
static void map_uncharged(unsigned char *at, int pages)
{
	int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE;

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

/* How many mappings an area has, of those that may be read. */
static long mappings(const unsigned char *area, int pages)
{
	unsigned long begin = (unsigned long)area, end = begin + pages * page_size, first, last;
	FILE *file = fopen("/proc/self/maps", "re");
	char line[512], read;
	long count = 0;

	if (!file)
		cannot("needs /proc/PID/maps");
	while (fgets(line, sizeof(line), file))
		if (sscanf(line, "%lx-%lx %c", &first, &last, &read) == 3 && first < end && last > begin && read == 'r')
			count++;
	fclose(file);
	return count;
}

static void move(unsigned char *from, int pages, unsigned char *to)
{
	size_t length = pages * page_size;

	if (mremap(from, length, length, MREMAP_MAYMOVE | MREMAP_FIXED, to) != to)
		cannot("mremap() fails");
}

static void move_and_leave(unsigned char *from, int pages, unsigned char *to)
{
	int flags = MREMAP_MAYMOVE | MREMAP_FIXED | 4 /* MREMAP_DONTUNMAP */;
	size_t length = pages * page_size;

	if (syscall(SYS_mremap, from, length, length, flags, to) != (long)to)
		cannot("needs MREMAP_DONTUNMAP (Linux 5.7)");
}

/* How many mappings there are where memory was emptied, and new memory was mapped on both sides of it. */
static long around(int was_moved)
{
	unsigned char *area = reserve(24), *source = area + 10 * page_size;
	unsigned char *first = was_moved ? area + page_size : source;
	long count;

	map_uncharged(first, 2);
	first[0] = first[page_size] = 1;
	if (was_moved)
		move(first, 2, source);
	move_and_leave(source, 2, area + 20 * page_size);
	map_uncharged(area + 8 * page_size, 2);
	map_uncharged(area + 12 * page_size, 2);
	count = mappings(area + 8 * page_size, 6);
	munmap(area, 24 * page_size);
	return count;
}

int main(void)
{
	long control, moved;

	page_size = sysconf(_SC_PAGESIZE);
	if (geteuid())
		cannot("needs root, as the other programs do");
	control = around(0);
	moved = around(1);

	printf("A mapping was emptied by MREMAP_DONTUNMAP, and new memory was mapped on both sides of it.\n");
	printf("Mappings there, if it was not moved before: %ld.\n", control);
	printf("Mappings there, if it was moved before: %ld.\n", moved);
	if (control != 1)
		cannot("new memory does not merge with emptied memory here");
	return conclude(moved != control);
}
