/*
 * The SIGBUS handler. See fault.h for what it promises.
 *
 * It may be reached twice for one signal: when somebody installed a handler above ours that passes signals on, and
 * ours was then put on top again, the chain is a circle. It may also be reached a second time by a signal that an
 * earlier handler sends itself after it has restored what it found (faulthandler prints, restores, raises). Both ways
 * the answer is to go one handler further down; at the bottom is the default action.
 */
#define _GNU_SOURCE
#include "region/fault.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>
#include <string.h>
#include <ucontext.h>
#include <unistd.h>

#include "region/access.h"

#define MOST_EARLIER 8

/* The linker makes these for a section whose name is a C identifier. Hidden: each shared object has a table of its own. */
extern const struct vfiopy_fault_entry __start_vfiopy_faults[] __attribute__((visibility("hidden")));
extern const struct vfiopy_fault_entry __stop_vfiopy_faults[] __attribute__((visibility("hidden")));

/* Handlers found in place when ours was installed, oldest first. Only the last line of a full table ever changes. */
static struct sigaction earlier[MOST_EARLIER];
static atomic_int earlier_count;
static pthread_mutex_t install_lock = PTHREAD_MUTEX_INITIALIZER;
static atomic_uint_least64_t fixed_up;

/*
 * Where this thread is in the chain. A second call for the same signal has the same context and a deeper stack; the
 * stack tells it from a later signal after an earlier handler has jumped out. initial-exec: reading thread-local
 * storage in a handler must not allocate.
 */
struct chain_position {
    const void *context;
    uintptr_t frame;
    int level;
};
static _Thread_local struct chain_position chain __attribute__((tls_model("initial-exec")));

static uintptr_t get_pc(const ucontext_t *context)
{
#if defined(__x86_64__)
    return (uintptr_t)context->uc_mcontext.gregs[REG_RIP];
#else
    return (uintptr_t)context->uc_mcontext.pc;
#endif
}

static void set_pc(ucontext_t *context, uintptr_t pc)
{
#if defined(__x86_64__)
    context->uc_mcontext.gregs[REG_RIP] = (greg_t)pc;
#else
    context->uc_mcontext.pc = pc;
#endif
}

static uintptr_t find_fixup(uintptr_t pc)
{
    for (const struct vfiopy_fault_entry *entry = __start_vfiopy_faults; entry < __stop_vfiopy_faults; entry++)
        if ((uintptr_t)&entry->access + (uintptr_t)(intptr_t)entry->access == pc)
            return (uintptr_t)&entry->fixup + (uintptr_t)(intptr_t)entry->fixup;
    return 0;
}

/* Leave it to the kernel: a fault happens again when the handler returns; a signal that was sent is sent again. */
static void default_action(int number, bool sent)
{
    struct sigaction action;

    memset(&action, 0, sizeof(action));
    action.sa_handler = SIG_DFL;
    sigaction(number, &action, NULL);
    if (sent)
        raise(number);
}

static void call_earlier(int number, siginfo_t *info, void *context, int level)
{
    const struct sigaction *action = &earlier[level];
    bool sent = info->si_code <= 0;

    if (action->sa_flags & SA_SIGINFO)
        action->sa_sigaction(number, info, context);
    else if (action->sa_handler == SIG_DFL)
        default_action(number, sent);
    else if (action->sa_handler != SIG_IGN)
        action->sa_handler(number);
    else if (!sent) /* the kernel does not let a fault be ignored either */
        default_action(number, sent);
}

static void on_bus_error(int number, siginfo_t *info, void *context)
{
    int saved_errno = errno;
    uintptr_t frame = (uintptr_t)__builtin_frame_address(0);
    uintptr_t fixup = 0;
    bool again, resent;
    int level;

    if (info->si_code > 0 && info->si_code != BUS_MCEERR_AO)
        fixup = find_fixup(get_pc(context));
    if (fixup) {
        set_pc(context, fixup);
        atomic_fetch_add_explicit(&fixed_up, 1, memory_order_relaxed);
        errno = saved_errno;
        return;
    }

    level = atomic_load_explicit(&earlier_count, memory_order_acquire) - 1;
    again = chain.context == context && frame < chain.frame;
    resent = info->si_code == SI_TKILL && info->si_pid == getpid() && chain.level > 0;
    if (again || resent)
        level = chain.level - 1;
    if (level < 0) {
        default_action(number, info->si_code <= 0);
    } else {
        struct chain_position outer = chain;

        chain = (struct chain_position){context, frame, level};
        call_earlier(number, info, context, level);
        chain.context = outer.context;
        chain.frame = outer.frame;
    }
    errno = saved_errno;
}

static bool is_ours(const struct sigaction *action)
{
    return (action->sa_flags & SA_SIGINFO) && action->sa_sigaction == on_bus_error;
}

bool vfiopy_fault_installed(void)
{
    struct sigaction now;

    return sigaction(SIGBUS, NULL, &now) == 0 && is_ours(&now);
}

/*
 * Remember what we replace. A handler that is known already (pytest switches faulthandler on and off) is not kept
 * twice; when the table is full the newest line is reused, so that the table cannot grow without bound.
 */
static void remember(const struct sigaction *action)
{
    int count = atomic_load_explicit(&earlier_count, memory_order_relaxed);

    if (count > 0 && earlier[count - 1].sa_sigaction == action->sa_sigaction
        && earlier[count - 1].sa_flags == action->sa_flags)
        return;
    if (count == MOST_EARLIER)
        count--;
    earlier[count] = *action;
    atomic_store_explicit(&earlier_count, count + 1, memory_order_release);
}

int vfiopy_fault_install(void)
{
    struct sigaction ours, now;
    int result = 0;

    if (vfiopy_fault_installed())
        return 0;

    memset(&ours, 0, sizeof(ours));
    ours.sa_sigaction = on_bus_error;
    ours.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART;
    sigemptyset(&ours.sa_mask);

    pthread_mutex_lock(&install_lock);
    if (sigaction(SIGBUS, NULL, &now) != 0) {
        result = -errno;
    } else if (!is_ours(&now)) {
        remember(&now);
        if (sigaction(SIGBUS, &ours, NULL) != 0)
            result = -errno;
    }
    pthread_mutex_unlock(&install_lock);
    return result;
}

uint64_t vfiopy_fault_count(void)
{
    return atomic_load_explicit(&fixed_up, memory_order_relaxed);
}
