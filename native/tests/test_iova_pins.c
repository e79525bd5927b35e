/* Chunks of pins against arrays of counts: every form and every change of form, and the sums that go with them. */
#include <stdbool.h>
#include <string.h>

#include "check.h"
#include "iova/pin_pages.h"
#include "iova/space.h"
#include "random.h"

enum { PAGES = 3 * VFIOPY_CHUNK_PAGES + 100 };

struct world {
    struct vfiopy_pin_pages pages;
    struct vfiopy_pin_sums sums;
    uint64_t page_count;
    uint32_t counts[PAGES];
    uint64_t pfns[PAGES];
};

static void verify(const struct world *world)
{
    uint64_t pins = 0, pinned = 0, bytes = 0, expected_pins = 0, expected_pinned = 0;
    const char *wrong = vfiopy_pages_verify(&world->pages, world->page_count, &pins, &pinned, &bytes);

    if (wrong)
        fprintf(stderr, "%s\n", wrong);
    CHECK(!wrong);
    for (uint64_t page = 0; page < world->page_count; page++) {
        uint64_t pfn;

        expected_pins += world->counts[page];
        expected_pinned += world->counts[page] != 0;
        CHECK_EQUAL(vfiopy_pages_count(&world->pages, page), world->counts[page]);
        vfiopy_pages_pfns(&world->pages, page, page, &pfn);
        CHECK_EQUAL(pfn, world->pfns[page]);
    }
    CHECK_EQUAL(pins, expected_pins);
    CHECK_EQUAL(pinned, expected_pinned);
    CHECK_EQUAL(world->sums.pages, expected_pinned);
    CHECK_EQUAL(world->sums.bytes, bytes);
}

static void add(struct world *world, uint64_t first, uint64_t last)
{
    uint64_t bad = UINT64_MAX;

    CHECK_EQUAL(vfiopy_pages_add(&world->pages, first, last, &bad, &world->sums), VFIOPY_OK);
    for (uint64_t page = first; page <= last; page++)
        world->counts[page]++;
}

static void take(struct world *world, uint64_t first, uint64_t last)
{
    uint64_t bad = UINT64_MAX, expected = UINT64_MAX;
    int result = vfiopy_pages_prepare_remove(&world->pages, first, last, &bad, &world->sums);

    for (uint64_t page = last + 1; page-- > first;) {
        if (!world->counts[page])
            expected = page;
    }
    CHECK_EQUAL(result, expected == UINT64_MAX ? VFIOPY_OK : VFIOPY_NOT_PINNED);
    if (result) {
        CHECK(bad >= first && bad <= last && !world->counts[bad]);
        return;
    }
    vfiopy_pages_remove(&world->pages, first, last, &world->sums);
    for (uint64_t page = first; page <= last; page++) {
        if (!--world->counts[page])
            world->pfns[page] = 0;
    }
}

static void name_pfns(struct world *world, uint64_t first, uint64_t last, uint64_t *seed)
{
    uint64_t pfns[PAGES];

    for (uint64_t page = first; page <= last; page++) {
        pfns[page - first] = random_below(seed, 4) ? random_below(seed, VFIOPY_MAX_PFN) + 1 : 0;
        if (world->counts[page] && pfns[page - first])
            world->pfns[page] = pfns[page - first];
    }
    vfiopy_pages_set_pfns(&world->pages, first, last, pfns, &world->sums);
}

/* The runs that a walk finds are the runs that there are. */
static void walk(const struct world *world)
{
    struct vfiopy_range run;
    uint64_t at = 0;

    while (at < world->page_count && vfiopy_pages_next_run(&world->pages, at, world->page_count - 1, &run)) {
        for (; at < run.first; at++)
            CHECK(!world->counts[at]);
        for (; at <= run.last; at++)
            CHECK(world->counts[at]);
        CHECK(at == world->page_count || !world->counts[at]);
    }
    for (; at < world->page_count; at++)
        CHECK(!world->counts[at]);
}

