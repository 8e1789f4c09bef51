// SPDX-License-Identifier: GPL-2.0
/*
 * ksm-unmergeable-flags: MADV_UNMERGEABLE clears the upper 32 flags of a VMA (CVE-2025-40040).
 *
 * The program registers a private mapping of a file in memory for userfaultfd's minor faults. That is a flag in the
 * upper half, which /proc/PID/smaps shows as "ui". It makes the mapping mergeable, and unmergeable again.
 *
 * Expected: the mapping is still registered. On a kernel with the bug the flag is gone. Such a kernel runs into a BUG()
 * when the userfaultfd is closed. The program unmaps the mapping first, which avoids that.
 *
 *     gcc -O2 -Wall -o ksm-unmergeable-flags ksm-unmergeable-flags.c && ./ksm-unmergeable-flags
 *
 * It needs root, KSM, and userfaultfd with minor faults of shared memory (Linux 5.14).
 * Exit status: 0 the kernel behaves, 1 the kernel has the bug, 77 it cannot tell here.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
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

/* include/uapi/linux/userfaultfd.h, which older systems have without minor faults */
struct api {
	uint64_t api, features, ioctls;
};

struct registration {
	uint64_t start, length, mode, ioctls;
};

#define API _IOWR(0xaa, 0x3f, struct api)
#define REGISTER _IOWR(0xaa, 0x00, struct registration)

enum { MODE_MINOR = 4, FEATURE_MINOR_SHMEM = 1 << 10 };

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

int main(void)
{
	struct api api = { .api = 0xaa, .features = FEATURE_MINOR_SHMEM };
	struct registration minor = { .mode = MODE_MINOR };
	int uffd, file, registered, mergeable;
	void *mapping;

	page_size = sysconf(_SC_PAGESIZE);
	uffd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
	if (uffd < 0 || ioctl(uffd, API, &api))
		cannot("needs root, and userfaultfd with minor faults of shared memory (Linux 5.14)");
	file = memfd_create("minor", MFD_CLOEXEC);
	if (file < 0 || ftruncate(file, 2 * page_size))
		cannot("needs memfd_create()");
	mapping = mmap(NULL, 2 * page_size, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0);
	if (mapping == MAP_FAILED)
		cannot("no memory");
	if (madvise(mapping, 2 * page_size, MADV_MERGEABLE))
		cannot("needs CONFIG_KSM");
	minor.start = (uintptr_t)mapping;
	minor.length = 2 * page_size;
	if (ioctl(uffd, REGISTER, &minor))
		cannot("the mapping cannot be registered for minor faults");
	if (!has_flag(mapping, "ui") || !has_flag(mapping, "mg"))
		cannot("smaps does not show that the mapping is registered and mergeable");

	madvise(mapping, 2 * page_size, MADV_UNMERGEABLE);
	registered = has_flag(mapping, "ui");
	mergeable = has_flag(mapping, "mg");
	munmap(mapping, 2 * page_size);
	close(uffd);
	printf("A mapping was registered for minor faults and mergeable. It was made unmergeable.\n");
	printf("It is %s mergeable, and it is %s registered.\n", mergeable ? "still" : "no longer",
	       registered ? "still" : "no longer");
	return conclude(!registered);
}
