/* What goes out: see wire.h. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "wire/internal.h"

enum { SHORT = 128 }; /* a register access and its reply */

/* What the socket did not take, with copies of its fds. */
struct vfiopy_wire_chunk {
    struct vfiopy_wire_chunk *next;
    size_t size, done;
    unsigned fd_count;
    int fds[VFIOPY_WIRE_MOST_FDS];
    uint8_t data[];
};

/* Put a message into one piece, where it is short. Its size, or 0 where it is too long. */
static size_t gather(uint8_t *into, const struct iovec *parts, unsigned count)
{
    size_t size = 0;

    for (unsigned i = 0; i < count; i++) {
        if (parts[i].iov_len > SHORT - size)
            return 0;
        memcpy(into + size, parts[i].iov_base, parts[i].iov_len);
        size += parts[i].iov_len;
    }
    return size;
}

static ssize_t send_once(int fd, struct iovec *parts, unsigned count, const int *fds, unsigned fd_count)
{
    _Alignas(struct cmsghdr) char control[CMSG_SPACE(VFIOPY_WIRE_MOST_FDS * sizeof(int))];
    struct msghdr told = {.msg_iov = parts, .msg_iovlen = count};
    uint8_t whole[SHORT];
    size_t size = fd_count ? 0 : gather(whole, parts, count);
    ssize_t done;

    if (fd_count) {
        struct cmsghdr *one;

        memset(control, 0, CMSG_SPACE(fd_count * sizeof(int)));
        told.msg_control = control;
        told.msg_controllen = CMSG_SPACE(fd_count * sizeof(int));
        one = CMSG_FIRSTHDR(&told);
        one->cmsg_level = SOL_SOCKET;
        one->cmsg_type = SCM_RIGHTS;
        one->cmsg_len = CMSG_LEN(fd_count * sizeof(int));
        memcpy(CMSG_DATA(one), fds, fd_count * sizeof(int));
    }
    do /* the kernel looks at less for a send() */
        done = size ? send(fd, whole, size, MSG_DONTWAIT | MSG_NOSIGNAL)
                    : sendmsg(fd, &told, MSG_DONTWAIT | MSG_NOSIGNAL);
    while (done < 0 && errno == EINTR);
    if (done < 0)
        return errno == EAGAIN || errno == EWOULDBLOCK ? 0 : -errno;
    return done;
}

static void free_chunk(struct vfiopy_wire_chunk *chunk)
{
    for (unsigned i = 0; i < chunk->fd_count; i++)
        close(chunk->fds[i]);
    free(chunk);
}

/* Queue all of the parts but their first `done` bytes. 0, or -errno: nothing is queued then. */
static int enqueue(struct vfiopy_wire *wire, const struct iovec *parts, unsigned count, size_t done, const int *fds,
                   unsigned fd_count)
{
    struct vfiopy_wire_chunk *chunk;
    size_t size = 0;

    for (unsigned i = 0; i < count; i++)
        size += parts[i].iov_len;
    chunk = calloc(1, sizeof(*chunk) + size - done);
    if (!chunk)
        return -ENOMEM;
    for (; chunk->fd_count < fd_count; chunk->fd_count++) {
        int copy = fcntl(fds[chunk->fd_count], F_DUPFD_CLOEXEC, 0);

        if (copy < 0) {
            int error = errno;

            free_chunk(chunk);
            return -error;
        }
        chunk->fds[chunk->fd_count] = copy;
    }
    for (unsigned i = 0; i < count; i++) {
        size_t skipped = done < parts[i].iov_len ? done : parts[i].iov_len;

        memcpy(chunk->data + chunk->size, (const uint8_t *)parts[i].iov_base + skipped, parts[i].iov_len - skipped);
        chunk->size += parts[i].iov_len - skipped;
        done -= skipped;
    }
    if (wire->last)
        wire->last->next = chunk;
    else
        wire->first = chunk;
    wire->last = chunk;
    atomic_fetch_add(&wire->queued, chunk->size);
    return 0;
}

int vfiopy_wire_send(struct vfiopy_wire *wire, const struct vfiopy_wire_header *header, const struct iovec *parts,
                     unsigned count, const int *fds, unsigned fd_count)
{
    struct iovec all[VFIOPY_WIRE_PARTS];
    size_t size = VFIOPY_WIRE_HEADER;
    ssize_t done = 0;
    int result = VFIOPY_WIRE_NOTHING;

    if (count >= VFIOPY_WIRE_PARTS || fd_count > VFIOPY_WIRE_MOST_FDS)
        return -EINVAL;
    all[0] = (struct iovec){(void *)header, VFIOPY_WIRE_HEADER};
    for (unsigned i = 0; i < count; i++) {
        all[i + 1] = parts[i];
        size += parts[i].iov_len;
    }
    pthread_mutex_lock(&wire->sending);
    if (wire->fd < 0)
        done = -EPIPE;
    else if (!wire->first)
        done = send_once(wire->fd, all, count + 1, fds, fd_count);
    if (done < 0)
        result = (int)done;
    else if ((size_t)done == size)
        result = VFIOPY_WIRE_DONE;
    else
        result = enqueue(wire, all, count + 1, (size_t)done, fds, done ? 0 : fd_count);
    pthread_mutex_unlock(&wire->sending);
    return result;
}

int vfiopy_wire_flush(struct vfiopy_wire *wire)
{
    int result = VFIOPY_WIRE_DONE;

    pthread_mutex_lock(&wire->sending);
    while (wire->first) {
        struct vfiopy_wire_chunk *chunk = wire->first;
        struct iovec part = {chunk->data + chunk->done, chunk->size - chunk->done};
        ssize_t done = send_once(wire->fd, &part, 1, chunk->fds, chunk->done ? 0 : chunk->fd_count);

        if (done <= 0) {
            result = (int)done;
            break;
        }
        chunk->done += (size_t)done;
        atomic_fetch_sub(&wire->queued, (size_t)done);
        if (chunk->done < chunk->size)
            continue;
        wire->first = chunk->next;
        if (!wire->first)
            wire->last = NULL;
        free_chunk(chunk);
    }
    pthread_mutex_unlock(&wire->sending);
    return result;
}

void vfiopy_wire_close(struct vfiopy_wire *wire)
{
    pthread_mutex_lock(&wire->sending);
    wire->fd = -1;
    while (wire->first) {
        struct vfiopy_wire_chunk *chunk = wire->first;

        wire->first = chunk->next;
        free_chunk(chunk);
    }
    wire->last = NULL;
    atomic_store(&wire->queued, 0);
    pthread_mutex_unlock(&wire->sending);
    vfiopy_wire_drop_incoming(wire);
}

void vfiopy_wire_destroy(struct vfiopy_wire *wire)
{
    vfiopy_wire_close(wire);
    free(wire->buffer);
    wire->buffer = NULL;
    pthread_mutex_destroy(&wire->sending);
}