static void random_walk(uint64_t page_count, uint64_t seed, bool with_pfns, unsigned longest)
{
    struct world *world = calloc(1, sizeof(*world));

    CHECK(world);
    world->page_count = page_count;
    vfiopy_pages_init(&world->pages, page_count);
    for (int round = 0; round < 4000; round++) {
        uint64_t first = random_below(&seed, page_count);
        uint64_t last = first + random_below(&seed, random_below(&seed, longest) + 1);

        /* Often whole chunks, so that uniform ones come and go. */
        if (random_below(&seed, 4) == 0) {
            first -= first % VFIOPY_CHUNK_PAGES;
            last = first + VFIOPY_CHUNK_PAGES - 1;
        }
        if (last >= page_count)
            last = page_count - 1;
        /* Phases of growth and of decay. */
        if (random_below(&seed, 10) < (unsigned)(round / 500 % 2 ? 3 : 6))
            add(world, first, last);
        else
            take(world, first, last);
        if (with_pfns && random_below(&seed, 3) == 0)
            name_pfns(world, first, last, &seed);
        if (round % 40 == 0) {
            verify(world);
            walk(world);
        }
    }
    for (uint64_t page = 0; page < page_count; page++) {
        while (world->counts[page])
            take(world, page, page);
    }
    verify(world);
    CHECK_EQUAL(world->sums.pages, 0);
    CHECK(!world->pages.only);
    vfiopy_pages_free(&world->pages, &world->sums);
    CHECK_EQUAL(world->sums.bytes, 0);
    free(world);
}

static void random_walks(void)
{
    for (uint64_t seed = 1; seed <= 4; seed++) {
        random_walk(1, seed, seed & 1, 1);
        random_walk(4, seed, seed & 1, 3); /* small runs and windows come and go all the time */
        random_walk(VFIOPY_CHUNK_PAGES, seed, seed & 1, 600);
        random_walk(PAGES, seed, seed & 1, 40);
        random_walk(PAGES, seed, seed & 1, 1200);
    }
}

/* The most pins of one page, in every form; and what fails leaves no trace. */
static void overflow(void)
{
    static const struct vfiopy_range spans[] = {{0, 0}, {0, 511}, {10, 600}};

    for (size_t i = 0; i < sizeof(spans) / sizeof(*spans); i++) {
        struct vfiopy_range span = spans[i];
        struct vfiopy_pin_pages pages;
        struct vfiopy_pin_sums sums = {0};
        uint64_t bad = 0;

        vfiopy_pages_init(&pages, PAGES);
        if (i == 2) { /* a window: a second count inside */
            CHECK_EQUAL(vfiopy_pages_add(&pages, 20, 30, &bad, &sums), VFIOPY_OK);
            CHECK_EQUAL(vfiopy_pages_add(&pages, span.first, span.last, &bad, &sums), VFIOPY_OK);
            CHECK_EQUAL(vfiopy_pages_prepare_remove(&pages, 20, 30, &bad, &sums), VFIOPY_OK);
            vfiopy_pages_remove(&pages, 20, 30, &sums);
        }
        for (uint32_t n = i == 2; n < (i == 2 ? 70000 : VFIOPY_MAX_PINS); n++)
            CHECK_EQUAL(vfiopy_pages_add(&pages, span.first, span.last, &bad, &sums), VFIOPY_OK);
        if (i == 2) { /* only page 25 to the top: a run of one would be quick, a window is not */
            for (uint32_t n = 70000; n < VFIOPY_MAX_PINS; n++)
                CHECK_EQUAL(vfiopy_pages_add(&pages, 25, 25, &bad, &sums), VFIOPY_OK);
            span.first = 25;
        }
        CHECK_EQUAL(vfiopy_pages_count(&pages, span.first), VFIOPY_MAX_PINS);
        bad = UINT64_MAX;
        CHECK_EQUAL(vfiopy_pages_add(&pages, 0, PAGES - 1, &bad, &sums), VFIOPY_TOO_MANY_PINS);
        CHECK(bad >= span.first && bad <= span.last);
        CHECK_EQUAL(vfiopy_pages_count(&pages, span.first), VFIOPY_MAX_PINS);
        CHECK_EQUAL(vfiopy_pages_count(&pages, PAGES - 1), 0);
        vfiopy_pages_free(&pages, &sums);
    }
}

