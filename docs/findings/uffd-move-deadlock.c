// SPDX-License-Identifier: GPL-2.0
/*
 * uffd-move-deadlock: mremap() and UFFDIO_MOVE of two threads take two page table locks in opposite order.
 *
 *     page table      |         1         |         2         |
 *     mremap()        |   m <-----------------> m             |     one thread, there and back
 *     UFFDIO_MOVE     |         u <-----------------> u       |     another, there and back
 *
 * Expected: both go on. On a kernel with the bug both stop within a second, and two CPUs spin in the kernel for ever.
 * REBOOT THE MACHINE AFTERWARDS. A third CPU is needed to tell.
 *
 *     gcc -O2 -Wall -pthread -o uffd-move-deadlock uffd-move-deadlock.c && ./uffd-move-deadlock
 *
 * It needs root, three CPUs and Linux 6.8.
 * Exit status: 0 the kernel behaves, 1 the kernel has the bug, 77 it cannot tell here.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

enum { BEHAVES = 0, BUG = 1, CANNOT_TELL = 77 };

/* As in the headers of Linux 6.8. */
struct move_request {
	uint64_t to, from, length, mode;
	int64_t moved;
};
#define MOVE_IOCTL _IOWR(UFFDIO, 0x05, struct move_request)
#define MOVE_FEATURE (1ULL << 16)

/* What the two processes share. */
static volatile struct {
	long mremaps, uffd_moves;
} *shared;

static long page_size, table_size;
static unsigned char *area;
static int uffd;

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

static void give_up(void)
{
	_exit(CANNOT_TELL);
}

static void *call_mremap(void *unused)
{
	unsigned char *from = area + 16 * page_size, *to = from + table_size, *next;

	for (;;) {
		if (mremap(from, page_size, page_size, MREMAP_MAYMOVE | MREMAP_FIXED, to) != to)
			give_up();
		next = from;
		from = to;
		to = next;
		shared->mremaps++;
	}
	return unused;
}

static void *call_uffd_move(void *unused)
{
	unsigned char *from = area + 64 * page_size, *to = from + table_size, *next;

	for (;;) {
		struct move_request request = { (uintptr_t)to, (uintptr_t)from, page_size, 0, 0 };

		if (ioctl(uffd, MOVE_IOCTL, &request)) {
			if (errno == EAGAIN)
				continue;
			give_up();
		}
		next = from;
		from = to;
		to = next;
		shared->uffd_moves++;
	}
	return unused;
}

static void map_page(unsigned char *at)
{
	int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED;

	if (mmap(at, page_size, PROT_READ | PROT_WRITE, flags, -1, 0) == MAP_FAILED)
		give_up();
}

static void register_page(unsigned char *at)
{
	struct uffdio_register request = {
		.range = { .start = (unsigned long)at, .len = page_size },
		.mode = UFFDIO_REGISTER_MODE_MISSING,
	};

	if (ioctl(uffd, UFFDIO_REGISTER, &request))
		give_up();
}

/* The process that may never end: two threads, each with a page of its own. */
static void race(void)
{
	struct uffdio_api api = { .api = UFFD_API, .features = MOVE_FEATURE };
	int quiet = open("/dev/null", O_RDWR);
	pthread_t one, other;

	/* Nobody who reads our output is to wait for this process. */
	dup2(quiet, 1);
	dup2(quiet, 2);
	table_size = page_size / 8 * page_size;
	area = mmap(NULL, 3 * table_size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (area == MAP_FAILED)
		give_up();
	area += -(uintptr_t)area % table_size;
	uffd = syscall(SYS_userfaultfd, O_CLOEXEC);
	if (uffd < 0 || ioctl(uffd, UFFDIO_API, &api))
		give_up();
	map_page(area + 16 * page_size);
	map_page(area + 64 * page_size);
	map_page(area + 64 * page_size + table_size);
	area[16 * page_size] = 1;
	area[64 * page_size] = 1;
	register_page(area + 64 * page_size);
	register_page(area + 64 * page_size + table_size);
	pthread_create(&one, NULL, call_mremap, NULL);
	pthread_create(&other, NULL, call_uffd_move, NULL);
	pthread_join(one, NULL);
}

/* The CPU time that all threads of a process have used, in clock ticks. */
static long cpu_time(pid_t pid)
{
	unsigned long user, system;
	char path[64], line[512];
	const char *end;
	FILE *file;
	long used = 0;

	snprintf(path, sizeof(path), "/proc/%d/stat", pid);
	file = fopen(path, "re");
	if (file && fgets(line, sizeof(line), file)) {
		end = strrchr(line, ')');
		if (end && sscanf(end, ") %*c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %lu %lu", &user, &system) == 2)
			used = user + system;
	}
	if (file)
		fclose(file);
	return used;
}

int main(void)
{
	long ticks = sysconf(_SC_CLK_TCK), mremaps = -1, uffd_moves = -1, began = 0;
	int tenths, stuck = 0;
	pid_t pid;

	page_size = sysconf(_SC_PAGESIZE);
	if (geteuid())
		cannot("needs root, to use userfaultfd");
	if (sysconf(_SC_NPROCESSORS_ONLN) < 3)
		cannot("needs three CPUs");
	shared = mmap(NULL, page_size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (shared == MAP_FAILED)
		cannot("no memory");
	fflush(stdout);
	pid = fork();
	if (pid == 0) {
		race();
		_exit(CANNOT_TELL);
	}
	/* Ten seconds, and as long as it takes if they stand still: six seconds of the two CPUs' time without a call. */
	for (tenths = 0; tenths < 100 || (tenths < 600 && mremaps == shared->mremaps); tenths++) {
		usleep(100000);
		if (waitpid(pid, NULL, WNOHANG))
			cannot("needs UFFDIO_MOVE, and CONFIG_USERFAULTFD=y");
		if (mremaps != shared->mremaps || uffd_moves != shared->uffd_moves) {
			mremaps = shared->mremaps;
			uffd_moves = shared->uffd_moves;
			began = cpu_time(pid);
		} else if (cpu_time(pid) - began >= 6 * ticks) {
			stuck = 1;
			break;
		}
	}
	printf("A thread moved a page with mremap(), another moved another page with UFFDIO_MOVE.\n");
	printf("Both go on after some seconds: %s.\n", stuck ? "no" : "yes");
	if (stuck)
		return conclude(1);
	kill(pid, SIGKILL);
	waitpid(pid, NULL, 0);
	if (shared->mremaps < 100 || shared->uffd_moves < 100)
		cannot("the threads made too few calls");
	return conclude(0);
}
