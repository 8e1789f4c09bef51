// SPDX-License-Identifier: GPL-2.0
/*
 * dontunmap-committed: memory that MREMAP_DONTUNMAP leaves stays in Committed_AS for ever.
 *
 *     MB                              0       64  65      129
 *     mapped                        | s s s s |                 64 MB, a promise of as much
 *     moved with MREMAP_DONTUNMAP   | - - - - |  | s s s s |    64 MB more: what was left may be written to again
 *     unmapped                      |         |  |         |    128 MB less
 *
 * The program does this 16 times, and looks how far Committed_AS rises. That is 1 GB on a kernel with the bug. Other
 * processes change it too, by far less.
 *
 * Expected: Committed_AS is about as before. On a kernel with the bug it has risen by 64 MB for each call of mremap(),
 * and falls by nothing when the process ends. It is right again after the next boot.
 *
 *     gcc -O2 -Wall -o dontunmap-committed dontunmap-committed.c && ./dontunmap-committed
 *
 * It needs root, although any process can do the same, because what it does lasts until the next boot.
 * Exit status: 0 the kernel behaves, 1 the kernel has the bug, 77 it cannot tell here.
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
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

#define MB (1024L * 1024)

enum { TIMES = 16 };

static void child(void)
{
	unsigned char *area = reserve(129 * MB / page_size);
	int pages = 64 * MB / page_size;

	for (int n = 0; n < TIMES; n++) {
		map(area, pages);
		move_and_leave(area, pages, area + 65 * MB);
		munmap(area, 129 * MB);
	}
	exit(BEHAVES);
}

int main(void)
{
	long before, risen;
	int status;
	pid_t pid;

	page_size = sysconf(_SC_PAGESIZE);
	if (geteuid())
		cannot("needs root, because this may change Committed_AS until the next boot");
	before = size_of("/proc/meminfo", "Committed_AS:");
	pid = fork();
	if (pid < 0)
		cannot("no process");
	if (pid == 0)
		child();
	if (waitpid(pid, &status, 0) != pid || status != 0)
		cannot("the child fails");
	risen = (size_of("/proc/meminfo", "Committed_AS:") - before) * 1024 / MB;

	printf("A process moved 64 MB with MREMAP_DONTUNMAP, %ld times, unmapped all, and ended.\n", (long)TIMES);
	printf("Committed_AS is %s by %ld MB.\n", risen < 0 ? "lower" : "higher", labs(risen));
	return conclude(risen > TIMES * 64 / 2);
}
