// SPDX-License-Identifier: GPL-2.0
/*
 * uprobe-merge: each mremap() of a mapping with a uprobe to where it merges leaks a page (CVE-2025-38207).
 *
 *     page         0   1   2   3       c: code of a file, b: a page of our own with a breakpoint
 *     mapped     | b | c |   |   |    a private mapping. The uprobe is in page 0
 *     away       |   | c |   | b |
 *     and back   | b | c |   |   |    one mapping again
 *
 * The program does this 1000 times, and looks how far RssAnon in /proc/self/status rises.
 *
 * Expected: about as before. It may be wrong by some pages for each CPU, because each CPU keeps its share to itself for
 * a while. On a kernel with the bug each move back makes a page with a breakpoint, which nothing maps or frees. When
 * the program ends, such a kernel logs "BUG: Bad rss-counter state".
 *
 *     gcc -O2 -Wall -o uprobe-merge uprobe-merge.c && ./uprobe-merge
 *
 * It needs root, and perf events that are uprobes (CONFIG_UPROBE_EVENTS). 4 MB are lost until the next boot.
 * Exit status: 0 the kernel behaves, 1 the kernel has the bug, 77 it cannot tell here.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/perf_event.h>
#include <stdint.h>
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

/* A file of two pages of instructions that do nothing. */
static int code(void)
{
#if defined(__x86_64__) || defined(__i386__)
	static const unsigned char nop[] = { 0x90 };
#elif defined(__aarch64__)
	static const unsigned char nop[] = { 0x1f, 0x20, 0x03, 0xd5 };
#elif defined(__riscv)
	static const unsigned char nop[] = { 0x13, 0x00, 0x00, 0x00 };
#else
	static const unsigned char nop[1];

	cannot("needs x86, arm64 or riscv");
#endif
	int fd = syscall(SYS_memfd_create, "code", 0);

	for (size_t n = 0; n < 2 * page_size / sizeof(nop); n++)
		if (fd < 0 || write(fd, nop, sizeof(nop)) != sizeof(nop))
			cannot("no file in memory");
	return fd;
}

/* Put a uprobe at the beginning of a file, in this process only, for as long as the program runs. */
static void probe(int fd)
{
	struct perf_event_attr attr;
	char path[64], type[32];

	if (!get("/sys/bus/event_source/devices/uprobe/type", type, sizeof(type)))
		cannot("needs CONFIG_UPROBE_EVENTS");
	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	memset(&attr, 0, sizeof(attr));
	attr.size = PERF_ATTR_SIZE_VER5;
	attr.type = atoi(type);
	attr.config1 = (uintptr_t)path; /* uprobe_path */
	attr.config2 = 0; /* probe_offset */
	if (syscall(SYS_perf_event_open, &attr, 0, -1, -1, 0) < 0)
		cannot("perf_event_open() fails");
}

static void move(unsigned char *from, int pages, unsigned char *to)
{
	size_t length = pages * page_size;

	if (mremap(from, length, length, MREMAP_MAYMOVE | MREMAP_FIXED, to) != to)
		cannot("mremap() fails");
}

static long anonymous(void)
{
	return size_of("/proc/self/status", "RssAnon:") * 1024 / page_size;
}

enum { ROUNDS = 1000 };

int main(void)
{
	unsigned char *area;
	long before, more;
	int fd;

	page_size = sysconf(_SC_PAGESIZE);
	if (geteuid())
		cannot("needs root, to make a uprobe");
	fd = code();
	probe(fd);
	area = reserve(4);
	if (mmap(area, 2 * page_size, PROT_READ | PROT_EXEC, MAP_PRIVATE | MAP_FIXED, fd, 0) != area)
		cannot("the file cannot be mapped");
	if (area[0] == area[page_size])
		cannot("no breakpoint is put into the page");
	before = anonymous();
	for (int n = 0; n < ROUNDS; n++) {
		move(area, 1, area + 3 * page_size);
		move(area + 3 * page_size, 1, area);
	}
	more = anonymous() - before;

	printf("A page with a uprobe was moved away and back to where it merges, %ld times.\n", (long)ROUNDS);
	printf("The process has %ld anonymous pages more than before.\n", more);
	return conclude(more > ROUNDS / 2);
}
