/* native/wire over a socketpair: messages cut anywhere, fds and whose they are, queues, what is refused, leaks. */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include "check.h"
#include "random.h"
#include "wire/wire.h"

enum { MOST = 1 << 20, MOST_FDS = 4 };

static struct vfiopy_wire left, right;
static int ends[2];

static void connect_ends(void)
{
    CHECK(!socketpair(AF_UNIX, SOCK_STREAM, 0, ends));
    CHECK(!vfiopy_wire_init(&left, ends[0], MOST, MOST_FDS));
    CHECK(!vfiopy_wire_init(&right, ends[1], MOST, MOST_FDS));
}

static void disconnect(void)
{
    vfiopy_wire_close(&left);
    vfiopy_wire_destroy(&left);
    vfiopy_wire_destroy(&right);
    close(ends[0]);
    close(ends[1]);
}

/* The number that the next fd gets: as before when nothing has leaked. */
static int next_fd(void)
{
    int fd = open("/dev/null", O_RDONLY);

    close(fd);
    return fd;
}

static struct vfiopy_wire_header header(uint16_t id, size_t size)
{
    return (struct vfiopy_wire_header){id, 9, (uint32_t)(VFIOPY_WIRE_HEADER + size), 0, 0};
}

static int post(struct vfiopy_wire *wire, uint16_t id, const void *data, size_t size, const int *fds, unsigned count)
{
    struct vfiopy_wire_header h = header(id, size);
    struct iovec part = {(void *)data, size};

    return vfiopy_wire_send(wire, &h, &part, 1, fds, count);
}

/* Until a message is there, or something else than that it is not. */
static int receive(struct vfiopy_wire *wire, struct vfiopy_wire_message *message)
{
    int result;

    while ((result = vfiopy_wire_next(wire, message)) == VFIOPY_WIRE_NOTHING) {
        result = vfiopy_wire_fill(wire, false);
        if (result != VFIOPY_WIRE_DONE)
            break;
    }
    return result;
}

static void send_raw(const void *data, size_t size, const int *fds, unsigned count)
{
    _Alignas(struct cmsghdr) char control[CMSG_SPACE(64 * sizeof(int))] = {0};
    struct iovec part = {(void *)data, size};
    struct msghdr told = {.msg_iov = &part, .msg_iovlen = 1};

    if (count) {
        told.msg_control = control;
        told.msg_controllen = CMSG_SPACE(count * sizeof(int));
        CMSG_FIRSTHDR(&told)->cmsg_level = SOL_SOCKET;
        CMSG_FIRSTHDR(&told)->cmsg_type = SCM_RIGHTS;
        CMSG_FIRSTHDR(&told)->cmsg_len = CMSG_LEN(count * sizeof(int));
        memcpy(CMSG_DATA(CMSG_FIRSTHDR(&told)), fds, count * sizeof(int));
    }
    CHECK_EQUAL(sendmsg(ends[1], &told, 0), size);
}

static void both_ways(void)
{
    struct vfiopy_wire_message message;

    connect_ends();
    CHECK_EQUAL(receive(&left, &message), VFIOPY_WIRE_NOTHING);
    CHECK_EQUAL(post(&right, 7, "hello", 5, NULL, 0), VFIOPY_WIRE_DONE);
    CHECK_EQUAL(post(&right, 8, "", 0, NULL, 0), VFIOPY_WIRE_DONE);
    CHECK_EQUAL(receive(&left, &message), VFIOPY_WIRE_DONE);
    CHECK_EQUAL(message.header.id, 7);
    CHECK_EQUAL(message.size, 5);
    CHECK(!memcmp(message.payload, "hello", 5));
    vfiopy_wire_pop(&left, false);
    CHECK_EQUAL(receive(&left, &message), VFIOPY_WIRE_DONE);
    CHECK_EQUAL(message.header.id, 8);
    vfiopy_wire_pop(&left, false);
    CHECK_EQUAL(post(&left, 9, "back", 4, NULL, 0), VFIOPY_WIRE_DONE);
    CHECK_EQUAL(receive(&right, &message), VFIOPY_WIRE_DONE);
    CHECK(!memcmp(message.payload, "back", 4));
    disconnect();
}

