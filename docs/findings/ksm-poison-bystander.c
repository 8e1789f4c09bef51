// SPDX-License-Identifier: GPL-2.0
/*
 * ksm-poison-bystander: memory failure of a KSM page sends SIGBUS to processes that do not map it.
 *
 *     page             0   1   2   3   4     A: the KSM page, poisoned; other letters: pages of their own
 *     parent         | A | . | A | . | . |
 *     first child    | . | . | . | . | b |   has moved page 0, as inherited, to page 4, and written to it
 *     second child   | c | . | . | . | . |   has written to page 0
 *
 * Expected: the parent gets SIGBUS, and no other process. On a kernel with the bug the children get SIGBUS for page 0,
 * where the first maps nothing and the second has a page of its own.
 *
 *     gcc -O2 -Wall -o ksm-poison-bystander ksm-poison-bystander.c && ./ksm-poison-bystander
 *
 * It needs root, KSM and memory failure. KSM's settings are as before when it ends. One page frame stays poisoned until
 * the next boot, unless the module hwpoison-inject is loaded and debugfs is mounted.
 * Exit status: 0 the kernel behaves, 1 the kernel has the bug, 77 it cannot tell here.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/random.h>
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

static int put(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC);
	int done = fd >= 0 && write(fd, text, strlen(text)) == (ssize_t)strlen(text);

	if (fd >= 0)
		close(fd);
	return done;
}

/* Read the first line of a file. */
static int get(const char *path, char *text, size_t size)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t length = fd < 0 ? -1 : read(fd, text, size - 1);

	if (fd >= 0)
		close(fd);
	text[length < 0 ? 0 : length] = '\0';
	text[strcspn(text, "\n")] = '\0';
	return length >= 0;
}

#define KSM "/sys/kernel/mm/ksm/"

/* Settings with which ksmd scans everything at once, and what was there before. */
static struct {
	const char *path, *value;
	char before[32];
} knobs[] = {
	{ KSM "advisor_mode", "none", "" }, /* since 6.8; a change resets pages_to_scan */
	{ KSM "smart_scan", "0", "" }, /* since 6.7 */
	{ KSM "pages_to_scan", "100000", "" },
	{ KSM "sleep_millisecs", "0", "" },
	{ KSM "run", "0", "" },
};

#define KNOBS (sizeof(knobs) / sizeof(*knobs))

static void ksm_end(void)
{
	put(KSM "run", "0");
	for (size_t n = 0; n < KNOBS; n++)
		if (knobs[n].before[0])
			put(knobs[n].path, knobs[n].before);
}

static void interrupted(int number)
{
	(void)number;
	ksm_end();
	_exit(CANNOT_TELL);
}

static void ksm_begin(void)
{
	for (size_t n = 0; n < KNOBS; n++) {
		char text[64], *chosen;

		if (!get(knobs[n].path, text, sizeof(text)))
			continue;
		/* A choice looks like "[none] scan-time". */
		chosen = strchr(text, '[') ? strchr(text, '[') + 1 : text;
		chosen[strcspn(chosen, "]")] = '\0';
		snprintf(knobs[n].before, sizeof(knobs[n].before), "%.31s", chosen);
	}
	if (!put(KSM "run", "0"))
		cannot("needs root, and CONFIG_KSM");
	atexit(ksm_end);
	signal(SIGHUP, interrupted);
	signal(SIGINT, interrupted);
	signal(SIGTERM, interrupted);
	for (size_t n = 0; n < KNOBS; n++)
		put(knobs[n].path, knobs[n].value);
}

static long full_scans(void)
{
	char text[32];

	return get(KSM "full_scans", text, sizeof(text)) ? atol(text) : 0;
}

