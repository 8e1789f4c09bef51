// SPDX-License-Identifier: GPL-2.0
/*
 * failed-unmap-overcharged: a move of read-only memory whose source cannot be unmapped adds to Committed_AS for ever.
 *
 *     MB          0         64        128       192        320       384
 *     mapped      | r r r r   r r r r   r r r r |                        192 MB, read-only: nothing is promised
 *     moved       | r r r r | - - - - | r r r r |          | r r r r |   the middle, which could not be unmapped
 *     unmapped    |                             |          |         |   nothing is mapped any more
 *
 * The program lets one memory allocation of the move fail, the first, the second and so on, until no further one is
 * made. If the source cannot be split in three, its middle stays mapped, and mremap() succeeds all the same. After each
 * move everything is unmapped.
 *
 * Expected: Committed_AS is about as before. On a kernel with the bug it has risen by 64 MB for each move whose source
 * stayed. It is right again after the next boot.
 *
 *     gcc -O2 -Wall -o failed-unmap-overcharged failed-unmap-overcharged.c && ./failed-unmap-overcharged
 *
 * It needs root, a kernel with CONFIG_FAILSLAB, and debugfs at /sys/kernel/debug.
 * Exit status: 0 the kernel behaves, 1 the kernel has the bug, 77 it cannot tell here.
 */
#define _GNU_SOURCE
#include <fcntl.h>
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

static void map_read_only(unsigned char *at, int pages)
{
	int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED;

	if (mmap(at, pages * page_size, PROT_READ, flags, -1, 0) == MAP_FAILED)
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
#define FAILSLAB "/sys/kernel/debug/failslab/"

enum { MOST = 1000 };

/* Write to a file of the kernel; returns what was in it, without the end of the line. */
static char *set(const char *path, const char *value)
{
	char before[64] = "";
	int from = open(path, O_RDONLY | O_CLOEXEC), to = open(path, O_WRONLY | O_CLOEXEC);

	if (from < 0 || to < 0 || read(from, before, sizeof(before) - 1) < 0)
		cannot("needs CONFIG_FAILSLAB, and debugfs at /sys/kernel/debug");
	before[strcspn(before, "\n")] = 0;
	if (write(to, value, strlen(value)) < 0)
		cannot("the kernel refuses a setting of failslab");
	close(from);
	close(to);
	return strdup(before);
}

/* Move the middle of 192 MB of read-only memory, and let the n-th allocation of that fail. Returns whether it made so many. */
static int move_read_only(unsigned char *area, int n, int *stayed)
{
	unsigned char *middle = area + 64 * MB, *to = area + 320 * MB;
	char number[16], left[16] = "";
	int fd = open("/proc/thread-self/fail-nth", O_RDWR | O_CLOEXEC);
	unsigned char in_core;
	long got;

	if (fd < 0)
		cannot("needs /proc/thread-self/fail-nth (CONFIG_FAULT_INJECTION)");
	map_read_only(area, 192 * MB / page_size);
	snprintf(number, sizeof(number), "%d", n);
	if (pwrite(fd, number, strlen(number), 0) < 0)
		cannot("cannot write to fail-nth");
	got = syscall(SYS_mremap, middle, 64 * MB, 64 * MB, MREMAP_MAYMOVE | MREMAP_FIXED, to);
	if (pread(fd, left, sizeof(left) - 1, 0) < 0 || pwrite(fd, "0", 1, 0) < 0)
		cannot("cannot read fail-nth");
	close(fd);
	if (got == (long)to && !mincore(middle, page_size, &in_core))
		(*stayed)++;
	munmap(area, 384 * MB);
	return atoi(left) == 0;
}

static void child(int to_parent)
{
	unsigned char *area = reserve(384 * MB / page_size);
	int stayed = 0;

	munmap(area, 384 * MB);
	for (int n = 1; n < MOST; n++)
		if (!move_read_only(area, n, &stayed))
			break;
	if (write(to_parent, &stayed, sizeof(stayed)) != sizeof(stayed))
		exit(BUG);
	exit(BEHAVES);
}

int main(void)
{
	int status, pipes[2], stayed = 0;
	char *verbose, *ignore;
	long before, risen;
	pid_t pid;

	page_size = sysconf(_SC_PAGESIZE);
	if (geteuid())
		cannot("needs root, because this may change Committed_AS until the next boot");
	verbose = set(FAILSLAB "verbose", "0");
	ignore = set(FAILSLAB "ignore-gfp-wait", "N");
	before = size_of("/proc/meminfo", "Committed_AS:");
	pid = pipe(pipes) ? -1 : fork();
	if (pid < 0)
		cannot("no process");
	if (pid == 0)
		child(pipes[1]);
	if (waitpid(pid, &status, 0) != pid)
		status = -1;
	risen = (size_of("/proc/meminfo", "Committed_AS:") - before) * 1024 / MB;
	set(FAILSLAB "verbose", verbose);
	set(FAILSLAB "ignore-gfp-wait", ignore);
	if (status != 0 || read(pipes[0], &stayed, sizeof(stayed)) != sizeof(stayed))
		cannot("the child fails");
	if (!stayed)
		cannot("the source could be unmapped each time");

	printf("The source of %ld moves could not be unmapped. Then everything was.\n", (long)stayed);
	printf("Committed_AS is %s by %ld MB.\n", risen < 0 ? "lower" : "higher", labs(risen));
	return conclude(risen > 64 / 2);
}
