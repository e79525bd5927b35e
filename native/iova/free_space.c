#include "free_space.h"

#define TIGHT_FITS 32 /* ranges tried for an exact best fit before one with slack is taken */

static struct vfiopy_free *sized(const struct vfiopy_rb *node)
{
    return node ? VFIOPY_ENTRY(node, struct vfiopy_free, by_size) : NULL;
}

static uint64_t lowest_first(const struct vfiopy_free *range)
{
    uint64_t lowest = range->first;

    for (int side = 0; side < 2; side++) {
        const struct vfiopy_free *kid = sized(range->by_size.kid[side]);

        if (kid && kid->lowest < lowest)
            lowest = kid->lowest;
    }
    return lowest;
}

static bool refresh_lowest(struct vfiopy_rb *node)
{
    struct vfiopy_free *range = sized(node);
    uint64_t before = range->lowest;

    range->lowest = lowest_first(range);
    return range->lowest != before;
}

static bool smaller(const struct vfiopy_free *a, const struct vfiopy_free *b)
{
    return a->span != b->span ? a->span < b->span : a->first < b->first;
}

static void insert_by_size(struct vfiopy_free_space *space, struct vfiopy_free *range)
{
    struct vfiopy_rb_tree *tree = &space->by_size[range->zone];
    struct vfiopy_rb *parent = NULL, *node = tree->top;
    int side = 0;

    while (node) {
        parent = node;
        side = !smaller(range, sized(node));
        node = node->kid[side];
    }
    range->lowest = range->first;
    vfiopy_rb_insert(tree, &range->by_size, parent, side);
}

static void set_bounds(struct vfiopy_free_space *space, struct vfiopy_free *range, uint64_t first, uint64_t last)
{
    space->spans += (last - first) - range->span;
    range->where.first = range->first = first;
    range->where.last = last;
    range->span = last - first;
}

/* Grow or shrink a range where it stands: it stays in the same gap between its neighbours. */
static void resize(struct vfiopy_free_space *space, struct vfiopy_free *range, uint64_t first, uint64_t last)
{
    struct vfiopy_rb_tree *tree = &space->by_size[range->zone];
    int side = last - first > range->span; /* only the next one in that direction can be passed */
    struct vfiopy_free *next = sized(vfiopy_rb_step(&range->by_size, side));
    bool moved = first != range->first;

    set_bounds(space, range, first, last);
    if (!next || (side ? smaller(range, next) : smaller(next, range))) {
        if (moved)
            vfiopy_rb_touch(tree, &range->by_size);
    } else {
        vfiopy_rb_erase(tree, &range->by_size);
        insert_by_size(space, range);
    }
}

static void add(struct vfiopy_free_space *space, uint8_t zone, uint64_t first, uint64_t last)
{
    struct vfiopy_free *range = vfiopy_pool_take(&space->pool);

    range->span = 0;
    range->zone = zone;
    set_bounds(space, range, first, last);
    vfiopy_interval_insert(&space->by_iova, &range->where);
    insert_by_size(space, range);
}

static void drop(struct vfiopy_free_space *space, struct vfiopy_free *range)
{
    space->spans -= range->span;
    vfiopy_rb_erase(&space->by_iova, &range->where.rb);
    vfiopy_rb_erase(&space->by_size[range->zone], &range->by_size);
    vfiopy_pool_give(&space->pool, range);
}

void vfiopy_free_init(struct vfiopy_free_space *space)
{
    *space = (struct vfiopy_free_space){.by_iova = VFIOPY_DISJOINT_TREE};
    for (int zone = 0; zone < VFIOPY_ZONES; zone++)
        space->by_size[zone].refresh = refresh_lowest;
    vfiopy_pool_init(&space->pool, sizeof(struct vfiopy_free));
}

/* The pool keeps what it has: whoever clears has reserved for what comes next. */
void vfiopy_free_clear(struct vfiopy_free_space *space)
{
    struct vfiopy_rb *node = space->by_iova.top;

    while (node) { /* leaf by leaf */
        struct vfiopy_rb *parent = vfiopy_rb_parent(node);

        if (node->kid[0] || node->kid[1]) {
            node = node->kid[!node->kid[0]];
            continue;
        }
        if (parent)
            parent->kid[parent->kid[1] == node] = NULL;
        vfiopy_pool_give(&space->pool, node);
        node = parent;
    }
    space->by_iova.top = NULL;
    space->has_last = false;
    for (int zone = 0; zone < VFIOPY_ZONES; zone++)
        space->by_size[zone].top = NULL;
    space->spans = 0;
}