/* Merging takes two full scans. The scan under way may have passed our pages, so that three are enough. */
static void scan(void)
{
	long goal = full_scans() + 3;

	put(KSM "run", "1");
	for (int tries = 0; full_scans() < goal; tries++) {
		if (tries == 120000)
			cannot("ksmd does not scan all memory three times in two minutes");
		usleep(1000);
	}
	put(KSM "run", "0");
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

static void move(unsigned char *from, int pages, unsigned char *to)
{
	size_t length = pages * page_size;

	if (mremap(from, length, length, MREMAP_MAYMOVE | MREMAP_FIXED, to) != to)
		cannot("mremap() fails");
}

/* Fill a page with bytes that are random, so that KSM merges it with our pages of the same number and no others. */
static void fill(unsigned char *page, int number)
{
	static uint64_t salt;

	if (!salt && getrandom(&salt, sizeof(salt), 0) != sizeof(salt))
		cannot("needs getrandom()");
	for (size_t n = 0; n < page_size / sizeof(uint64_t); n++)
		((uint64_t *)page)[n] = salt + number * 0x9e3779b97f4a7c15 + n;
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

enum { PARENT, MOVED, WRITTEN, PROCESSES };

/* What each process has to say; all of them see it. */
static struct {
	volatile int ready, told;
} *says;
static int me = PARENT;
static unsigned char *page_0;

static void told(int number, siginfo_t *info, void *context)
{
	(void)number;
	(void)context;
	/* The parent may be told of either of its pages. */
	says[me].told = me == PARENT || info->si_addr == page_0;
}

/* A process that wants to know at once of poisoned memory that it maps. */
static pid_t start(int process, unsigned char *away)
{
	unsigned char *own = page_0;
	pid_t pid = fork();

	if (pid < 0)
		cannot("no process");
	if (pid > 0) {
		for (int tries = 0; !says[process].ready; tries++) {
			if (tries == 60000)
				cannot("a child does nothing");
			usleep(1000);
		}
		return pid;
	}
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	prctl(PR_MCE_KILL, PR_MCE_KILL_SET, PR_MCE_KILL_EARLY, 0, 0);
	me = process;
	if (process == MOVED) {
		move(page_0, 1, away);
		own = away;
	}
	fill(own, process);
	says[process].ready = 1;
	for (;;)
		pause();
}

static void report(int process, const char *what)
{
	if (says[process].told)
		printf("%s got SIGBUS for it.\n", what);
	else
		printf("%s was told nothing.\n", what);
}

int main(void)
{
	struct sigaction action = { .sa_sigaction = told, .sa_flags = SA_SIGINFO };
	unsigned char *page_2;
	pid_t pids[PROCESSES];
	uint64_t number;
	char text[32];

	page_size = sysconf(_SC_PAGESIZE);
	ksm_begin();
	says = mmap(NULL, page_size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (says == MAP_FAILED)
		cannot("no memory");
	page_0 = reserve(5);
	page_2 = page_0 + 2 * page_size;
	sigaction(SIGBUS, &action, NULL);

	map(page_0, 1);
	fill(page_0, 9);
	for (int process = MOVED; process < PROCESSES; process++)
		pids[process] = start(process, page_0 + 4 * page_size);
	map(page_2, 1);
	fill(page_0, PARENT);
	fill(page_2, PARENT);
	madvise(page_0, page_size, MADV_MERGEABLE);
	madvise(page_2, page_size, MADV_MERGEABLE);
	scan();
	number = frame(getpid(), page_0);
	if (number != frame(getpid(), page_2))
		cannot("KSM does not merge equal pages");
	if (madvise(page_0, page_size, 100 /* MADV_HWPOISON */))
		cannot(errno == EINVAL ? "needs CONFIG_MEMORY_FAILURE" : strerror(errno));
	usleep(500000);

	for (int process = MOVED; process < PROCESSES; process++) {
		kill(pids[process], SIGKILL);
		waitpid(pids[process], NULL, 0);
	}
	munmap(page_0, 3 * page_size);
	snprintf(text, sizeof(text), "%llu", (unsigned long long)number);
	put("/sys/kernel/debug/hwpoison/unpoison-pfn", text);

	printf("A KSM page was poisoned, which a process maps at page 0 and at page 2.\n");
	if (!says[PARENT].told)
		cannot("the process that maps the poisoned page was told nothing");
	report(PARENT, "The process");
	report(MOVED, "A child that has moved page 0 away, and maps nothing there,");
	report(WRITTEN, "A child that has a page of its own at page 0");
	return conclude(says[MOVED].told || says[WRITTEN].told);
}
