/*
 * A register read over a socket as short as it can be: one message there, one back, from either end.
 *
 * Compiled when tools/bench needs it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdint.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define HEADER 16 /* id, command, size, flags, error */
#define READ 32   /* header, offset, region, count */
#define ANSWER 36 /* the same, and four bytes */

static uint32_t now(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint32_t)(time.tv_sec * INT64_C(1000000000) + time.tv_nsec);
}

/* Ask `count` times; each time's ns go to `took`. Returns 0 or -errno. */
int bench_ask(int fd, const void *request, uint32_t count, uint32_t *took)
{
    char answer[ANSWER];

    for (uint32_t i = 0; i < count; i++) {
        uint32_t begin = now();

        if (send(fd, request, READ, MSG_NOSIGNAL) != READ ||
            recv(fd, answer, ANSWER, MSG_WAITALL) != ANSWER)
            return errno ? -errno : -EPIPE;
        took[i] = now() - begin;
    }
    return 0;
}

/* Answer reads of four bytes until the other end goes. */
void bench_answer(int fd)
{
    char message[ANSWER] = {0};
    const uint32_t size = ANSWER, reply = 1;

    while (recv(fd, message, READ, MSG_WAITALL) == READ) {
        memcpy(message + 4, &size, sizeof(size));
        memcpy(message + 8, &reply, sizeof(reply));
        if (send(fd, message, ANSWER, MSG_NOSIGNAL) != ANSWER)
            return;
    }
}