static void cut_anywhere(void)
{
    static uint8_t stream[1 << 17];
    uint64_t random = 5;

    for (int round = 0; round < 300; round++) {
        struct vfiopy_wire_message message;
        size_t size = 0, sent = 0, sizes[8];
        unsigned count = 1 + random_below(&random, 8), got = 0;

        connect_ends();
        for (unsigned i = 0; i < count; i++) {
            struct vfiopy_wire_header h;

            sizes[i] = random_below(&random, random_below(&random, 4) ? 60 : 20000); /* some longer than the buffer */
            h = header((uint16_t)i, sizes[i]);
            memcpy(stream + size, &h, sizeof(h));
            memset(stream + size + sizeof(h), (int)i, sizes[i]);
            size += sizeof(h) + sizes[i];
        }
        while (sent < size || got < count) {
            size_t piece = 1 + random_below(&random, random_below(&random, 3) ? 30 : 4000);

            if (piece > size - sent)
                piece = size - sent;
            if (piece)
                send_raw(stream + sent, piece, NULL, 0);
            sent += piece;
            while (receive(&left, &message) == VFIOPY_WIRE_DONE) {
                CHECK_EQUAL(message.header.id, got);
                CHECK_EQUAL(message.size, sizes[got]);
                for (size_t i = 0; i < message.size; i++)
                    CHECK_EQUAL(message.payload[i], got);
                vfiopy_wire_pop(&left, false);
                got++;
            }
        }
        disconnect();
    }
}

static void fds_find_their_message(void)
{
    int before = next_fd(), mine[3];
    struct vfiopy_wire_message message;

    connect_ends();
    for (int i = 0; i < 3; i++)
        mine[i] = eventfd((unsigned)i + 10, EFD_NONBLOCK);
    post(&right, 0, "a", 1, NULL, 0);
    post(&right, 1, "b", 1, mine, 2);
    post(&right, 2, "c", 1, mine + 2, 1);
    post(&right, 3, "d", 1, NULL, 0);
    for (unsigned i = 0; i < 4; i++) {
        static const unsigned expected[] = {0, 2, 1, 0};

        CHECK_EQUAL(receive(&left, &message), VFIOPY_WIRE_DONE);
        CHECK_EQUAL(message.header.id, i);
        CHECK_EQUAL(message.fd_count, expected[i]);
        if (i == 2) {
            uint64_t value;

            CHECK_EQUAL(read(message.fds[0], &value, 8), 8);
            CHECK_EQUAL(value, 12);
            CHECK(fcntl(message.fds[0], F_GETFD) & FD_CLOEXEC);
        }
        vfiopy_wire_pop(&left, false); /* and closes them */
    }
    for (int i = 0; i < 3; i++)
        close(mine[i]);
    disconnect();
    CHECK_EQUAL(next_fd(), before);
}

static void too_many_fds(void)
{
    int before = next_fd(), fds[20];
    struct vfiopy_wire_message message;
    struct vfiopy_wire_header h = header(1, 0);

    for (unsigned count = MOST_FDS + 1; count <= 20; count += 5) {
        connect_ends();
        for (unsigned i = 0; i < count; i++)
            fds[i] = ends[1];
        send_raw(&h, sizeof(h), fds, count);
        CHECK_EQUAL(receive(&left, &message), VFIOPY_WIRE_FDS);
        disconnect();
    }
    connect_ends(); /* with each half of a header, as many as one message may bring */
    send_raw(&h, 5, ends, 2);
    CHECK_EQUAL(receive(&left, &message), VFIOPY_WIRE_NOTHING);
    send_raw((uint8_t *)&h + 5, 3, ends, 2);
    send_raw((uint8_t *)&h + 8, 8, ends, 2);
    CHECK_EQUAL(receive(&left, &message), VFIOPY_WIRE_FDS);
    disconnect();
    CHECK_EQUAL(next_fd(), before);
}

static void fds_that_nobody_takes(void)
{
    int before = next_fd();
    struct vfiopy_wire_message message;

    connect_ends();
    post(&right, 0, "a", 1, ends, 2);
    post(&right, 1, "b", 1, ends, 2);
    CHECK_EQUAL(receive(&left, &message), VFIOPY_WIRE_DONE);
    disconnect(); /* one message is told of, one is still in the socket */
    CHECK_EQUAL(next_fd(), before);
}

static void impossible(void)
{
    static const uint32_t sizes[] = {0, 15, MOST + 1, UINT32_MAX};
    struct vfiopy_wire_message message;
    struct vfiopy_wire_header h;

    for (unsigned i = 0; i < 4; i++) {
        connect_ends();
        h = (struct vfiopy_wire_header){1, 9, sizes[i], 0, 0};
        send_raw(&h, sizeof(h), ends, 1); /* its fd is not lost either: next_fd() below */
        CHECK_EQUAL(receive(&left, &message), VFIOPY_WIRE_SIZE);
        CHECK_EQUAL(vfiopy_wire_fill(&left, false), VFIOPY_WIRE_SIZE);
        disconnect();
    }
    connect_ends();
    h = (struct vfiopy_wire_header){1, 9, 16, 2, 0};
    send_raw(&h, sizeof(h), NULL, 0);
    CHECK_EQUAL(receive(&left, &message), VFIOPY_WIRE_FLAGS);
    disconnect();
}

