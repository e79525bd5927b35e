/*
 * What tools/bench compares the book with: pins as the kernel keeps them, a red-black tree with a node for each page
 * (drivers/vfio/vfio_iommu_type1.c, struct vfio_pfn). Built as a shared library when the benchmark runs.
 */
#include <stdint.h>
#include <stdlib.h>
#include <time.h>

#include "iova/rbtree.h"

struct page {
    struct vfiopy_rb rb;
    uint64_t iova, pfn;
    uint32_t count;
};

static struct page **find_place(struct vfiopy_rb_tree *tree, uint64_t iova, struct vfiopy_rb **parent, int *side)
{
    struct vfiopy_rb **at = &tree->top;

    *parent = NULL;
    *side = 0;
    while (*at) {
        struct page *page = (struct page *)*at;

        if (page->iova == iova)
            break;
        *parent = *at;
        *side = iova > page->iova;
        at = &(*at)->kid[*side];
    }
    return (struct page **)at;
}

static bool keeps_nothing(struct vfiopy_rb *node)
{
    (void)node;
    return false;
}

static void pin(struct vfiopy_rb_tree *tree, uint64_t iova)
{
    struct vfiopy_rb *parent;
    struct page *page;
    int side;

    page = *find_place(tree, iova, &parent, &side);
    if (!page) {
        page = calloc(1, sizeof(*page));
        if (!page)
            abort();
        page->iova = iova;
        vfiopy_rb_insert(tree, &page->rb, parent, side);
    }
    page->count++;
}

static void unpin(struct vfiopy_rb_tree *tree, uint64_t iova)
{
    struct vfiopy_rb *parent;
    struct page *page;
    int side;

    page = *find_place(tree, iova, &parent, &side);
    if (!--page->count) {
        vfiopy_rb_erase(tree, &page->rb);
        free(page);
    }
}

static double now(void)
{
    struct timespec time;

    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
    return (double)time.tv_sec * 1e9 + (double)time.tv_nsec;
}

/* ns a page for pinning these pages in this order and unpinning them again, done `rounds` times. */
double page_tree_ns(const uint64_t *iovas, uint64_t count, uint64_t rounds)
{
    struct vfiopy_rb_tree tree = {NULL, keeps_nothing};
    double start = now();

    for (uint64_t round = 0; round < rounds; round++) {
        for (uint64_t i = 0; i < count; i++)
            pin(&tree, iovas[i]);
        for (uint64_t i = 0; i < count; i++)
            unpin(&tree, iovas[i]);
    }
    return (now() - start) / (double)(count * rounds);
}

/* A kernel that agrees to everything and does nothing. */
int no_kernel(int fd, unsigned long request, void *argument)
{
    (void)fd;
    (void)request;
    (void)argument;
    return 0;
}
