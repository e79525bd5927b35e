/* Which IOVAs may be used at all: ranges of the mappers, windows of the user, and the cells that they leave. */
#include "internal.h"

#include <stdlib.h>
#include <string.h>

static const struct vfiopy_range no_window = {1, 0};

static bool is_window(struct vfiopy_range window)
{
    return window.first <= window.last;
}

const struct vfiopy_cell *vfiopy_cell_of(const struct vfiopy_geometry *geometry, uint64_t iova)
{
    size_t low = 0, high = geometry->cell_count;

    while (low < high) {
        size_t middle = low + (high - low) / 2;
        const struct vfiopy_cell *cell = &geometry->cells[middle];

        if (iova < cell->first)
            high = middle;
        else if (iova > cell->last)
            low = middle + 1;
        else
            return cell;
    }
    return NULL;
}

static void add_cell(struct vfiopy_geometry *geometry, uint64_t first, uint64_t last)
{
    struct vfiopy_range window = geometry->transient;

    if (is_window(window) && first < window.first && last >= window.first) {
        add_cell(geometry, first, window.first - 1);
        add_cell(geometry, window.first, last);
    } else if (is_window(window) && first <= window.last && last > window.last) {
        add_cell(geometry, first, window.last);
        add_cell(geometry, window.last + 1, last);
    } else {
        bool transient = is_window(window) && first >= window.first && last <= window.last;

        geometry->cells[geometry->cell_count++] =
            (struct vfiopy_cell){first, last, transient ? VFIOPY_ZONE_TRANSIENT : VFIOPY_ZONE_NORMAL};
    }
}

/* usable, excluded and transient are set and sorted: make the cells. */
static bool make_cells(struct vfiopy_geometry *geometry)
{
    size_t hole = 0;

    /* Each hole adds at most one cell, the window at most two. */
    geometry->cells = calloc(geometry->usable_count + geometry->excluded_count + 2, sizeof(*geometry->cells));
    geometry->cell_count = 0;
    if (!geometry->cells)
        return false;
    for (size_t i = 0; i < geometry->usable_count; i++) {
        uint64_t at = geometry->usable[i].first, last = geometry->usable[i].last;
        bool more = true;

        while (hole < geometry->excluded_count && geometry->excluded[hole].last < at)
            hole++;
        for (size_t next = hole; more && next < geometry->excluded_count; next++) {
            struct vfiopy_range window = geometry->excluded[next];

            if (window.first > last)
                break;
            if (window.first > at)
                add_cell(geometry, at, window.first - 1);
            more = window.last < last;
            at = window.last + 1;
        }
        if (more)
            add_cell(geometry, at, last);
    }
    return true;
}

static void free_geometry(struct vfiopy_geometry *geometry)
{
    free(geometry->usable);
    free(geometry->excluded);
    free(geometry->cells);
}

int vfiopy_fail_outside(const struct vfiopy_geometry *geometry, struct vfiopy_range asked,
                        struct vfiopy_failure *failure)
{
    for (size_t i = 0; i < geometry->excluded_count; i++) {
        if (geometry->excluded[i].first <= asked.last && geometry->excluded[i].last >= asked.first)
            return vfiopy_fail_range(failure, VFIOPY_EXCLUDED, geometry->excluded[i]);
    }
    return vfiopy_fail_range(failure, VFIOPY_OUTSIDE, asked);
}

/* Every mapping must fit into the new geometry. */
static int check_mappings(const struct vfiopy_space *space, const struct vfiopy_geometry *geometry,
                          struct vfiopy_failure *failure)
{
    uint64_t below_page = (geometry->page_sizes & -geometry->page_sizes) - 1;
    struct vfiopy_mapping *mapping = vfiopy_mapping_of((struct vfiopy_interval *)vfiopy_rb_end(&space->by_iova, 0));

    if (geometry->max_mappings && space->mappings > geometry->max_mappings) {
        failure->value = geometry->max_mappings;
        return vfiopy_fail(failure, VFIOPY_TOO_MANY);
    }
    for (; mapping; mapping = vfiopy_mapping_after(mapping)) {
        const struct vfiopy_cell *cell = vfiopy_cell_of(geometry, mapping->iova.first);

        if (!cell || cell->last < mapping->iova.last) {
            struct vfiopy_range range = {mapping->iova.first, mapping->iova.last};

            return vfiopy_fail_at(failure, vfiopy_fail_outside(geometry, range, failure), mapping);
        }
        if ((mapping->iova.first | (mapping->iova.last + 1)) & below_page) {
            failure->value = below_page + 1;
            return vfiopy_fail_at(failure, VFIOPY_BAD_ALIGNMENT, mapping);
        }
    }
    return VFIOPY_OK;
}