static void the_peer_goes(void)
{
    struct vfiopy_wire_header h = header(1, 4);
    struct vfiopy_wire_message message;

    for (size_t sent = 0; sent <= 20; sent++) {
        uint8_t bytes[20] = {0};

        memcpy(bytes, &h, sizeof(h));
        connect_ends();
        if (sent)
            send_raw(bytes, sent, NULL, 0);
        shutdown(ends[1], SHUT_RDWR);
        if (sent == 20) {
            CHECK_EQUAL(receive(&left, &message), VFIOPY_WIRE_DONE);
            vfiopy_wire_pop(&left, false);
        }
        CHECK_EQUAL(receive(&left, &message), sent % 20 ? VFIOPY_WIRE_ENDED_IN : VFIOPY_WIRE_ENDED);
        CHECK_EQUAL(post(&left, 1, "x", 1, NULL, 0), -EPIPE);
        disconnect();
    }
}

static void what_the_socket_does_not_take(void)
{
    static uint8_t body[100000];
    int before = next_fd();
    unsigned got = 0;

    connect_ends();
    for (unsigned i = 0; i < 20; i++) {
        memset(body, (int)i, sizeof(body));
        CHECK(post(&left, (uint16_t)i, body, sizeof(body), ends, 1) >= 0);
    }
    CHECK(atomic_load(&left.queued) > sizeof(body));
    while (got < 20) {
        struct vfiopy_wire_message message;

        if (receive(&right, &message) != VFIOPY_WIRE_DONE) {
            CHECK(vfiopy_wire_flush(&left) >= 0);
            continue;
        }
        CHECK_EQUAL(message.header.id, got);
        CHECK_EQUAL(message.size, sizeof(body));
        CHECK_EQUAL(message.fd_count, 1);
        CHECK_EQUAL(message.payload[0], got);
        CHECK_EQUAL(message.payload[sizeof(body) - 1], got);
        vfiopy_wire_pop(&right, false);
        got++;
    }
    CHECK_EQUAL(vfiopy_wire_flush(&left), VFIOPY_WIRE_DONE);
    CHECK_EQUAL(atomic_load(&left.queued), 0);
    for (unsigned i = 0; i < 20; i++) /* and what is dropped at the end leaves nothing */
        post(&left, 1, body, sizeof(body), ends, 2);
    CHECK(atomic_load(&left.queued));
    disconnect();
    CHECK_EQUAL(next_fd(), before);
}

static void *send_many(void *first)
{
    uint8_t body[3000];

    for (unsigned i = 0; i < 500; i++) {
        memset(body, *(int *)first, sizeof(body));
        CHECK(post(&left, (uint16_t)*(int *)first, body, 1 + i * 7 % sizeof(body), NULL, 0) >= 0);
    }
    return NULL;
}

static void threads_that_send(void)
{
    struct vfiopy_wire_message message;
    pthread_t threads[4];
    int numbers[4] = {1, 2, 3, 4};

    connect_ends();
    for (int i = 0; i < 4; i++)
        CHECK(!pthread_create(&threads[i], NULL, send_many, &numbers[i]));
    for (unsigned got = 0; got < 2000;) {
        if (receive(&right, &message) != VFIOPY_WIRE_DONE) {
            CHECK(vfiopy_wire_flush(&left) >= 0);
            continue;
        }
        for (size_t i = 0; i < message.size; i++)
            CHECK_EQUAL(message.payload[i], message.header.id);
        vfiopy_wire_pop(&right, false);
        got++;
    }
    for (int i = 0; i < 4; i++)
        pthread_join(threads[i], NULL);
    disconnect();
}

static void too_much_for_one_message(void)
{
    struct vfiopy_wire_header h = header(1, 0);
    struct iovec parts[VFIOPY_WIRE_PARTS] = {{0}};

    connect_ends();
    CHECK_EQUAL(vfiopy_wire_send(&left, &h, parts, VFIOPY_WIRE_PARTS, NULL, 0), -EINVAL);
    CHECK_EQUAL(vfiopy_wire_send(&left, &h, parts, 0, ends, VFIOPY_WIRE_MOST_FDS + 1), -EINVAL);
    disconnect();
}

int main(void)
{
    RUN(both_ways);
    RUN(cut_anywhere);
    RUN(fds_find_their_message);
    RUN(too_many_fds);
    RUN(fds_that_nobody_takes);
    RUN(impossible);
    RUN(the_peer_goes);
    RUN(what_the_socket_does_not_take);
    RUN(threads_that_send);
    RUN(too_much_for_one_message);
    return 0;
}
