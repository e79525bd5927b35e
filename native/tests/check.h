/* The least that a C test needs: CHECK says where and what, RUN names the test, the program's status says the rest. */
#ifndef VFIOPY_TESTS_CHECK_H
#define VFIOPY_TESTS_CHECK_H

#include <stdio.h>
#include <stdlib.h>

#define CHECK(condition)                                                                                               \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "%s:%d: %s: not true: %s\n", __FILE__, __LINE__, __func__, #condition);                    \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

/* Compare two integers and show both. */
#define CHECK_EQUAL(left, right)                                                                                       \
    do {                                                                                                               \
        unsigned long long left_value = (unsigned long long)(left);                                                    \
        unsigned long long right_value = (unsigned long long)(right);                                                  \
                                                                                                                       \
        if (left_value != right_value) {                                                                               \
            fprintf(stderr, "%s:%d: %s: %s is 0x%llx, %s is 0x%llx\n", __FILE__, __LINE__, __func__, #left,            \
                    left_value, #right, right_value);                                                                  \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

/* Flushed: a child that is forked later must not print it again. */
#define SAY(text)                                                                                                      \
    do {                                                                                                               \
        printf("  %s\n", text);                                                                                        \
        fflush(stdout);                                                                                                \
    } while (0)

#define RUN(test)                                                                                                      \
    do {                                                                                                               \
        SAY(#test);                                                                                                    \
        test();                                                                                                        \
    } while (0)

#endif