/* What is in the cells and not in a mapping is free. The pool was filled before. */
static void make_free(struct vfiopy_space *space)
{
    struct vfiopy_mapping *mapping = vfiopy_mapping_of((struct vfiopy_interval *)vfiopy_rb_end(&space->by_iova, 0));

    vfiopy_free_clear(&space->free);
    for (size_t i = 0; i < space->geometry.cell_count; i++) {
        const struct vfiopy_cell *cell = &space->geometry.cells[i];
        uint64_t at = cell->first;
        bool more = true;

        for (; mapping && mapping->iova.first <= cell->last; mapping = vfiopy_mapping_after(mapping)) {
            if (mapping->iova.first > at)
                vfiopy_free_give(&space->free, cell, at, mapping->iova.first - 1);
            more = mapping->iova.last < cell->last;
            at = mapping->iova.last + 1;
        }
        if (more)
            vfiopy_free_give(&space->free, cell, at, cell->last);
    }
}

/* Take over `wanted` (its arrays too), or free it. With the lock. */
static int change(struct vfiopy_space *space, struct vfiopy_geometry *wanted, struct vfiopy_failure *failure)
{
    int result;

    if (!make_cells(wanted) || !vfiopy_free_reserve(&space->free, space->mappings + wanted->cell_count))
        result = vfiopy_fail(failure, VFIOPY_NO_MEMORY);
    else
        result = check_mappings(space, wanted, failure);
    if (result) {
        free_geometry(wanted);
        return result;
    }
    free_geometry(&space->geometry);
    space->geometry = *wanted;
    make_free(space);
    return VFIOPY_OK;
}

static struct vfiopy_range *copy_ranges(const struct vfiopy_range *ranges, size_t count, size_t room)
{
    struct vfiopy_range *copy = calloc(room ? room : 1, sizeof(*copy));

    if (copy && count)
        memcpy(copy, ranges, count * sizeof(*copy));
    return copy;
}

/* The present geometry with arrays of its own, excluded with room for one more; cells are still to be made. */
static bool copy_geometry(const struct vfiopy_geometry *from, struct vfiopy_geometry *to)
{
    *to = *from;
    to->cells = NULL;
    to->usable = copy_ranges(from->usable, from->usable_count, from->usable_count);
    to->excluded = copy_ranges(from->excluded, from->excluded_count, from->excluded_count + 1);
    if (to->usable && to->excluded)
        return true;
    free_geometry(to);
    return false;
}

int vfiopy_geometry_init(struct vfiopy_space *space, uint64_t page_size)
{
    static const struct vfiopy_range everything = {0, UINT64_MAX};
    struct vfiopy_geometry start = {
        .usable = copy_ranges(&everything, 1, 1),
        .excluded = copy_ranges(NULL, 0, 1),
        .usable_count = 1,
        .transient = no_window,
        .page_sizes = page_size,
    };
    struct vfiopy_failure failure;

    if (!start.usable || !start.excluded) {
        free_geometry(&start);
        return VFIOPY_NO_MEMORY;
    }
    return change(space, &start, &failure);
}

void vfiopy_geometry_destroy(struct vfiopy_space *space)
{
    free_geometry(&space->geometry);
    space->geometry = (struct vfiopy_geometry){0};
}

int vfiopy_space_set_usable(struct vfiopy_space *space, const struct vfiopy_range *ranges, size_t count,
                            uint64_t page_sizes, uint64_t max_mappings, struct vfiopy_failure *failure)
{
    struct vfiopy_geometry wanted;
    int result;

    for (size_t i = 0; i < count; i++) {
        if (ranges[i].first > ranges[i].last || (i && ranges[i].first <= ranges[i - 1].last))
            return vfiopy_fail_range(failure, VFIOPY_BAD_RANGES, ranges[i]);
    }
    if (!page_sizes)
        return vfiopy_fail(failure, VFIOPY_BAD_ALIGNMENT);
    vfiopy_lock(space);
    if (copy_geometry(&space->geometry, &wanted)) {
        free(wanted.usable);
        wanted.usable = copy_ranges(ranges, count, count);
        wanted.usable_count = wanted.usable ? count : 0;
        wanted.page_sizes = page_sizes;
        wanted.max_mappings = max_mappings;
        if (wanted.usable) {
            result = change(space, &wanted, failure);
        } else {
            free_geometry(&wanted);
            result = vfiopy_fail(failure, VFIOPY_NO_MEMORY);
        }
    } else {
        result = vfiopy_fail(failure, VFIOPY_NO_MEMORY);
    }
    vfiopy_unlock(space);
    return result;
}

