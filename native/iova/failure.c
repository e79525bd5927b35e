/* What is in the way, said in a struct vfiopy_failure. */
#include "internal.h"

int vfiopy_fail(struct vfiopy_failure *failure, enum vfiopy_result result)
{
    failure->result = result;
    failure->clash.state = -1;
    return result;
}

int vfiopy_fail_at(struct vfiopy_failure *failure, enum vfiopy_result result, const struct vfiopy_mapping *clash)
{
    failure->result = result;
    failure->clash.first = clash->iova.first;
    failure->clash.last = clash->iova.last;
    failure->clash.state = clash->state;
    return result;
}

int vfiopy_fail_range(struct vfiopy_failure *failure, enum vfiopy_result result, struct vfiopy_range clash)
{
    failure->result = result;
    failure->clash.first = clash.first;
    failure->clash.last = clash.last;
    failure->clash.state = -1;
    return result;
}
