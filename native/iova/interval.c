#include "interval.h"

#include <assert.h>

static_assert(offsetof(struct vfiopy_interval, rb) == 0, "casts below and in the header need it");

static uint64_t largest_last(const struct vfiopy_interval *interval)
{
    uint64_t largest = interval->last;

    for (int side = 0; side < 2; side++) {
        const struct vfiopy_interval *kid = (const struct vfiopy_interval *)interval->rb.kid[side];

        if (kid && kid->max_last > largest)
            largest = kid->max_last;
    }
    return largest;
}

bool vfiopy_interval_refresh(struct vfiopy_rb *node)
{
    struct vfiopy_interval *interval = (struct vfiopy_interval *)node;
    uint64_t before = interval->max_last;

    interval->max_last = largest_last(interval);
    return interval->max_last != before;
}

void vfiopy_interval_insert(struct vfiopy_rb_tree *tree, struct vfiopy_interval *interval)
{
    struct vfiopy_rb *parent = NULL, *node = tree->top;
    int side = 0;

    while (node) {
        parent = node;
        side = interval->first >= ((struct vfiopy_interval *)node)->first;
        node = node->kid[side];
    }
    vfiopy_rb_insert(tree, &interval->rb, parent, side);
}

/* The lowest interval below `node` that ends at `first` or later; there is one. */
static struct vfiopy_interval *lowest_reaching(struct vfiopy_rb *node, uint64_t first)
{
    for (;;) {
        struct vfiopy_interval *interval = (struct vfiopy_interval *)node;
        struct vfiopy_interval *lower = (struct vfiopy_interval *)node->kid[0];

        if (lower && lower->max_last >= first)
            node = &lower->rb;
        else if (interval->last >= first)
            return interval;
        else
            node = node->kid[1];
    }
}

struct vfiopy_interval *vfiopy_interval_overlap(const struct vfiopy_rb_tree *tree, uint64_t first, uint64_t last)
{
    struct vfiopy_interval *interval = (struct vfiopy_interval *)tree->top;

    if (!interval || interval->max_last < first)
        return NULL;
    interval = lowest_reaching(&interval->rb, first);
    return interval->first <= last ? interval : NULL;
}

struct vfiopy_interval *vfiopy_interval_next_overlap(const struct vfiopy_interval *interval, uint64_t first,
                                                     uint64_t last)
{
    const struct vfiopy_rb *node = &interval->rb;
    struct vfiopy_interval *next = (struct vfiopy_interval *)node->kid[1];

    if (next && next->max_last >= first) {
        next = lowest_reaching(&next->rb, first);
        return next->first <= last ? next : NULL;
    }
    for (const struct vfiopy_rb *up = vfiopy_rb_parent(node); up; node = up, up = vfiopy_rb_parent(up)) {
        if (node == up->kid[1])
            continue;
        next = (struct vfiopy_interval *)up;
        if (next->last < first) {
            next = (struct vfiopy_interval *)up->kid[1];
            if (!next || next->max_last < first)
                continue;
            next = lowest_reaching(&next->rb, first);
        }
        return next->first <= last ? next : NULL;
    }
    return NULL;
}

const char *vfiopy_interval_verify(const struct vfiopy_rb_tree *tree, bool disjoint, unsigned *height, size_t *count)
{
    const struct vfiopy_interval *interval, *before = NULL;
    const char *wrong = vfiopy_rb_verify(tree, height, count);

    if (wrong)
        return wrong;
    for (interval = (struct vfiopy_interval *)vfiopy_rb_end(tree, 0); interval;
         before = interval, interval = vfiopy_interval_step(interval, 1)) {
        if (interval->first > interval->last)
            return "an interval ends before it begins";
        if (!disjoint && interval->max_last != largest_last(interval))
            return "a node's largest end is wrong";
        if (before && (before->first > interval->first || (disjoint && before->last >= interval->first)))
            return disjoint ? "intervals are out of order or overlap" : "intervals are out of order";
    }
    return NULL;
}
