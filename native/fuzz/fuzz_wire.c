/*
 * What a peer may send, cut as the input says, with and without fds: against a parser of the whole stream. For
 * libFuzzer, AFL (persistent mode) or the driver beside this file.
 *
 * A piece is a byte with its length and number of fds, and then its bytes; one byte of eight stands for a header of a
 * message of so many bytes, which chance finds too seldom.
 */
#include <fcntl.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "../tests/check.h"
#include "wire/wire.h"

enum { MOST = 200, MOST_FDS = 2, LONGEST = 1 << 16 };

static uint8_t stream[LONGEST]; /* all that was sent */
static size_t sent, parsed;
static int ends[2], null;

static void send_piece(const uint8_t *data, size_t size, unsigned fds)
{
    _Alignas(struct cmsghdr) char control[CMSG_SPACE(3 * sizeof(int))] = {0};
    int numbers[3] = {null, null, null}; /* not the sockets: the kernel looks for circles */
    struct iovec part = {(void *)data, size};
    struct msghdr told = {.msg_iov = &part, .msg_iovlen = 1};

    if (!size || sent + size > LONGEST)
        return;
    if (fds) {
        told.msg_control = control;
        told.msg_controllen = CMSG_SPACE(fds * sizeof(int));
        CMSG_FIRSTHDR(&told)->cmsg_level = SOL_SOCKET;
        CMSG_FIRSTHDR(&told)->cmsg_type = SCM_RIGHTS;
        CMSG_FIRSTHDR(&told)->cmsg_len = CMSG_LEN(fds * sizeof(int));
        memcpy(CMSG_DATA(CMSG_FIRSTHDR(&told)), numbers, fds * sizeof(int));
    }
    CHECK(sendmsg(ends[1], &told, MSG_DONTWAIT) == (ssize_t)size);
    memcpy(stream + sent, data, size);
    sent += size;
}

/* Take what is there; false once the stream is of no use. */
static bool take_all(struct vfiopy_wire *wire)
{
    for (;;) {
        struct vfiopy_wire_message message;
        struct vfiopy_wire_header header;
        int result = vfiopy_wire_next(wire, &message);

        if (result == VFIOPY_WIRE_NOTHING) {
            result = vfiopy_wire_fill(wire, false);
            if (result == VFIOPY_WIRE_NOTHING) {
                CHECK(sent - parsed < sizeof(header) ||
                      (memcpy(&header, stream + parsed, sizeof(header)), header.size > sent - parsed));
                return true;
            }
            if (result == VFIOPY_WIRE_DONE)
                continue;
        }
        if (result == VFIOPY_WIRE_FDS)
            return false;
        CHECK(sent - parsed >= sizeof(header));
        memcpy(&header, stream + parsed, sizeof(header));
        if (result != VFIOPY_WIRE_DONE) {
            CHECK(result == VFIOPY_WIRE_SIZE ? header.size < sizeof(header) || header.size > MOST
                                             : result == VFIOPY_WIRE_FLAGS && (header.flags & 0xf) > 1);
            return false;
        }
        CHECK(!memcmp(&header, &message.header, sizeof(header)));
        CHECK_EQUAL(message.size, header.size - sizeof(header));
        CHECK(!memcmp(message.payload, stream + parsed + sizeof(header), message.size));
        CHECK(message.fd_count <= MOST_FDS);
        parsed += header.size;
        vfiopy_wire_pop(wire, false);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    const uint8_t *end = data + size;
    struct vfiopy_wire wire;
    bool useful = true;
    int before;

    if (!null)
        null = open("/dev/null", O_RDONLY);
    before = open("/dev/null", O_RDONLY);
    close(before);
    sent = parsed = 0;
    CHECK(!socketpair(AF_UNIX, SOCK_STREAM, 0, ends));
    CHECK(!vfiopy_wire_init(&wire, ends[0], MOST, MOST_FDS));
    while (useful && data < end) {
        uint8_t what = *data++;
        unsigned fds = what >> 6;
        size_t length = what & 31;

        if (what & 32) {
            struct vfiopy_wire_header header = {1, 9, (uint32_t)length * 8, what & 1, 0};

            send_piece((uint8_t *)&header, sizeof(header), fds);
        } else {
            if (length > (size_t)(end - data))
                length = (size_t)(end - data);
            send_piece(data, length, fds);
            data += length;
        }
        if (what & 4)
            useful = take_all(&wire);
    }
    if (useful)
        take_all(&wire);
    vfiopy_wire_destroy(&wire);
    close(ends[0]);
    close(ends[1]);
    CHECK_EQUAL(open("/dev/null", O_RDONLY), before); /* no fd is lost */
    close(before);
    return 0;
}
