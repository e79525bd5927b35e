/* What comes in: see wire.h. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "wire/internal.h"

enum { USUAL_ROOM = 16 << 10 }; /* more than nearly all messages, and not much for each of many connections */

static struct vfiopy_wire_header header_at(const uint8_t *bytes)
{
    struct vfiopy_wire_header header;

    _Static_assert(sizeof(header) == VFIOPY_WIRE_HEADER, "the header has no padding");
    memcpy(&header, bytes, sizeof(header));
    return header;
}

static bool size_is_possible(const struct vfiopy_wire *wire, uint32_t size)
{
    return size >= VFIOPY_WIRE_HEADER && size <= wire->most;
}

/* Have at least `room` bytes from start on. 0, or -ENOMEM. */
static int make_room(struct vfiopy_wire *wire, size_t room)
{
    size_t kept = wire->end - wire->start;
    uint8_t *buffer;

    if (!kept)
        wire->start = wire->end = 0;
    if (wire->room - wire->start >= room)
        return 0;
    if (wire->room < room) {
        buffer = malloc(room);
        if (!buffer)
            return -ENOMEM;
        memcpy(buffer, wire->buffer + wire->start, kept);
        free(wire->buffer);
        wire->buffer = buffer;
        wire->room = room;
    } else {
        memmove(wire->buffer, wire->buffer + wire->start, kept);
    }
    wire->start = 0;
    wire->end = kept;
    return 0;
}

/* A long message came and went: the next one is probably short. */
static void give_room_back(struct vfiopy_wire *wire)
{
    uint8_t *buffer = malloc(USUAL_ROOM);

    if (!buffer)
        return;
    free(wire->buffer);
    wire->buffer = buffer;
    wire->room = USUAL_ROOM;
}

int vfiopy_wire_init(struct vfiopy_wire *wire, int fd, uint32_t most, unsigned most_fds)
{
    memset(wire, 0, sizeof(*wire));
    wire->fd = fd;
    wire->most = most;
    wire->most_fds = most_fds < VFIOPY_WIRE_MOST_FDS ? most_fds : VFIOPY_WIRE_MOST_FDS;
    wire->room = USUAL_ROOM;
    wire->buffer = malloc(wire->room);
    pthread_mutex_init(&wire->sending, NULL);
    return wire->buffer ? 0 : -ENOMEM;
}

static void close_fds(const int *fds, size_t count)
{
    for (size_t i = 0; i < count; i++)
        close(fds[i]);
}

void vfiopy_wire_drop_incoming(struct vfiopy_wire *wire)
{
    for (unsigned i = 0; i < wire->held_count; i++)
        close(wire->held[i].fd);
    wire->held_count = 0;
    wire->start = wire->end = 0;
}

/* Where in the buffer the message begins that what was read last belongs to. */
static size_t last_beginning(const struct vfiopy_wire *wire)
{
    size_t at = wire->start;

    while (wire->end - at >= VFIOPY_WIRE_HEADER) {
        uint32_t size = header_at(wire->buffer + at).size;

        if (!size_is_possible(wire, size) || size >= wire->end - at)
            break;
        at += size;
    }
    return at;
}

/* Keep fds that came with what was read from `begin` on. DONE or FDS. */
static int keep_fds(struct vfiopy_wire *wire, size_t begin, const int *fds, unsigned count)
{
    size_t at = last_beginning(wire);
    unsigned together = count;

    if (begin >= at + VFIOPY_WIRE_HEADER) { /* with a body: they are nobody's */
        close_fds(fds, count);
        return VFIOPY_WIRE_DONE;
    }
    at = at - wire->start + wire->position;
    for (unsigned i = 0; i < wire->held_count; i++)
        together += wire->held[i].at == at;
    if (together > wire->most_fds || wire->held_count + count > sizeof(wire->held) / sizeof(*wire->held)) {
        close_fds(fds, count);
        return VFIOPY_WIRE_FDS;
    }
    for (unsigned i = 0; i < count; i++) {
        wire->held[wire->held_count].at = at;
        wire->held[wire->held_count++].fd = fds[i];
    }
    return VFIOPY_WIRE_DONE;
}

