/* The interval tree against an array: random inserts, erases and searches, with the debug walk in between. */
#include <stdbool.h>

#include "check.h"
#include "iova/interval.h"
#include "random.h"

enum { MOST = 300, ROUNDS = 20000 };

static struct vfiopy_interval pool[MOST];
static bool used[MOST];

static int lowest_overlap(uint64_t first, uint64_t last, uint64_t after_first, int after)
{
    int best = -1;

    for (int i = 0; i < MOST; i++) {
        if (!used[i] || pool[i].first > last || pool[i].last < first)
            continue;
        if (after >= 0 && (pool[i].first < after_first || i == after))
            continue;
        if (best < 0 || pool[i].first < pool[best].first)
            best = i;
    }
    return best;
}

static struct vfiopy_interval *next_of(bool disjoint, struct vfiopy_interval *found, uint64_t first, uint64_t last)
{
    if (!disjoint)
        return vfiopy_interval_next_overlap(found, first, last);
    found = vfiopy_interval_step(found, 1);
    return found && found->first <= last ? found : NULL;
}

static void search(const struct vfiopy_rb_tree *tree, bool disjoint, uint64_t first, uint64_t last)
{
    struct vfiopy_interval *found = disjoint ? vfiopy_interval_in(tree, first, last)
                                             : vfiopy_interval_overlap(tree, first, last);
    int expected = lowest_overlap(first, last, 0, -1);
    size_t listed = 0, there = 0;
    uint64_t before = 0;

    CHECK_EQUAL(found != NULL, expected >= 0);
    if (found)
        CHECK_EQUAL(found->first, pool[expected].first);
    for (; found; found = next_of(disjoint, found, first, last)) {
        CHECK(found->first <= last && found->last >= first && found->first >= before);
        before = found->first;
        listed++;
    }
    for (int i = 0; i < MOST; i++)
        there += used[i] && pool[i].first <= last && pool[i].last >= first;
    CHECK_EQUAL(listed, there);
}

static void run(bool disjoint, uint64_t seed)
{
    struct vfiopy_rb_tree interval_tree = VFIOPY_INTERVAL_TREE, disjoint_tree = VFIOPY_DISJOINT_TREE;
    struct vfiopy_rb_tree tree = disjoint ? disjoint_tree : interval_tree;
    unsigned height = 0, tallest = 0;
    size_t count = 0, expected = 0;

    for (int i = 0; i < MOST; i++)
        used[i] = false;
    for (int round = 0; round < ROUNDS; round++) {
        int i = (int)random_below(&seed, MOST);

        if (used[i]) {
            vfiopy_rb_erase(&tree, &pool[i].rb);
            used[i] = false;
            expected--;
        } else {
            /* Also at both ends of the 64-bit space. */
            struct vfiopy_interval *below = NULL, *above;
            uint64_t first = random_below(&seed, 4000) * 16, length = random_below(&seed, 200);

            pool[i].first = random_below(&seed, 8) ? first : UINT64_MAX - first - length;
            pool[i].last = pool[i].first + length;
            if (disjoint && vfiopy_interval_in(&tree, pool[i].first, pool[i].last))
                continue;
            if (disjoint)
                vfiopy_interval_around(&tree, pool[i].first, &below, &above);
            if (below && round % 2)
                vfiopy_interval_insert_above(&tree, below, &pool[i]);
            else
                vfiopy_interval_insert(&tree, &pool[i]);
            used[i] = true;
            expected++;
        }
        if (round % 16 == 0) {
            const char *wrong = vfiopy_interval_verify(&tree, disjoint, &height, &count);
            uint64_t first = random_below(&seed, 64000);

            if (wrong)
                fprintf(stderr, "%s\n", wrong);
            CHECK(!wrong);
            CHECK_EQUAL(count, expected);
            tallest = height > tallest ? height : tallest;
            search(&tree, disjoint, first, first + random_below(&seed, 500));
            search(&tree, disjoint, UINT64_MAX - first, UINT64_MAX);
            search(&tree, disjoint, 0, UINT64_MAX);
        }
    }
    CHECK(tallest <= 2 * 9); /* 2 log2(n + 1) */
    printf("%s: up to %d intervals, height at most %u\n", disjoint ? "disjoint" : "overlapping", MOST, tallest);
}

int main(void)
{
    run(true, 1);
    run(false, 2);
    return 0;
}
