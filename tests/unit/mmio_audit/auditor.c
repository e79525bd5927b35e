/*
 * See every access of this process to a range of memory, x86-64 only.
 *
 * The range has no permissions. An access raises SIGSEGV; the handler writes down which instruction touched which
 * address, opens the range, and lets exactly that instruction run by setting the CPU's trap flag; the SIGTRAP after it
 * closes the range again. A repeated string instruction traps once per repetition, so each is seen.
 *
 * For one thread at a time.
 */
#define _GNU_SOURCE
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#define MOST_ACCESSES 65536
#define TRAP_FLAG 0x100
#define WRITE_FAULT 2 /* bit of the page fault's error code */
#define LONGEST_INSTRUCTION 15

struct access {
    uint64_t offset;
    uint8_t is_write;
    uint8_t code[LONGEST_INSTRUCTION];
};

struct access audit_log[MOST_ACCESSES];
uint64_t audit_count;

static unsigned char *range;
static size_t length;
static struct sigaction earlier_segv, earlier_trap;

static void on_segv(int number, siginfo_t *info, void *argument)
{
    ucontext_t *context = argument;
    unsigned char *address = info->si_addr;
    struct access *access;

    if (address < range || address >= range + length) {
        /* Not ours: let it happen again to whoever looked after it before. */
        sigaction(number, &earlier_segv, NULL);
        return;
    }
    if (audit_count < MOST_ACCESSES) {
        access = &audit_log[audit_count++];
        access->offset = (uint64_t)(address - range);
        access->is_write = (context->uc_mcontext.gregs[REG_ERR] & WRITE_FAULT) != 0;
        memcpy(access->code, (const void *)context->uc_mcontext.gregs[REG_RIP], LONGEST_INSTRUCTION);
    }
    mprotect(range, length, PROT_READ | PROT_WRITE);
    context->uc_mcontext.gregs[REG_EFL] |= TRAP_FLAG;
}

static void on_trap(int number, siginfo_t *info, void *argument)
{
    ucontext_t *context = argument;

    (void)number;
    (void)info;
    context->uc_mcontext.gregs[REG_EFL] &= ~(long long)TRAP_FLAG;
    mprotect(range, length, PROT_NONE);
}

int audit_start(void *address, size_t size)
{
    struct sigaction action;

    range = address;
    length = size;
    audit_count = 0;
    memset(&action, 0, sizeof(action));
    action.sa_flags = SA_SIGINFO;
    action.sa_sigaction = on_segv;
    if (sigaction(SIGSEGV, &action, &earlier_segv) != 0)
        return -1;
    action.sa_sigaction = on_trap;
    if (sigaction(SIGTRAP, &action, &earlier_trap) != 0)
        return -1;
    return mprotect(range, length, PROT_NONE);
}

int audit_stop(void)
{
    int result = mprotect(range, length, PROT_READ | PROT_WRITE);

    sigaction(SIGSEGV, &earlier_segv, NULL);
    sigaction(SIGTRAP, &earlier_trap, NULL);
    return result;
}
