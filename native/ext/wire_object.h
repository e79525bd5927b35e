/* The Wire type, between the files that make it up. */
#ifndef VFIOPY_EXT_WIRE_OBJECT_H
#define VFIOPY_EXT_WIRE_OBJECT_H

#include <Python.h>
#include <pthread.h>
#include <stdatomic.h>

#include "wire/wire.h"

enum { VFIOPY_LATE = 1024, VFIOPY_IDS = 1 << 16 };

/* Kinds for the fault callback, beside those of enum vfiopy_wire_result. */
enum { VFIOPY_WIRE_ERRNO = 0, VFIOPY_WIRE_TIMEOUT = 100 };

/* What a client's end has in addition. */
struct wire_asking {
    pthread_mutex_t lock; /* of what follows, up to the turn */
    uint64_t taken[VFIOPY_IDS / 64]; /* ids of requests whose replies may come */
    struct {
        uint16_t id, command;
    } late[VFIOPY_LATE]; /* nobody waits for these any more; a ring */
    unsigned late_first, late_count;
    uint16_t next;

    atomic_ulong reading; /* the thread that has the turn to read, or 0 */
    atomic_int waiting;  /* how many wait for it */
    int poll;            /* an epoll fd by which a thread waits for the socket while nobody reads, or -1 */
    PyObject *dispatch, *turn_over;
};

struct wire_object {
    PyObject_HEAD
    struct vfiopy_wire wire;
    struct wire_asking *asking; /* NULL for a server's end */
    PyObject *fault, *message;
    double timeout;
    unsigned process;
    char usable; /* the quick roads may be taken */
};

static inline struct wire_object *vfiopy_wire_of(PyObject *object)
{
    return (struct wire_object *)object;
}

/* Set the exception that the fault callback makes of a result that is neither DONE nor NOTHING. Returns NULL. */
PyObject *vfiopy_wire_raise(struct wire_object *self, int result);
PyObject *vfiopy_wire_raise_kind(struct wire_object *self, int kind, long value);

/* Make a Message of what next() told of, and take it. */
PyObject *vfiopy_wire_take(struct wire_object *self, const struct vfiopy_wire_message *message);

/* Parts of a message, as Python gives them. 0, or -1 with an error set: nothing is to be let go then. */
struct vfiopy_wire_parts {
    Py_buffer buffers[VFIOPY_WIRE_PARTS - 1];
    struct iovec parts[VFIOPY_WIRE_PARTS - 1];
    unsigned count;
    int fds[VFIOPY_WIRE_MOST_FDS];
    unsigned fd_count;
    size_t size;
};
int vfiopy_wire_get_parts(struct vfiopy_wire_parts *parts, PyObject *given, PyObject *fds);
void vfiopy_wire_let_parts_go(struct vfiopy_wire_parts *parts);

/* METH_FASTCALL methods of the two ends. */
PyObject *vfiopy_wire_use(PyObject *object, PyObject *const *args, Py_ssize_t nargs);
PyObject *vfiopy_wire_exchange(PyObject *object, PyObject *const *args, Py_ssize_t nargs);
PyObject *vfiopy_wire_read(PyObject *object, PyObject *const *args, Py_ssize_t nargs);
PyObject *vfiopy_wire_post(PyObject *object, PyObject *const *args, Py_ssize_t nargs);
PyObject *vfiopy_wire_claim(PyObject *object, PyObject *ignored);
PyObject *vfiopy_wire_release(PyObject *object, PyObject *argument);
PyObject *vfiopy_wire_late(PyObject *object, PyObject *const *args, Py_ssize_t nargs);
PyObject *vfiopy_wire_take_late(PyObject *object, PyObject *const *args, Py_ssize_t nargs);
PyObject *vfiopy_wire_take_turn(PyObject *object, PyObject *ignored);
PyObject *vfiopy_wire_has_turn(PyObject *object, PyObject *ignored);
PyObject *vfiopy_wire_give_turn(PyObject *object, PyObject *ignored);
PyObject *vfiopy_wire_wait(PyObject *object, PyObject *argument);
PyObject *vfiopy_wire_run(PyObject *object, PyObject *const *args, Py_ssize_t nargs);
PyObject *vfiopy_wire_serve(PyObject *object, PyObject *const *args, Py_ssize_t nargs);

#endif