void vfiopy_free_destroy(struct vfiopy_free_space *space)
{
    vfiopy_pool_destroy(&space->pool);
}

struct vfiopy_free *vfiopy_free_holding(struct vfiopy_free_space *space, uint64_t first, uint64_t last)
{
    struct vfiopy_interval *where;

    vfiopy_free_settle(space);
    where = vfiopy_interval_at(&space->by_iova, first);
    return where && where->last >= last ? (struct vfiopy_free *)where : NULL;
}

/* The smallest range below `node`, by size, that begins at `highest` or lower; there is one. */
static struct vfiopy_free *smallest_low(struct vfiopy_rb *node, uint64_t highest)
{
    for (;;) {
        struct vfiopy_free *range = sized(node), *less = sized(node->kid[0]);

        if (less && less->lowest <= highest)
            node = node->kid[0];
        else if (range->first <= highest)
            return range;
        else
            node = node->kid[1];
    }
}

static bool has_low(struct vfiopy_rb *node, uint64_t highest)
{
    return node && sized(node)->lowest <= highest;
}

/* The smallest range of at least `span` that begins at `highest` or lower, or NULL. */
static struct vfiopy_free *first_fit(const struct vfiopy_rb_tree *tree, uint64_t span, uint64_t highest)
{
    struct vfiopy_rb *node = tree->top, *best = NULL;

    while (node) {
        if (sized(node)->span < span) {
            node = node->kid[1];
        } else {
            if (sized(node)->first <= highest || has_low(node->kid[1], highest))
                best = node; /* later ones are smaller, and come first */
            node = node->kid[0];
        }
    }
    if (!best)
        return NULL;
    return sized(best)->first <= highest ? sized(best) : smallest_low(best->kid[1], highest);
}

static struct vfiopy_free *next_fit(struct vfiopy_free *range, uint64_t highest)
{
    struct vfiopy_rb *node = &range->by_size, *up;

    if (has_low(node->kid[1], highest))
        return smallest_low(node->kid[1], highest);
    for (up = vfiopy_rb_parent(node); up; node = up, up = vfiopy_rb_parent(up)) {
        if (node == up->kid[1])
            continue;
        if (sized(up)->first <= highest)
            return sized(up);
        if (has_low(up->kid[1], highest))
            return smallest_low(up->kid[1], highest);
    }
    return NULL;
}

static bool fits(const struct vfiopy_free *range, const struct vfiopy_wish *wish, uint64_t *iova)
{
    uint64_t first = range->first ? range->first : 1; /* devices take IOVA 0 for "none" */
    uint64_t at = first + ((wish->offset - first) & (wish->modulus - 1)), last = range->first + range->span;

    if (at < first || at > last || last - at < wish->span || at > wish->limit - wish->span)
        return false;
    *iova = at;
    return true;
}

struct vfiopy_free *vfiopy_free_find(struct vfiopy_free_space *space, const struct vfiopy_wish *wish,
                                     uint64_t *iova)
{
    const struct vfiopy_rb_tree *tree = &space->by_size[wish->zone];
    uint64_t highest, slack = wish->modulus - 1;
    struct vfiopy_free *range;
    unsigned tried = 0;

    if (wish->span > wish->limit)
        return NULL;
    if (space->has_last) {
        if (space->last.span == wish->span && space->last.zone == wish->zone && fits(&space->last, wish, iova))
            return &space->last;
        vfiopy_free_settle(space);
    }
    highest = wish->limit - wish->span;
    for (range = first_fit(tree, wish->span, highest); range && tried < TIGHT_FITS;
         range = next_fit(range, highest), tried++) {
        if (fits(range, wish, iova))
            return range;
    }
    if (!range)
        return NULL;
    /* Many small ranges, all misaligned: one with slack for any alignment is found without trying. */
    if (slack <= highest && wish->span + slack >= slack) {
        struct vfiopy_free *roomy = first_fit(tree, wish->span + slack, highest - slack);

        while (roomy && !fits(roomy, wish, iova)) /* only the range at IOVA 0 can fail here */
            roomy = next_fit(roomy, highest - slack);
        if (roomy)
            return roomy;
    }
    for (; wish->thorough && range; range = next_fit(range, highest)) {
        if (fits(range, wish, iova))
            return range;
    }
    return NULL;
}

