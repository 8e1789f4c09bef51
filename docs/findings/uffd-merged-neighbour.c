// SPDX-License-Identifier: GPL-2.0
/*
 * uffd-merged-neighbour: memory that leaves its userfaultfd by moving takes its new neighbour with it.
 *
 *     page                  0  1  2  3  4  5       n, s: untouched, registered with one userfaultfd; x: not registered
 *     registered          | n  n |     | s  s |
 *     moved               | n  n  x  x |
 *
 * Expected: pages 0 and 1 are still registered. On a kernel with the bug they are not: their faults bring zeros, and
 * the program that handles them never learns of it.
 *
 *     gcc -O2 -Wall -o uffd-merged-neighbour uffd-merged-neighbour.c && ./uffd-merged-neighbour
 *
 * It needs root, because an ordinary user may not use userfaultfd everywhere.
 * Exit status: 0 the kernel behaves, 1 the kernel has the bug, 77 it cannot tell here.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/userfaultfd.h>
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

/* Whether faults at an address go to a userfaultfd: the flag "um" in smaps. */
static int registered(const unsigned char *at)
{
	unsigned long first, last, address = (unsigned long)at;
	FILE *file = fopen("/proc/self/smaps", "re");
	int here = 0, found = 0;
	char line[512];

	if (!file)
		cannot("needs /proc/PID/smaps");
	while (fgets(line, sizeof(line), file)) {
		if (sscanf(line, "%lx-%lx ", &first, &last) == 2)
			here = first <= address && address < last;
		else if (here && !strncmp(line, "VmFlags:", 8))
			found = !!strstr(line, " um");
	}
	fclose(file);
	return found;
}

static void map(unsigned char *at, int pages)
{
	int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED;

	if (mmap(at, pages * page_size, PROT_READ | PROT_WRITE, flags, -1, 0) == MAP_FAILED)
		cannot("no memory");
}

static int userfaultfd(void)
{
	struct uffdio_api api = { .api = UFFD_API };
	int fd = syscall(SYS_userfaultfd, O_CLOEXEC);

	if (fd < 0 || ioctl(fd, UFFDIO_API, &api))
		cannot("needs CONFIG_USERFAULTFD=y");
	return fd;
}

static void enlist(int fd, unsigned char *at, int pages)
{
	struct uffdio_register request = {
		.range = { .start = (unsigned long)at, .len = pages * page_size },
		.mode = UFFDIO_REGISTER_MODE_MISSING,
	};

	if (ioctl(fd, UFFDIO_REGISTER, &request))
		cannot("memory cannot be registered");
}

int main(void)
{
	unsigned char *area, *neighbour, *source, *to;
	int fd, before, after;
	size_t length;

	page_size = sysconf(_SC_PAGESIZE);
	if (geteuid())
		cannot("needs root, to use userfaultfd");
	length = 2 * page_size;
	area = mmap(NULL, 8 * page_size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (area == MAP_FAILED)
		cannot("no address space");
	neighbour = area;
	source = area + 4 * page_size;
	map(neighbour, 2);
	map(source, 2);
	to = area + 2 * page_size;
	fd = userfaultfd();
	enlist(fd, neighbour, 2);
	enlist(fd, source, 2);
	before = registered(neighbour);
	if (mremap(source, length, length, MREMAP_MAYMOVE | MREMAP_FIXED, to) != to)
		cannot("mremap() fails");
	after = registered(neighbour);

	printf("Memory left its userfaultfd by moving beside other memory of the same userfaultfd.\n");
	printf("The other memory was registered: %s.\n", before ? "yes" : "no");
	printf("The other memory is registered: %s.\n", after ? "yes" : "no");
	if (!before)
		cannot("smaps does not show that memory is registered");
	return conclude(!after);
}