/* The fds of what was read from `begin` on. */
static int take_ancillary(struct vfiopy_wire *wire, struct msghdr *told, size_t begin)
{
    int result = VFIOPY_WIRE_DONE;

    for (struct cmsghdr *one = CMSG_FIRSTHDR(told); one; one = CMSG_NXTHDR(told, one)) {
        int fds[VFIOPY_WIRE_MOST_FDS + 1];
        size_t count = (one->cmsg_len - CMSG_LEN(0)) / sizeof(int);

        if (one->cmsg_level != SOL_SOCKET || one->cmsg_type != SCM_RIGHTS || count > VFIOPY_WIRE_MOST_FDS + 1)
            continue;
        memcpy(fds, CMSG_DATA(one), count * sizeof(int));
        if (result == VFIOPY_WIRE_DONE)
            result = keep_fds(wire, begin, fds, (unsigned)count);
        else
            close_fds(fds, count);
    }
    return told->msg_flags & MSG_CTRUNC ? VFIOPY_WIRE_FDS : result;
}

int vfiopy_wire_fill(struct vfiopy_wire *wire, bool wait)
{
    _Alignas(struct cmsghdr) char control[CMSG_SPACE((VFIOPY_WIRE_MOST_FDS + 1) * sizeof(int))];
    size_t wanted = VFIOPY_WIRE_HEADER, begin, asked;
    struct msghdr told = {0};
    struct iovec where;
    ssize_t got;

    if (wire->fd < 0)
        return VFIOPY_WIRE_ENDED;
    if (wire->end - wire->start >= VFIOPY_WIRE_HEADER) {
        wanted = header_at(wire->buffer + wire->start).size;
        if (!size_is_possible(wire, (uint32_t)wanted))
            return VFIOPY_WIRE_SIZE;
    }
    if (make_room(wire, wanted))
        return -ENOMEM;
    begin = wire->end;
    asked = wire->room - begin;
    if (!asked) /* a whole message waits */
        return VFIOPY_WIRE_DONE;
    where = (struct iovec){wire->buffer + begin, asked};
    told.msg_iov = &where;
    told.msg_iovlen = 1;
    told.msg_control = control;
    told.msg_controllen = CMSG_SPACE((wire->most_fds + 1) * sizeof(int));
    got = recvmsg(wire->fd, &told, MSG_CMSG_CLOEXEC | (wait ? 0 : MSG_DONTWAIT));
    wire->drained = got < (ssize_t)asked;
    if (got < 0)
        return errno == EAGAIN || errno == EWOULDBLOCK ? VFIOPY_WIRE_NOTHING : -errno;
    wire->end += (size_t)got;
    if (told.msg_controllen || told.msg_flags & MSG_CTRUNC) {
        wire->drained = false; /* the kernel stops behind fds, whatever follows */
        int result = take_ancillary(wire, &told, begin);

        if (result != VFIOPY_WIRE_DONE)
            return result;
    }
    if (!got)
        return wire->end > wire->start ? VFIOPY_WIRE_ENDED_IN : VFIOPY_WIRE_ENDED;
    return VFIOPY_WIRE_DONE;
}

int vfiopy_wire_next(struct vfiopy_wire *wire, struct vfiopy_wire_message *message)
{
    size_t there = wire->end - wire->start;

    if (there < VFIOPY_WIRE_HEADER)
        return VFIOPY_WIRE_NOTHING;
    message->header = header_at(wire->buffer + wire->start);
    if (!size_is_possible(wire, message->header.size))
        return VFIOPY_WIRE_SIZE;
    if ((message->header.flags & VFIOPY_WIRE_TYPE) > VFIOPY_WIRE_REPLY)
        return VFIOPY_WIRE_FLAGS;
    if (there < message->header.size)
        return VFIOPY_WIRE_NOTHING;
    message->payload = wire->buffer + wire->start + VFIOPY_WIRE_HEADER;
    message->size = message->header.size - VFIOPY_WIRE_HEADER;
    message->fds = wire->fds;
    message->fd_count = 0;
    while (message->fd_count < wire->held_count && wire->held[message->fd_count].at == wire->position) {
        wire->fds[message->fd_count] = wire->held[message->fd_count].fd;
        message->fd_count++;
    }
    return VFIOPY_WIRE_DONE;
}

void vfiopy_wire_pop(struct vfiopy_wire *wire, bool fds_taken)
{
    uint32_t size = header_at(wire->buffer + wire->start).size;
    unsigned count = 0;

    while (count < wire->held_count && wire->held[count].at == wire->position) {
        if (!fds_taken)
            close(wire->held[count].fd);
        count++;
    }
    if (count) {
        wire->held_count -= count;
        memmove(wire->held, wire->held + count, wire->held_count * sizeof(*wire->held));
    }
    wire->start += size;
    wire->position += size;
    if (wire->start == wire->end && wire->room > USUAL_ROOM)
        give_room_back(wire);
    if (wire->start == wire->end)
        wire->start = wire->end = 0;
}
