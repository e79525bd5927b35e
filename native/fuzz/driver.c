/*
 * A small coverage-guided fuzzer for compilers without libFuzzer (gcc's -fsanitize-coverage=trace-pc is enough):
 *
 *   fuzz_iova SECONDS CORPUS     mutate what is in the folder CORPUS, keep there what reaches new code
 *   fuzz_iova FILE...            run these inputs once
 *
 * An input that makes the target abort is written to CORPUS/crash; the exit status is not 0 then.
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "../tests/random.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { EDGES = 1 << 16, LONGEST = 512, MOST = 4096 };

struct input {
    uint8_t data[LONGEST];
    size_t size;
};

static uint8_t hits[EDGES], seen[EDGES]; /* seen: a bit for each order of magnitude of hits */
static uintptr_t before;
static struct input *corpus, now;
static size_t corpus_count;
static char crash_path[4096];
static bool running;

void __sanitizer_cov_trace_pc(void);

__attribute__((no_sanitize("address", "undefined"))) void __sanitizer_cov_trace_pc(void)
{
    uintptr_t here = (uintptr_t)__builtin_return_address(0);
    uint8_t *hit = &hits[(here ^ before) & (EDGES - 1)];

    *hit += *hit != UINT8_MAX;
    before = here >> 1;
}

/* 1, 2, 3, 4 and more, 8 and more, ... hits: a bit each. */
static uint8_t magnitude(uint8_t count)
{
    uint8_t bit = count < 4 ? (uint8_t)(1 << count >> 1) : 8;

    for (unsigned more = 8; more <= count && bit < 128; more *= 2)
        bit = (uint8_t)(bit << 1);
    return bit;
}

/* Run it; did it reach what nothing before it reached? */
static int run(const struct input *input)
{
    int fresh = 0;

    memset(hits, 0, sizeof(hits));
    before = 0;
    running = true;
    LLVMFuzzerTestOneInput(input->data, input->size);
    running = false;
    for (int edge = 0; edge < EDGES; edge++) {
        uint8_t how = hits[edge] ? magnitude(hits[edge]) : 0;

        fresh |= how & ~seen[edge];
        seen[edge] |= how;
    }
    return fresh;
}

static void write_input(const char *path, const struct input *input)
{
    int file = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);

    if (file < 0 || write(file, input->data, input->size) != (ssize_t)input->size)
        perror(path);
    close(file);
}

/* A CHECK exits, a sanitizer aborts. */
static void on_exit_in_a_run(void)
{
    if (!running)
        return;
    write_input(crash_path, &now);
    fprintf(stderr, "the input is in %s\n", crash_path);
}

static void on_signal(int number)
{
    signal(number, SIG_DFL);
    on_exit_in_a_run();
    raise(number);
}

static int load(const char *path, struct input *input)
{
    int file = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t size = file < 0 ? -1 : read(file, input->data, LONGEST);

    if (file >= 0)
        close(file);
    input->size = size < 0 ? 0 : (size_t)size;
    return size > 0;
}

static void keep(const struct input *input)
{
    if (corpus_count < MOST)
        corpus[corpus_count++] = *input;
}

static void load_corpus(const char *folder)
{
    DIR *list = opendir(folder);
    struct dirent *entry;
    char path[4096];

    while (list && (entry = readdir(list))) {
        snprintf(path, sizeof(path), "%s/%s", folder, entry->d_name);
        if (entry->d_name[0] != '.' && strcmp(entry->d_name, "crash") && load(path, &now) && run(&now))
            keep(&now);
    }
    if (list)
        closedir(list);
}

static void mutate(struct input *input, uint64_t *seed)
{
    for (uint64_t changes = 1 + random_below(seed, 6); changes; changes--) {
        uint64_t at = input->size ? random_below(seed, input->size) : 0, length = 1 + random_below(seed, 8);

        switch (random_below(seed, 6)) {
        case 0: /* another value */
            if (input->size)
                input->data[at] = (uint8_t)random_next(seed);
            break;
        case 1: /* a bit */
            if (input->size)
                input->data[at] ^= (uint8_t)(1 << random_below(seed, 8));
            break;
        case 2: /* more */
            if (input->size + length <= LONGEST) {
                memmove(&input->data[at + length], &input->data[at], input->size - at);
                for (uint64_t i = 0; i < length; i++)
                    input->data[at + i] = (uint8_t)random_next(seed);
                input->size += length;
            }
            break;
        case 3: /* less */
            if (at + length <= input->size) {
                memmove(&input->data[at], &input->data[at + length], input->size - at - length);
                input->size -= length;
            }
            break;
        case 4: /* a piece again */
            if (at + length <= input->size && input->size + length <= LONGEST) {
                memmove(&input->data[at + length], &input->data[at], input->size - at);
                input->size += length;
            }
            break;
        default: /* the end of another one */
            if (corpus_count) {
                const struct input *other = &corpus[random_below(seed, corpus_count)];

                if (other->size > at) {
                    memcpy(&input->data[at], &other->data[at], other->size - at);
                    input->size = other->size;
                }
            }
        }
    }
}

static int fuzz(time_t seconds, const char *folder)
{
    time_t end = time(NULL) + seconds;
    uint64_t runs = 0, seed = (uint64_t)time(NULL), found = 0;
    size_t edges = 0;
    char path[4096];

    snprintf(crash_path, sizeof(crash_path), "%s/crash", folder);
    atexit(on_exit_in_a_run);
    signal(SIGABRT, on_signal);
    signal(SIGSEGV, on_signal);
    load_corpus(folder);
    if (!corpus_count) {
        now.size = 0;
        keep(&now);
    }
    printf("  %zu inputs to begin with\n", corpus_count);
    for (; runs % 64 || time(NULL) < end; runs++) {
        now = corpus[random_below(&seed, corpus_count)];
        mutate(&now, &seed);
        if (!run(&now))
            continue;
        keep(&now);
        snprintf(path, sizeof(path), "%s/%016llx", folder, (unsigned long long)random_next(&seed));
        write_input(path, &now);
        found++;
    }
    for (int edge = 0; edge < EDGES; edge++)
        edges += seen[edge] != 0;
    printf("  %llu inputs tried in %lld s, %llu reached something new, %zu edges in all\n", (unsigned long long)runs,
           (long long)seconds, (unsigned long long)found, edges);
    return 0;
}

int main(int count, char **arguments)
{
    struct stat status;

    corpus = calloc(MOST, sizeof(*corpus));
    if (!corpus || count < 2)
        return 2;
    if (count == 3 && !stat(arguments[2], &status) && S_ISDIR(status.st_mode))
        return fuzz(strtol(arguments[1], NULL, 10), arguments[2]);
    for (int i = 1; i < count; i++) {
        if (!load(arguments[i], &now))
            return 2;
        LLVMFuzzerTestOneInput(now.data, now.size);
    }
    printf("  %d inputs run\n", count - 1);
    return 0;
}
