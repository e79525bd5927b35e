/*
 * One end of a vfio-user socket: whole messages in, whole messages out, with their file descriptors. libc only.
 *
 * What comes in is read ahead, as much as there is. The kernel hands fds out with the bytes that they were sent with,
 * and ends a read behind them; they belong to the message that begins last in it, because they are sent with the first
 * byte of one.
 *
 * Threads: one at a time receives; any number send, under a leaf lock that is held for one call of the kernel, which
 * never waits. Source of the layout: QEMU docs/interop/vfio-user.rst.
 */
#ifndef VFIOPY_WIRE_WIRE_H
#define VFIOPY_WIRE_WIRE_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

enum {
    VFIOPY_WIRE_HEADER = 16,
    VFIOPY_WIRE_MOST_FDS = 253, /* SCM_MAX_FD, net/scm.h */
    VFIOPY_WIRE_PARTS = 8,      /* of a message that is sent, header included */
};

enum { /* flags of a header; the low four bits are the type */
    VFIOPY_WIRE_REPLY = 0x1,
    VFIOPY_WIRE_TYPE = 0xf,
    VFIOPY_WIRE_NO_REPLY = 0x10,
    VFIOPY_WIRE_ERROR = 0x20,
};

/* What a call says that has no errno for it; an errno is negative. */
enum vfiopy_wire_result {
    VFIOPY_WIRE_NOTHING = 0, /* not yet, not all */
    VFIOPY_WIRE_DONE = 1,
    VFIOPY_WIRE_ENDED,     /* the peer closed the socket, between messages */
    VFIOPY_WIRE_ENDED_IN,  /* in the middle of a header or a message */
    VFIOPY_WIRE_FDS,       /* more fds than a message may bring, or than this process may have */
    VFIOPY_WIRE_SIZE,      /* a message of an impossible size */
    VFIOPY_WIRE_FLAGS,     /* neither a command nor a reply */
};

struct vfiopy_wire_header {
    uint16_t id, command;
    uint32_t size, flags, error;
};

/* A message that is all there. Payload and fds are the wire's until vfiopy_wire_pop(). */
struct vfiopy_wire_message {
    struct vfiopy_wire_header header;
    const uint8_t *payload;
    size_t size; /* of the payload */
    const int *fds;
    unsigned fd_count;
};

struct vfiopy_wire_chunk;

struct vfiopy_wire {
    int fd;
    uint32_t most;     /* bytes of a message, header included */
    unsigned most_fds; /* of a message */

    /* in: [start, end) of the buffer is not taken yet; a message begins at start */
    uint8_t *buffer;
    size_t start, end, room;
    struct {
        uint64_t at; /* where in the stream their message begins */
        int fd;
    } held[2 * (VFIOPY_WIRE_MOST_FDS + 1)];
    int fds[VFIOPY_WIRE_MOST_FDS + 1]; /* of the message that next() told of */
    unsigned held_count;
    uint64_t position; /* of start, in the stream */
    bool drained;      /* the last read took all that there was */

    /* out */
    pthread_mutex_t sending;
    struct vfiopy_wire_chunk *first, *last;
    atomic_size_t queued; /* bytes that wait for room in the socket */
};

/* The fd stays the caller's. 0, or -ENOMEM. */
int vfiopy_wire_init(struct vfiopy_wire *wire, int fd, uint32_t most, unsigned most_fds);

/* Drop what is kept, close the fds that nobody took. Idempotent. */
void vfiopy_wire_close(struct vfiopy_wire *wire);
void vfiopy_wire_destroy(struct vfiopy_wire *wire);

/* Look whether a message is there: DONE, NOTHING, SIZE, FLAGS or FDS. */
int vfiopy_wire_next(struct vfiopy_wire *wire, struct vfiopy_wire_message *message);

/* Read once, without waiting or for as long as the socket's own limit: DONE, NOTHING, ENDED, ENDED_IN, FDS, -errno. */
int vfiopy_wire_fill(struct vfiopy_wire *wire, bool wait);

/* Take the message that next() told of; whoever wanted its fds has taken them, and says so. */
void vfiopy_wire_pop(struct vfiopy_wire *wire, bool fds_taken);

/* Send a message, or queue what the socket does not take: DONE where all of it is gone, NOTHING, -errno. */
int vfiopy_wire_send(struct vfiopy_wire *wire, const struct vfiopy_wire_header *header, const struct iovec *parts,
                     unsigned count, const int *fds, unsigned fd_count);

/* Send what is queued, as far as the socket takes it: DONE where nothing is left, NOTHING, -errno. */
int vfiopy_wire_flush(struct vfiopy_wire *wire);

#endif
