# SPDX-License-Identifier: GPL-2.0
"""The functions of C programs about the whole system: KSM, swap, control groups, large folios, and failures."""

from __future__ import annotations

from typing import Final

#: by name, in an order in which they can stand in a file
SYSTEM: Final[dict[str, str]] = {
    "put": r"""
static int put(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC);
	ssize_t done = fd < 0 ? -1 : write(fd, text, strlen(text));
	int error = done < 0 ? errno : 0;

	if (fd >= 0)
		close(fd);
	return error;
}
""",
    "folios": r"""
#define FOLIOS "/sys/kernel/mm/transparent_hugepage/hugepages-%ldkB/enabled"

/* Let memory with MADV_HUGEPAGE have folios of 4 and 8 pages, if the kernel has them. These settings stay. */
static void folios_begin(void)
{
	char path[128];

	for (long pages = 4; pages <= 8; pages *= 2) {
		snprintf(path, sizeof(path), FOLIOS, pages * page_size / 1024);
		put(path, "madvise");
	}
}
""",
    "ksm": r"""
#define KSM "/sys/kernel/mm/ksm/"

/* Let ksmd scan everything at once. These settings stay. */
static void ksm_begin(void)
{
	if (put(KSM "run", "0")) {
		printf("needs CONFIG_KSM and root\n");
		exit(CANNOT_TELL);
	}
	put(KSM "advisor_mode", "none");
	put(KSM "smart_scan", "0");
	put(KSM "pages_to_scan", "16777216");
	put(KSM "sleep_millisecs", "0");
}

""",
    "scan": r"""
static long full_scans(void)
{
	char text[32] = "";
	int fd = open(KSM "full_scans", O_RDONLY | O_CLOEXEC);

	if (fd < 0 || read(fd, text, sizeof(text) - 1) < 0)
		exit(CANNOT_TELL);
	close(fd);
	return atol(text);
}

/* Three full scans merge whatever can be merged. */
static int scan(void)
{
	long goal = full_scans() + 3;
	int error = put(KSM "run", "1");

	for (int tries = 0; full_scans() < goal && tries < 10000; tries++)
		usleep(1000);
	return error ? error : put(KSM "run", "0");
}
""",
    "unmerge_all": r"""
static int unmerge_all(void)
{
	int error = put(KSM "run", "2");

	put(KSM "run", "0");
	return error;
}
""",
    "reclaim": r"""
#define GROUP "/sys/fs/cgroup/mremap-program"

static void reclaim_begin(void)
{
	put("/sys/fs/cgroup/cgroup.subtree_control", "+memory");
	mkdir(GROUP, 0755);
	if (put(GROUP "/cgroup.procs", "0")) {
		printf("needs cgroup version 2 with the memory controller, and root\n");
		exit(CANNOT_TELL);
	}
}

/* EAGAIN says that less could be reclaimed than was asked for, which is everything. */
static int reclaim(void)
{
	put(GROUP "/memory.reclaim", "64M");
	return 0;
}
""",
    "move_failing": r"""
#define FAIL "/sys/kernel/debug/fail_mremap_relocate/"

/* Relocate, and have the relocation of the n-th folio fail. These settings stay. */
static int move_failing(int from, int pages, int to, int flag, int number)
{
	char space[16];
	int error;

	snprintf(space, sizeof(space), "%d", number);
	if (put(FAIL "probability", "100") || put(FAIL "interval", "1") || put("/proc/thread-self/make-it-fail", "1")) {
		printf("needs a kernel with MREMAP_RELOCATE_ANON and fault injection, debugfs, and root\n");
		exit(CANNOT_TELL);
	}
	put(FAIL "task-filter", "Y");
	put(FAIL "space", space);
	put(FAIL "times", "1");
	error = move(from, pages, to, pages, MREMAP_MAYMOVE | MREMAP_FIXED | flag);
	put(FAIL "times", "0");
	return error;
}
""",
    "swap_off": r"""
/* Have all that is swapped out read back. */
static int swap_off(void)
{
	char path[256] = "";
	FILE *file = fopen("/proc/swaps", "r");
	int error;

	if (!file || fscanf(file, "%*[^\n]\n%255s", path) != 1) {
		printf("needs a swap device\n");
		exit(CANNOT_TELL);
	}
	fclose(file);
	error = swapoff(path) ? errno : 0;
	if (!error && swapon(path, 0))
		error = errno;
	return error;
}
""",
}
