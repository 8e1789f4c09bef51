// SPDX-License-Identifier: GPL-2.0
/*
 * dontunmap-merges-with-source: the copy of untouched memory that MREMAP_DONTUNMAP makes right beside it becomes one
 * mapping with its source.
 *
 *     page                            1   2   3   4       l: untouched and locked, -: empty and not locked
 *     locked with MLOCK_ONFAULT     | l | l | . | . |
 *     moved with MREMAP_DONTUNMAP   | - | - | l | l |     two mappings
 *
 * Expected: the copy is locked, and the source is not. On a kernel with the bug the two are one mapping, which is not
 * locked. The program does the same with a gap between source and copy, which any kernel has to get right.
 *
 *     gcc -O2 -Wall -o dontunmap-merges-with-source dontunmap-merges-with-source.c && ./dontunmap-merges-with-source
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

/* Whether /proc/self/smaps shows a flag, such as "ui", of the mapping that begins at an address. */
static int has_flag(const void *start, const char *flag)
{
	char line[512], begins[32], wanted[8];
	int here = 0, found = 0;
	FILE *smaps = fopen("/proc/self/smaps", "r");

	if (!smaps)
		cannot("needs /proc/PID/smaps (CONFIG_PROC_PAGE_MONITOR)");
	snprintf(begins, sizeof(begins), "%lx-", (unsigned long)start);
	snprintf(wanted, sizeof(wanted), " %s ", flag);
	while (fgets(line, sizeof(line), smaps)) {
		if (!strncmp(line, begins, strlen(begins)))
			here = 1;
		if (here && !strncmp(line, "VmFlags:", 8)) {
			found = strstr(line, wanted) != NULL;
			break;
		}
	}
	fclose(smaps);
	return found;
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

static void move_and_leave(unsigned char *from, int pages, unsigned char *to)
{
	int flags = MREMAP_MAYMOVE | MREMAP_FIXED | 4 /* MREMAP_DONTUNMAP */;
	size_t length = pages * page_size;

	if (syscall(SYS_mremap, from, length, length, flags, to) != (long)to)
		cannot("needs MREMAP_DONTUNMAP (Linux 5.7)");
}

/* Lock two untouched pages, move them, and look at both places. Returns whether they are as they should be. */
static int beside(int to, const char *where)
{
	unsigned char *area = reserve(8), *source = area + page_size, *copy = area + to * page_size;
	int copy_is_locked, source_is_locked;
	long count;

	map(source, 2);
	if (syscall(SYS_mlock2, source, 2 * page_size, 1 /* MLOCK_ONFAULT */))
		cannot("needs mlock2() (Linux 4.4)");
	if (!has_flag(source, "lo"))
		cannot("smaps does not show that the memory is locked");
	move_and_leave(source, 2, copy);
	count = mappings(area, 8);
	if (count != 1 && count != 2)
		cannot("source and copy are neither one mapping nor two");
	source_is_locked = has_flag(source, "lo");
	copy_is_locked = has_flag(count == 1 ? source : copy, "lo");
	munmap(area, 8 * page_size);

	printf("Two untouched pages were locked, and moved with MREMAP_DONTUNMAP %s.\n", where);
	printf("Source and copy are %s.\n", count == 1 ? "one mapping" : "two mappings");
	printf("The source is %s, and the copy is %s.\n", source_is_locked ? "locked" : "not locked",
	       copy_is_locked ? "locked" : "not locked");
	return count == 2 && copy_is_locked && !source_is_locked;
}

int main(void)
{
	page_size = sysconf(_SC_PAGESIZE);
	if (geteuid())
		cannot("needs root, which may lock memory");
	if (!beside(5, "to behind a gap"))
		cannot("the copy is wrong also with a gap between it and its source");
	return conclude(!beside(3, "to right behind themselves"));
}