void vfiopy_free_take(struct vfiopy_free_space *space, struct vfiopy_free *from, uint64_t first, uint64_t last)
{
    uint64_t begin = from->where.first, end = from->where.last;

    if (from == &space->last) {
        space->has_last = false;
        space->spans -= from->span;
    } else if (begin == first && end == last) {
        drop(space, from);
    } else if (begin == first) {
        resize(space, from, last + 1, end);
    } else {
        resize(space, from, begin, first - 1);
        if (end != last)
            add(space, from->zone, last + 1, end);
    }
}

static void put(struct vfiopy_free_space *space, const struct vfiopy_cell *cell, uint64_t first, uint64_t last)
{
    struct vfiopy_interval *before, *after;
    struct vfiopy_free *below, *above;

    vfiopy_interval_around(&space->by_iova, first, &before, &after);
    below = before && first > cell->first && before->last == first - 1 ? (struct vfiopy_free *)before : NULL;
    above = after && last < cell->last && after->first == last + 1 ? (struct vfiopy_free *)after : NULL;
    if (below && above) {
        uint64_t end = above->where.last;

        drop(space, above);
        resize(space, below, below->where.first, end);
    } else if (below) {
        resize(space, below, below->where.first, last);
    } else if (above) {
        resize(space, above, first, above->where.last);
    } else {
        add(space, cell->zone, first, last);
    }
}

void vfiopy_free_settle(struct vfiopy_free_space *space)
{
    if (!space->has_last)
        return;
    space->has_last = false;
    space->spans -= space->last.span;
    put(space, &space->last_cell, space->last.where.first, space->last.where.last);
}

void vfiopy_free_give(struct vfiopy_free_space *space, const struct vfiopy_cell *cell, uint64_t first, uint64_t last)
{
    vfiopy_free_settle(space);
    space->last.where.first = space->last.first = first;
    space->last.where.last = last;
    space->last.span = last - first;
    space->last.zone = cell->zone;
    space->last_cell = *cell;
    space->has_last = true;
    space->spans += last - first;
}

uint64_t vfiopy_free_largest_span(struct vfiopy_free_space *space)
{
    uint64_t largest = 0;

    vfiopy_free_settle(space);
    for (int zone = 0; zone < VFIOPY_ZONES; zone++) {
        const struct vfiopy_free *range = sized(vfiopy_rb_end(&space->by_size[zone], 1));

        if (range && range->span > largest)
            largest = range->span;
    }
    return largest;
}

const char *vfiopy_free_verify(const struct vfiopy_free_space *space)
{
    size_t by_iova, by_size = 0;
    const char *wrong = vfiopy_interval_verify(&space->by_iova, true, NULL, &by_iova);
    uint64_t spans = 0;

    if (wrong)
        return wrong;
    for (int zone = 0; zone < VFIOPY_ZONES; zone++) {
        const struct vfiopy_free *range, *before = NULL;
        size_t count;

        wrong = vfiopy_rb_verify(&space->by_size[zone], NULL, &count);
        if (wrong)
            return wrong;
        by_size += count;
        for (range = sized(vfiopy_rb_end(&space->by_size[zone], 0)); range;
             before = range, range = sized(vfiopy_rb_step(&range->by_size, 1))) {
            if (range->zone != zone)
                return "a free range is in the wrong zone";
            if (range->first != range->where.first || range->span != range->where.last - range->where.first)
                return "a free range is not of the size that it is listed by";
            if (before && !smaller(before, range))
                return "free ranges are not in the order of their sizes";
            if (range->lowest != lowest_first(range))
                return "a free range's lowest start is wrong";
            spans += range->span;
        }
    }
    if (by_iova != space->pool.used || by_size != by_iova || by_iova > space->pool.capacity)
        return "the number of free ranges is wrong";
    return spans == space->spans ? NULL : "the sum of free ranges is wrong";
}
