# SPDX-License-Identifier: GPL-2.0
"""The functions that C programs of the explorer are made of. A program has those that it calls, in this order."""

from __future__ import annotations

from typing import Final

from harness.explore.c_system import SYSTEM

#: always there
HEAD: Final = r"""#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
"""

#: includes of programs that fork
FORK_HEAD: Final = r"""#include <sched.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
"""

#: name, and the text of the function; those further down may call those above
FUNCTIONS: Final[dict[str, str]] = {
    "page": r"""
enum { OK = 0, BAD = 1, CANNOT_TELL = 4 };

static long page_size;

/* Page n of the memory that the program works on, at a place where the kernel maps nothing by itself. */
static unsigned char *page(int n)
{
	return (unsigned char *)(1UL << 44) + n * page_size;
}
""",
    "must": r"""
/* A call that does not end as it did when this program was found makes the rest pointless. */
static void must(const char *what, int error, int wanted)
{
	if (error == wanted)
		return;
	printf("%s: %s", what, error ? strerror(error) : "no error");
	printf(", expected: %s\n", wanted ? strerror(wanted) : "no error");
	exit(CANNOT_TELL);
}
""",
    "map": r"""
static int map(int at, int pages, int sharing)
{
	void *got = mmap(page(at), pages * page_size, PROT_READ | PROT_WRITE, sharing | MAP_ANONYMOUS | MAP_FIXED, -1, 0);

	return got == MAP_FAILED ? errno : 0;
}
""",
    "map_file": r"""
/* All mappings are of one file of zeros. Its offset is that of the page. */
static int map_file(int at, int pages)
{
	static int fd = -1;
	void *got;

	if (fd < 0) {
		fd = memfd_create("program", 0);
		if (fd < 0 || ftruncate(fd, 1024 * page_size))
			return errno;
	}
	got = mmap(page(at), pages * page_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED, fd, at * page_size);
	return got == MAP_FAILED ? errno : 0;
}
""",
    "unmap": r"""
static int unmap(int at, int pages)
{
	return munmap(page(at), pages * page_size) ? errno : 0;
}
""",
    "move": r"""
/* The C library's mremap() does not pass on flags that it does not know. */
static int move(int from, int pages, int to, int new_pages, int flags)
{
	long got = syscall(SYS_mremap, page(from), pages * page_size, new_pages * page_size, flags, page(to));

	return got == -1 ? errno : 0;
}
""",
    "advise": r"""
static int advise(int at, int pages, int advice)
{
	return madvise(page(at), pages * page_size, advice) ? errno : 0;
}
""",
    "bind": r"""
/* A policy prefers the last of two nodes. */
static int bind(int at, int pages, int mode)
{
	unsigned long nodes = 2;

	return syscall(SYS_mbind, page(at), pages * page_size, mode, mode ? &nodes : NULL, mode ? 64L : 0L, 0) ? errno : 0;
}
""",
    "name": r"""
static int name(int at, int pages, const char *text)
{
	return prctl(0x53564d41 /* PR_SET_VMA */, 0L, page(at), pages * page_size, text) ? errno : 0;
}
""",
    "userfaultfd": r"""
/* Features that older headers lack: WP_UNPOPULATED and MOVE. */
#define FEATURES (UFFD_FEATURE_SIGBUS | 1 << 13)
#define FEATURE_MOVE (1 << 16)

/* One userfaultfd for all. It has not asked for events, and a write to a page that it protects ends with SIGBUS. */
static int userfaultfd(void)
{
	static int fd = -1;

	for (int move = FEATURE_MOVE; fd < 0; move = 0) {
		struct uffdio_api api = { .api = UFFD_API, .features = FEATURES | move };

		fd = syscall(SYS_userfaultfd, O_CLOEXEC);
		if (fd >= 0 && !ioctl(fd, UFFDIO_API, &api))
			break;
		if (fd < 0 || !move) {
			printf("needs a userfaultfd that protects memory which was never written (Linux 6.4), and root\n");
			exit(CANNOT_TELL);
		}
		close(fd);
		fd = -1;
	}
	return fd;
}
""",
    "userfault": r"""
static int userfault(int at, int pages, unsigned long request, int mode)
{
	struct uffdio_register range = { .range = { (uintptr_t)page(at), pages * page_size }, .mode = mode };

	/* The other requests take what that of UFFDIO_REGISTER begins with. */
	return ioctl(userfaultfd(), request, &range) ? errno : 0;
}
""",
    "userfault_move": r"""
/* UFFDIO_MOVE of one page, which older headers lack. */
static int userfault_move(int from, int to)
{
	uint64_t move[5] = { (uintptr_t)page(to), (uintptr_t)page(from), page_size };

	return ioctl(userfaultfd(), 0xc028aa05, move) ? errno : 0;
}
""",
    "protect": r"""
static int protect(int at, int pages, int prot)
{
	return mprotect(page(at), pages * page_size, prot) ? errno : 0;
}
""",
    "lock": r"""
static int lock(int at, int pages)
{
	return mlock(page(at), pages * page_size) ? errno : 0;
}
""",
    "unlock": r"""
static int unlock(int at, int pages)
{
	return munlock(page(at), pages * page_size) ? errno : 0;
}
""",
    "fill": r"""
/* Write the first and the last byte of each page. */
static int fill(int at, int pages, const char *bytes)
{
	for (int n = 0; n < pages; n++)
		page(at + n)[0] = page(at + n)[page_size - 1] = bytes[n];
	return 0;
}
""",
    "poke": r"""
/* Write the first and the last byte of a page past its protection. */
static int poke(int at, const char *bytes)
{
	int fd = open("/proc/self/mem", O_RDWR | O_CLOEXEC);
	int error = 0;

	if (pwrite(fd, bytes, 1, (uintptr_t)page(at)) != 1 || pwrite(fd, bytes, 1, (uintptr_t)page(at + 1) - 1) != 1)
		error = errno;
	close(fd);
	return error;
}
""",
    "look": r"""
static int look(int at, int pages)
{
	for (int n = 0; n < pages; n++)
		(void)*(volatile unsigned char *)page(at + n);
	return 0;
}
""",
    **SYSTEM,
    "release": r"""
static int held[128], n_held;

static int release(void)
{
	while (n_held)
		close(held[--n_held]);
	return 0;
}
""",
    "hold": r"""
/* Keep a reference to each page. */
static int hold(int at, int pages)
{
	struct iovec vector = { page(at), pages * page_size };
	int ends[2];

	if (pipe(ends))
		return errno;
	fcntl(ends[1], F_SETPIPE_SZ, pages * page_size);
	held[n_held++] = ends[0];
	held[n_held++] = ends[1];
	return vmsplice(ends[1], &vector, 1, 0) < 0 ? errno : 0;
}
""",
    "turns": r"""
/* Every process goes through the same lines. Each does its own steps, and waits for its turn. */
static struct { volatile int step, bad; } *shared;
static int me, children;

static void turn(int step)
{
	while (shared->step != step)
		sched_yield();
}

static int become(int child, int step)
{
	if (fork()) {
		shared->step++;
		return 0;
	}
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	turn(step + 1);
	me = child;
	return 0;
}

#define STEP(number, process, what, call, wanted)               \
	do {                                                   \
		if (me == (process)) {                         \
			turn(number);                          \
			must(what, call, wanted);              \
			shared->step++;                        \
		}                                              \
	} while (0)
""",
    "bad": r"""
static int bad;
""",
    "wrong": r"""
static void wrong(int n, const char *what)
{
	printf("page %d %s\n", n, what);
	bad = 1;
}
""",
    "marks": r"""
/* Which pages the userfaultfd write-protects: w yes, - no, ? is not known. Bit 57 of an entry of pagemap says it. */
static void marks(int at, const char *wanted)
{
	int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);

	for (int n = 0; wanted[n]; n++) {
		uint64_t entry;

		if (pread(fd, &entry, 8, (uintptr_t)page(at + n) / page_size * 8) != 8)
			exit(CANNOT_TELL);
		if ((entry >> 57 & 1) != (wanted[n] == 'w'))
			wrong(at + n, wanted[n] == 'w' ? "is not write-protected" : "is write-protected");
	}
	close(fd);
}
""",
    "check": r"""
static void check(int at, int pages, const char *bytes)
{
	for (int n = 0; n < pages; n++) {
		unsigned char first = page(at + n)[0], last = page(at + n)[page_size - 1];

		if (first != (unsigned char)bytes[n] || last != (unsigned char)bytes[n]) {
			printf("page %d holds %d and %d, %d was written\n", at + n, first, last, (unsigned char)bytes[n]);
			bad = 1;
		}
	}
}
""",
    "walk": r"""
/* Ask for a page to move to a node where it is not, so that the kernel must find every mapping of it. */
static int walk_to(void *where)
{
	int status = -1, node, tries;

	for (tries = 0; tries < 5; tries++) {
		if (syscall(SYS_move_pages, 0, 1L, &where, NULL, &status, 0) || status < 0)
			return 1; /* nothing is there, or the zero page */
		node = status == 0;
		if (syscall(SYS_move_pages, 0, 1L, &where, &node, &status, 4 /* MPOL_MF_MOVE_ALL */) < 0) {
			printf("move_pages: %s: this needs two NUMA nodes (numa=fake=2) and root\n", strerror(errno));
			exit(CANNOT_TELL);
		}
		syscall(SYS_move_pages, 0, 1L, &where, NULL, &status, 0);
		if (status == node)
			return 1;
		usleep(1000 << tries);
	}
	return 0;
}

static int walk(int at, int pages)
{
	static unsigned char *control;

	if (!control) {
		control = mmap(NULL, page_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		*control = 1;
	}
	for (int n = 0; n < pages; n++) {
		if (walk_to(page(at + n)))
			continue;
		if (!walk_to(control)) {
			printf("no page can be moved to another node now\n");
			exit(CANNOT_TELL);
		}
		wrong(at + n, "is lost: it does not move to another node, and another page does");
	}
	return 0;
}
""",
}
