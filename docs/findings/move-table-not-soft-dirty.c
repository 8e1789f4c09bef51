// SPDX-License-Identifier: GPL-2.0
/*
 * move-table-not-soft-dirty: memory that moves with its page table is not marked as changed.
 *
 *     page table        0             1             2             3       w: written, c: marks cleared
 *     written         |wwwwwwwwwwwww|             |             |
 *     cleared         |ccccccccccccc|             |             |
 *     moved           |             |             |ccccccccccccc|
 *
 * Expected: pagemap marks each page as soft-dirty after a move, as it does if the memory does not fill a page table. On
 * a kernel with the bug it marks none.
 *
 *     gcc -O2 -Wall -o move-table-not-soft-dirty move-table-not-soft-dirty.c && ./move-table-not-soft-dirty
 *
 * It needs root, as the programs beside it do, although any process can do the same.
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

/* How many pages have the soft-dirty mark. */
static long marked(const unsigned char *at, long pages)
{
	int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	long count = 0, page;
	uint64_t entry;

	for (page = 0; page < pages; page++) {
		off_t offset = ((uintptr_t)at / page_size + page) * sizeof(entry);

		if (fd < 0 || pread(fd, &entry, sizeof(entry), offset) != sizeof(entry))
			cannot("needs /proc/PID/pagemap");
		count += entry >> 55 & 1;
	}
	close(fd);
	return count;
}

static void clear_marks(void)
{
	int fd = open("/proc/self/clear_refs", O_WRONLY | O_CLOEXEC);

	if (fd < 0 || write(fd, "4", 1) != 1)
		cannot("needs CONFIG_MEM_SOFT_DIRTY=y");
	close(fd);
}

/* How many of some small pages are marked after a move between places with the same offset in a page table. */
static long marked_after_move(long first, long pages)
{
	size_t table = page_size / 8 * page_size, length = pages * page_size;
	unsigned char *area, *from, *to;
	long page;

	area = mmap(NULL, 5 * table, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (area == MAP_FAILED)
		cannot("no address space");
	from = area + table - (uintptr_t)area % table + first * page_size;
	to = from + 2 * table;
	if (mmap(from, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != from)
		cannot("no memory");
	madvise(from, length, MADV_NOHUGEPAGE);
	for (page = 0; page < pages; page++)
		from[page * page_size] = 1;
	if (!marked(from, pages))
		cannot("needs CONFIG_MEM_SOFT_DIRTY=y");
	clear_marks();
	if (marked(from, pages))
		cannot("the marks cannot be cleared");
	/* A page table moves only to a place that has none. */
	if (munmap(to, length) || mremap(from, length, length, MREMAP_MAYMOVE | MREMAP_FIXED, to) != to)
		cannot("mremap() fails");
	return marked(to, pages);
}

int main(void)
{
	long few = 8, all, control, found;

	page_size = sysconf(_SC_PAGESIZE);
	if (geteuid())
		cannot("needs root, as the other programs do");
	all = page_size / 8;
	control = marked_after_move(1, few);
	found = marked_after_move(0, all);

	printf("Memory was written, its soft-dirty marks were cleared, and it moved.\n");
	printf("Pages marked of %ld, which do not fill a page table: %ld.\n", few, control);
	printf("Pages marked of %ld, which fill a page table: %ld.\n", all, found);
	if (control != few)
		cannot("a move marks no page here");
	return conclude(found != all);
}