/* 10 bytes a pinned page where pins are dense, 64 where they are random: with and without pfns. */
static void memory(void)
{
    enum { MANY = 262144 };
    static const uint32_t few[] = {1000, 5000, 20000, 100000};
    uint64_t seed = 7, bad;

    for (int pfns = 0; pfns < 2; pfns++) {
        for (uint64_t offset = 0; offset < 3; offset++) {
            uint64_t lengths[] = {512, 4096, MANY};

            for (size_t i = 0; i < 3; i++) {
                struct vfiopy_pin_pages pages;
                struct vfiopy_pin_sums sums = {0};
                uint64_t first = offset * 100, last = first + lengths[i] - 1;
                uint64_t *names = malloc(lengths[i] * sizeof(*names));

                vfiopy_pages_init(&pages, MANY + 1000);
                CHECK_EQUAL(vfiopy_pages_add(&pages, first, last, &bad, &sums), VFIOPY_OK);
                for (uint64_t page = 0; page < lengths[i]; page++)
                    names[page] = page + 1;
                if (pfns)
                    vfiopy_pages_set_pfns(&pages, first, last, names, &sums);
                CHECK(sums.bytes <= 10 * lengths[i]);
                vfiopy_pages_free(&pages, &sums);
                free(names);
            }
        }
        for (size_t i = 0; i < 4; i++) {
            struct vfiopy_pin_pages pages;
            struct vfiopy_pin_sums sums = {0};
            uint64_t pfn;

            vfiopy_pages_init(&pages, MANY);
            for (uint32_t n = 0; n < few[i]; n++) {
                uint64_t page = random_below(&seed, MANY);

                CHECK_EQUAL(vfiopy_pages_add(&pages, page, page, &bad, &sums), VFIOPY_OK);
                pfn = page + 1;
                if (pfns)
                    vfiopy_pages_set_pfns(&pages, page, page, &pfn, &sums);
            }
            printf("    %6llu random pages of %d, %s pfn: %.1f bytes a page\n", (unsigned long long)sums.pages, MANY,
                   pfns ? "with" : "without", (double)sums.bytes / (double)sums.pages);
            CHECK(sums.bytes <= 64 * sums.pages);
            vfiopy_pages_free(&pages, &sums);
        }
    }
}

/* IOMMU pages of half a CPU page: two mappings share each page of the answer, and it has one word for both. */
static void shared_page(bool one_frame, bool first_half_only)
{
    enum { PAGE = 4096, HALF = PAGE / 2, MAPPINGS = 6 };
    const struct vfiopy_range usable = {0, UINT32_MAX};
    const struct vfiopy_range all = {0x10000, 0x10000 + MAPPINGS * HALF - 1};
    struct vfiopy_space *space = vfiopy_space_create(PAGE, NULL);
    struct vfiopy_failure failure = {0};
    struct vfiopy_gone gone = {0};
    uint64_t iova, *pfns;
    size_t count;
    void *memory;

    CHECK_EQUAL(vfiopy_space_set_usable(space, &usable, 1, HALF, 0, &failure), VFIOPY_OK);
    for (uint64_t i = 0; i < MAPPINGS; i++) {
        struct vfiopy_request request = {
            .iova = all.first + i * HALF,
            .size = HALF,
            .limit = UINT64_MAX,
            .fd = -1,
            .physical = UINT64_C(0x80000000) + i * (one_frame ? HALF : PAGE),
            .prot = VFIOPY_PROT_ALL,
            .kind = VFIOPY_MMIO,
        };

        if (first_half_only && i % 2)
            request.physical = 0;
        CHECK_EQUAL(vfiopy_space_map(space, &request, &iova, NULL, &failure), VFIOPY_OK);
    }
    CHECK_EQUAL(vfiopy_space_pin(space, all, VFIOPY_PROT_READ, 0, true, &failure), VFIOPY_OK);
    count = vfiopy_space_page_count(space, all);
    CHECK_EQUAL(count, MAPPINGS / 2);
    pfns = malloc(count * sizeof(*pfns)); /* not a word more: a write past it is found */
    for (int again = 0; again < 2; again++) { /* the second time from what the book keeps */
        CHECK_EQUAL(vfiopy_space_pfns(space, all, -1, pfns, &failure), VFIOPY_OK);
        for (size_t page = 0; page < count; page++)
            CHECK_EQUAL(pfns[page], one_frame && !first_half_only ? 0x80000 + page : 0);
    }
    free(pfns);
    CHECK(!vfiopy_space_verify(space));
    vfiopy_space_forget(space, &gone, &gone);
    while (vfiopy_gone_pop(&gone, &memory))
        ;
    vfiopy_space_destroy(space);
}

static void shared_pages(void)
{
    shared_page(true, false);
    shared_page(false, false);
    shared_page(true, true);
}

int main(void)
{
    RUN(shared_pages);
    RUN(random_walks);
    RUN(overflow);
    RUN(memory);
    return 0;
}
