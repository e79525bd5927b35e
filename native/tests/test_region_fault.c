/* SIGBUS for real: a file that is truncated under its mapping. Each case that ends the process runs in a child. */
#define _GNU_SOURCE
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"
#include "region/access.h"
#include "region/fault.h"
#include "region/runs.h"

static size_t page;
static int fd;
static unsigned char *bar; /* two pages, of which the second is gone */

static void make_bar(void)
{
    page = (size_t)sysconf(_SC_PAGESIZE);
    fd = memfd_create("bar", 0);
    CHECK(fd >= 0 && ftruncate(fd, (off_t)page) == 0);
    bar = mmap(NULL, 2 * page, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    CHECK(bar != MAP_FAILED);
}

#define TEST_ACCESSORS(bits)                                                                                           \
    static void accessors##bits(void)                                                                                  \
    {                                                                                                                  \
        uint64_t before = vfiopy_fault_count();                                                                        \
        int faulted = 0;                                                                                               \
                                                                                                                       \
        CHECK_EQUAL(vfiopy_read##bits(bar + page, &faulted), UINT##bits##_MAX);                                        \
        CHECK_EQUAL(faulted, 1);                                                                                       \
        faulted = 0;                                                                                                   \
        CHECK_EQUAL(vfiopy_load##bits(bar + page + 8, &faulted), UINT##bits##_MAX);                                    \
        CHECK_EQUAL(faulted, 1);                                                                                       \
        faulted = 0;                                                                                                   \
        vfiopy_write##bits(bar + page, 1, &faulted);                                                                   \
        CHECK_EQUAL(faulted, 1);                                                                                       \
        faulted = 0;                                                                                                   \
        vfiopy_store##bits(bar + page, 1, &faulted);                                                                   \
        CHECK_EQUAL(faulted, 1);                                                                                       \
        CHECK_EQUAL(vfiopy_fault_count(), before + 4);                                                                 \
        faulted = 0;                                                                                                   \
        vfiopy_write##bits(bar, 0x5a, &faulted);                                                                       \
        CHECK_EQUAL(vfiopy_read##bits(bar, &faulted), 0x5a);                                                           \
        CHECK_EQUAL(faulted, 0);                                                                                       \
    }

TEST_ACCESSORS(8)
TEST_ACCESSORS(16)
TEST_ACCESSORS(32)
TEST_ACCESSORS(64)

static void runs_stop_where_the_memory_does(void)
{
    static unsigned char data[256];

    for (unsigned width = 1; width <= 8; width *= 2) {
        uintptr_t start = (uintptr_t)bar + page - 64;

        CHECK_EQUAL(vfiopy_write_run(start, width, data, 128 / width, width), 64 / width);
        CHECK_EQUAL(vfiopy_read_run(start, width, data, 128 / width, width), 64 / width);
        CHECK_EQUAL(vfiopy_read_run((uintptr_t)bar + page, 0, data, 10, width), 0);
        CHECK_EQUAL(vfiopy_write_run((uintptr_t)bar + page, 0, data, 10, width), 0);
    }
}

static void a_poll_reports_it(void)
{
    atomic_uint flags = 0;
    struct vfiopy_poll poll = {
        .address = (uintptr_t)bar + page, .width = 4, .mask = 1, .value = 0, .deadline = UINT64_MAX,
        .check_at = UINT64_MAX, .flags = &flags,
    };

    CHECK_EQUAL(vfiopy_poll_run(&poll), VFIOPY_POLL_FAULT);
}

static void *fault_often(void *argument)
{
    (void)argument;
    for (int i = 0; i < 2000; i++) {
        int faulted = 0;

        CHECK_EQUAL(vfiopy_read32(bar + page, &faulted), UINT32_MAX);
        CHECK_EQUAL(faulted, 1);
    }
    return NULL;
}

static void threads_fault_at_once(void)
{
    uint64_t before = vfiopy_fault_count();
    pthread_t threads[4];

    for (int i = 0; i < 4; i++)
        CHECK_EQUAL(pthread_create(&threads[i], NULL, fault_often, NULL), 0);
    for (int i = 0; i < 4; i++)
        pthread_join(threads[i], NULL);
    CHECK_EQUAL(vfiopy_fault_count(), before + 8000);
}

/* --- everything else goes where it went before --- */

static void touch_without_protection(void)
{
    *(volatile unsigned char *)(bar + page) = 1;
}

/* Run in a child; return its wait status. */
static int in_child(void (*body)(void))
{
    int status;
    pid_t child = fork();

    if (child == 0) {
        signal(SIGBUS, SIG_DFL);
        body();
        _exit(0);
    }
    CHECK(child > 0 && waitpid(child, &status, 0) == child);
    return status;
}

static sigjmp_buf back;
static volatile sig_atomic_t calls;

static void jump(int number)
{
    (void)number;
    calls++;
    siglongjmp(back, 1);
}

static void count_and_describe(int number, siginfo_t *info, void *context)
{
    (void)context;
    calls++;
    if (number != SIGBUS || info->si_addr != bar + page)
        _exit(9);
    siglongjmp(back, 1);
}

static void set_handler(void (*simple)(int), void (*full)(int, siginfo_t *, void *))
{
    struct sigaction action;

    memset(&action, 0, sizeof(action));
    if (full) {
        action.sa_sigaction = full;
        action.sa_flags = SA_SIGINFO;
    } else {
        action.sa_handler = simple;
    }
    CHECK_EQUAL(sigaction(SIGBUS, &action, NULL), 0);
}

static void foreign_fault(void)
{
    vfiopy_fault_install();
    touch_without_protection();
}

static void ignored_fault(void)
{
    signal(SIGBUS, SIG_IGN);
    foreign_fault();
}

static void sent(void)
{
    vfiopy_fault_install();
    raise(SIGBUS);
}

static void sent_and_ignored(void)
{
    signal(SIGBUS, SIG_IGN);
    sent();
}

static void survive_with_earlier_handler(void)
{
    vfiopy_fault_install();
    for (int i = 1; i <= 3; i++) {
        int faulted = 0;

        if (sigsetjmp(back, 1) == 0)
            touch_without_protection();
        if (calls != i)
            _exit(2);
        vfiopy_read16(bar + page, &faulted);
        if (!faulted || calls != i)
            _exit(3);
    }
}

static void simple_handler(void)
{
    set_handler(jump, NULL);
    survive_with_earlier_handler();
}

static void full_handler(void)
{
    set_handler(NULL, count_and_describe);
    survive_with_earlier_handler();
}

/* A handler that was put on top and passes on what it does not know, to a chain that has it twice. */
static struct sigaction below;

static void pass_on(int number, siginfo_t *info, void *context)
{
    calls++;
    if (calls > 10)
        _exit(8);
    below.sa_sigaction(number, info, context);
}

static void circle(void)
{
    struct sigaction action;
    int faulted = 0;

    vfiopy_fault_install();
    memset(&action, 0, sizeof(action));
    action.sa_sigaction = pass_on;
    action.sa_flags = SA_SIGINFO;
    sigaction(SIGBUS, &action, &below);
    if (vfiopy_fault_installed() || vfiopy_fault_install() != 0 || !vfiopy_fault_installed())
        _exit(2);
    vfiopy_read32(bar + page, &faulted);
    if (!faulted || calls)
        _exit(3);
    touch_without_protection();
}

/* What faulthandler does: say it, put back what was there, send the signal again. */
static void say_and_resend(int number)
{
    calls++;
    if (calls > 1)
        _exit(7);
    sigaction(number, &below, NULL);
    raise(number);
}

static void resent(void)
{
    struct sigaction action;

    vfiopy_fault_install();
    memset(&action, 0, sizeof(action));
    action.sa_handler = say_and_resend;
    action.sa_flags = SA_NODEFER;
    sigaction(SIGBUS, &action, &below);
    vfiopy_fault_install();
    touch_without_protection();
}

/* A signal that was sent while the program counter happens to be at an accessor is not a fault. */
static void sent_from_outside_while_accessing(void)
{
    pid_t parent = getpid();
    pid_t child = fork();
    int faulted = 0;

    if (child == 0) {
        usleep(20000);
        kill(parent, SIGBUS);
        _exit(0);
    }
    vfiopy_fault_install();
    for (;;) {
        vfiopy_read32(bar, &faulted);
        if (faulted)
            _exit(6);
    }
}

static void install_is_idempotent(void)
{
    CHECK(vfiopy_fault_installed());
    for (int i = 0; i < 100; i++)
        CHECK_EQUAL(vfiopy_fault_install(), 0);
    CHECK(vfiopy_fault_installed());
}

/* Somebody who takes the signal again and again must not make the list of earlier handlers grow over its end. */
static void many_handlers_on_top(void)
{
    for (int i = 0; i < 50; i++) {
        signal(SIGBUS, i % 2 ? SIG_DFL : SIG_IGN);
        CHECK_EQUAL(vfiopy_fault_install(), 0);
    }
    fault_often(NULL);
}

int main(void)
{
    int bus;

    make_bar();
    CHECK(!vfiopy_fault_installed());
    CHECK_EQUAL(vfiopy_fault_install(), 0);
    RUN(install_is_idempotent);
    RUN(accessors8);
    RUN(accessors16);
    RUN(accessors32);
    RUN(accessors64);
    RUN(runs_stop_where_the_memory_does);
    RUN(a_poll_reports_it);
    RUN(threads_fault_at_once);

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
    bus = -1; /* the sanitizers have a say in how a process ends */
#else
    bus = SIGBUS;
#endif
    if (bus >= 0) {
        SAY("children that end");
        CHECK_EQUAL(in_child(foreign_fault), bus);
        CHECK_EQUAL(in_child(ignored_fault), bus);
        CHECK_EQUAL(in_child(sent), bus);
        CHECK_EQUAL(in_child(sent_and_ignored), 0);
        CHECK_EQUAL(in_child(circle), bus);
        CHECK_EQUAL(in_child(resent), bus);
        CHECK_EQUAL(in_child(sent_from_outside_while_accessing), bus);
    }
    SAY("children that go on");
    CHECK_EQUAL(in_child(simple_handler), 0);
    CHECK_EQUAL(in_child(full_handler), 0);
    CHECK_EQUAL(in_child(many_handlers_on_top), 0);
    return 0;
}
