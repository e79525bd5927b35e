/* vfiopy_mmap_aligned against an mmap() that fails late, and against a thread that is always there first. */
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "check.h"

static void *late_mmap(void *address, size_t length, int prot, int flags, int fd, off_t offset);

/* The shim has a handler of its own, under the names of region/fault.c. */
#define vfiopy_fault_install shim_fault_install
#define vfiopy_fault_installed shim_fault_installed
#define vfiopy_fault_count shim_fault_count
#define mmap late_mmap
#include "shim/shim.c"
#undef mmap

#define LENGTH ((size_t)1 << 16)

static int failure; /* errno of mapping a device */
static int rivals;  /* how often somebody else takes the place just before */
static char *rival;

static char *take(void *address)
{
    char *page = mmap(address, LENGTH, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);

    if (page != MAP_FAILED)
        memset(page, 'r', LENGTH);
    return page;
}

/* As kernels before 6.12 have it: what a fixed mapping replaces is gone even where the driver refuses in the end. */
static void *late_mmap(void *address, size_t length, int prot, int flags, int fd, off_t offset)
{
    if (fd >= 0 && rivals > 0) {
        rivals--;
        if (!(flags & MAP_FIXED))
            rival = take(address);
    }
    if (fd < 0 || !failure)
        return mmap(address, length, prot, flags, fd, offset);
    if (flags & MAP_FIXED)
        munmap(address, length);
    rival = take(address);
    errno = failure;
    return MAP_FAILED;
}

static void check_rival(void)
{
    CHECK(rival && rival != MAP_FAILED);
    for (size_t i = 0; i < LENGTH; i++)
        CHECK(rival[i] == 'r');
    CHECK(munmap(rival, LENGTH) == 0);
    rival = NULL;
}

static void a_failure_leaves_alone_what_came_to_its_place(void)
{
    int fd = memfd_create("bar", 0);

    CHECK(fd >= 0 && ftruncate(fd, LENGTH) == 0);
    failure = ENODEV;
    CHECK_EQUAL(vfiopy_mmap_aligned(fd, 0, LENGTH, PROT_READ, 0), -ENODEV);
    failure = 0;
    check_rival();
    close(fd);
}

static void a_place_that_was_taken_is_looked_for_again(void)
{
    int fd = memfd_create("bar", 0);
    intptr_t address;

    CHECK(fd >= 0 && ftruncate(fd, LENGTH) == 0);
    rivals = 1;
    address = vfiopy_mmap_aligned(fd, 0, LENGTH, PROT_READ | PROT_WRITE, 0);
    CHECK(address > 0 && !(address & (LENGTH - 1)));
    CHECK_EQUAL(*(char *)address, 0);
    check_rival();
    CHECK_EQUAL(vfiopy_munmap((uintptr_t)address, LENGTH), 0);

    rivals = 1 << 20;
    CHECK_EQUAL(vfiopy_mmap_aligned(fd, 0, LENGTH, PROT_READ, 0), -EAGAIN);
    rivals = 0;
    close(fd);
}

int main(void)
{
    RUN(a_failure_leaves_alone_what_came_to_its_place);
    RUN(a_place_that_was_taken_is_looked_for_again);
    return 0;
}