int vfiopy_space_exclude(struct vfiopy_space *space, struct vfiopy_range window, struct vfiopy_failure *failure)
{
    struct vfiopy_geometry wanted;
    size_t at = 0;
    int result;

    failure->asked = window;
    if (!is_window(window))
        return vfiopy_fail_range(failure, VFIOPY_BAD_RANGES, window);
    vfiopy_lock(space);
    while (at < space->geometry.excluded_count && space->geometry.excluded[at].last < window.first)
        at++;
    if (at < space->geometry.excluded_count && space->geometry.excluded[at].first <= window.last) {
        result = vfiopy_fail_range(failure, VFIOPY_EXCLUDED, space->geometry.excluded[at]);
    } else if (copy_geometry(&space->geometry, &wanted)) {
        memmove(&wanted.excluded[at + 1], &wanted.excluded[at],
                (wanted.excluded_count - at) * sizeof(*wanted.excluded));
        wanted.excluded[at] = window;
        wanted.excluded_count++;
        result = change(space, &wanted, failure);
    } else {
        result = vfiopy_fail(failure, VFIOPY_NO_MEMORY);
    }
    vfiopy_unlock(space);
    return result;
}

int vfiopy_space_include(struct vfiopy_space *space, struct vfiopy_range window, struct vfiopy_failure *failure)
{
    struct vfiopy_geometry wanted;
    int result = VFIOPY_BAD_RANGES;

    failure->asked = window;
    vfiopy_lock(space);
    for (size_t at = 0; at < space->geometry.excluded_count; at++) {
        struct vfiopy_range here = space->geometry.excluded[at];

        if (here.first != window.first || here.last != window.last)
            continue;
        if (!copy_geometry(&space->geometry, &wanted)) {
            result = VFIOPY_NO_MEMORY;
            break;
        }
        wanted.excluded_count--;
        memmove(&wanted.excluded[at], &wanted.excluded[at + 1],
                (wanted.excluded_count - at) * sizeof(*wanted.excluded));
        result = change(space, &wanted, failure);
        break;
    }
    vfiopy_unlock(space);
    return result ? vfiopy_fail_range(failure, result, window) : VFIOPY_OK;
}

int vfiopy_space_set_transient(struct vfiopy_space *space, struct vfiopy_range window,
                               struct vfiopy_failure *failure)
{
    struct vfiopy_geometry wanted;
    int result;

    failure->asked = window;
    vfiopy_lock(space);
    if (copy_geometry(&space->geometry, &wanted)) {
        wanted.transient = is_window(window) ? window : no_window;
        result = change(space, &wanted, failure);
    } else {
        result = vfiopy_fail(failure, VFIOPY_NO_MEMORY);
    }
    vfiopy_unlock(space);
    return result;
}

struct vfiopy_range *vfiopy_space_ranges(struct vfiopy_space *space, enum vfiopy_ranges_of which, size_t *count)
{
    const struct vfiopy_geometry *geometry = &space->geometry;
    struct vfiopy_range *copy = NULL;

    vfiopy_lock(space);
    switch (which) {
    case VFIOPY_USABLE:
        *count = geometry->usable_count;
        copy = copy_ranges(geometry->usable, *count, *count);
        break;
    case VFIOPY_EXCLUDED_WINDOWS:
        *count = geometry->excluded_count;
        copy = copy_ranges(geometry->excluded, *count, *count);
        break;
    case VFIOPY_TRANSIENT_WINDOW:
        *count = is_window(geometry->transient);
        copy = copy_ranges(&geometry->transient, *count, *count);
        break;
    case VFIOPY_FREE:
        vfiopy_free_settle(&space->free);
        *count = space->free.pool.used;
        copy = copy_ranges(NULL, 0, *count);
        if (copy) {
            const struct vfiopy_interval *range = (struct vfiopy_interval *)vfiopy_rb_end(&space->free.by_iova, 0);

            for (size_t i = 0; range; range = vfiopy_interval_step(range, 1))
                copy[i++] = (struct vfiopy_range){range->first, range->last};
        }
        break;
    }
    if (!copy)
        *count = SIZE_MAX;
    vfiopy_unlock(space);
    return copy;
}
