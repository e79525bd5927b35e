#include "rbtree.h"

static void set_parent(struct vfiopy_rb *node, struct vfiopy_rb *parent)
{
    node->parent_and_colour = (uintptr_t)parent | (node->parent_and_colour & 1);
}

static void set_red(struct vfiopy_rb *node)
{
    node->parent_and_colour &= ~(uintptr_t)1;
}

static void set_black(struct vfiopy_rb *node)
{
    node->parent_and_colour |= 1;
}

static void copy_colour(struct vfiopy_rb *to, const struct vfiopy_rb *from)
{
    to->parent_and_colour = (to->parent_and_colour & ~(uintptr_t)1) | (from->parent_and_colour & 1);
}

/* Put `now` where `before` hangs; `before` keeps its own links. */
static void replace_child(struct vfiopy_rb_tree *tree, struct vfiopy_rb *before, struct vfiopy_rb *now)
{
    struct vfiopy_rb *parent = vfiopy_rb_parent(before);

    if (!parent)
        tree->top = now;
    else
        parent->kid[parent->kid[1] == before] = now;
    if (now)
        set_parent(now, parent);
}

/* Move `node` one level down to `side`; its child of the other side takes its place. */
static void rotate(struct vfiopy_rb_tree *tree, struct vfiopy_rb *node, int side)
{
    struct vfiopy_rb *up = node->kid[!side];
    struct vfiopy_rb *middle = up->kid[side];

    replace_child(tree, node, up);
    up->kid[side] = node;
    set_parent(node, up);
    node->kid[!side] = middle;
    if (middle)
        set_parent(middle, node);
    if (tree->refresh) {
        tree->refresh(node);
        tree->refresh(up);
    }
}

void vfiopy_rb_touch(struct vfiopy_rb_tree *tree, struct vfiopy_rb *node)
{
    while (node && tree->refresh(node))
        node = vfiopy_rb_parent(node);
}

/* A red node has a red parent: restore the colours. */
static void balance(struct vfiopy_rb_tree *tree, struct vfiopy_rb *node)
{
    struct vfiopy_rb *parent;

    while ((parent = vfiopy_rb_parent(node)) && vfiopy_rb_is_red(parent)) {
        struct vfiopy_rb *grand = vfiopy_rb_parent(parent); /* there: the top is never red here */
        int outer = grand->kid[1] == parent;
        struct vfiopy_rb *uncle = grand->kid[!outer];

        if (vfiopy_rb_is_red(uncle)) {
            set_black(parent);
            set_black(uncle);
            set_red(grand);
            node = grand;
            continue;
        }
        if (node == parent->kid[!outer]) {
            rotate(tree, parent, outer);
            parent = node;
        }
        set_black(parent);
        set_red(grand);
        rotate(tree, grand, !outer);
        break;
    }
    set_black(tree->top);
}

void vfiopy_rb_insert(struct vfiopy_rb_tree *tree, struct vfiopy_rb *node, struct vfiopy_rb *parent, int side)
{
    node->parent_and_colour = (uintptr_t)parent | !parent; /* red, but for the top */
    node->kid[0] = node->kid[1] = NULL;
    if (parent)
        parent->kid[side] = node;
    else
        tree->top = node;
    if (tree->refresh) {
        tree->refresh(node);
        vfiopy_rb_touch(tree, parent);
    }
    if (vfiopy_rb_is_red(parent))
        balance(tree, node);
}

/* The subtree at `parent`'s `side` (maybe empty) lacks one black node on every path. */
static void refill(struct vfiopy_rb_tree *tree, struct vfiopy_rb *parent, int side)
{
    for (;;) {
        struct vfiopy_rb *sibling = parent->kid[!side];
        struct vfiopy_rb *above;

        if (vfiopy_rb_is_red(sibling)) {
            set_black(sibling);
            set_red(parent);
            rotate(tree, parent, side);
            sibling = parent->kid[!side];
        }
        if (vfiopy_rb_is_red(sibling->kid[0]) || vfiopy_rb_is_red(sibling->kid[1])) {
            if (!vfiopy_rb_is_red(sibling->kid[!side])) {
                set_black(sibling->kid[side]);
                set_red(sibling);
                rotate(tree, sibling, !side);
                sibling = parent->kid[!side];
            }
            copy_colour(sibling, parent);
            set_black(parent);
            set_black(sibling->kid[!side]);
            rotate(tree, parent, side);
            return;
        }
        set_red(sibling);
        if (vfiopy_rb_is_red(parent)) {
            set_black(parent);
            return;
        }
        above = vfiopy_rb_parent(parent);
        if (!above)
            return;
        side = above->kid[1] == parent;
        parent = above;
    }
}

void vfiopy_rb_erase(struct vfiopy_rb_tree *tree, struct vfiopy_rb *node)
{
    struct vfiopy_rb *parent, *child, *heir = NULL;
    bool lost_black;
    int side;

    if (!node->kid[0] && !node->kid[1] && (vfiopy_rb_is_red(node) || node == tree->top)) {
        parent = vfiopy_rb_parent(node);
        replace_child(tree, node, NULL);
        if (tree->refresh)
            vfiopy_rb_touch(tree, parent);
        return;
    }
    if (node->kid[0] && node->kid[1]) {
        /* The next larger node has no smaller child: it leaves its place and takes this one's. */
        heir = node->kid[1];
        while (heir->kid[0])
            heir = heir->kid[0];
        lost_black = !vfiopy_rb_is_red(heir);
        child = heir->kid[1];
        parent = vfiopy_rb_parent(heir);
        if (parent == node) {
            parent = heir;
            side = 1;
        } else {
            side = 0;
            parent->kid[0] = child;
            if (child)
                set_parent(child, parent);
            heir->kid[1] = node->kid[1];
            set_parent(heir->kid[1], heir);
        }
        heir->kid[0] = node->kid[0];
        set_parent(heir->kid[0], heir);
        copy_colour(heir, node);
        replace_child(tree, node, heir);
    } else {
        child = node->kid[0] ? node->kid[0] : node->kid[1];
        parent = vfiopy_rb_parent(node);
        side = parent && parent->kid[1] == node;
        lost_black = !vfiopy_rb_is_red(node);
        replace_child(tree, node, child);
    }
    if (tree->refresh) {
        vfiopy_rb_touch(tree, parent);
        if (heir) { /* what it held before says nothing of its new place */
            tree->refresh(heir);
            vfiopy_rb_touch(tree, vfiopy_rb_parent(heir));
        }
    }
    if (!lost_black)
        return;
    if (vfiopy_rb_is_red(child))
        set_black(child);
    else if (parent)
        refill(tree, parent, side);
}

struct vfiopy_rb *vfiopy_rb_end(const struct vfiopy_rb_tree *tree, int side)
{
    struct vfiopy_rb *node = tree->top;

    while (node && node->kid[side])
        node = node->kid[side];
    return node;
}

struct vfiopy_rb *vfiopy_rb_step(const struct vfiopy_rb *node, int side)
{
    struct vfiopy_rb *next = node->kid[side];

    if (next) {
        while (next->kid[!side])
            next = next->kid[!side];
        return next;
    }
    for (next = vfiopy_rb_parent(node); next && next->kid[side] == node; next = vfiopy_rb_parent(next))
        node = next;
    return next;
}

const char *vfiopy_rb_verify(const struct vfiopy_rb_tree *tree, unsigned *height, size_t *count)
{
    const struct vfiopy_rb *node = vfiopy_rb_end(tree, 0);
    unsigned expected_black = 0, tallest = 0;
    size_t nodes = 0;

    if (tree->top && (vfiopy_rb_parent(tree->top) || vfiopy_rb_is_red(tree->top)))
        return "the top is red or has a parent";
    for (; node; node = vfiopy_rb_step(node, 1), nodes++) {
        const struct vfiopy_rb *up;
        unsigned black = 0, depth = 0;

        for (int side = 0; side < 2; side++) {
            if (node->kid[side] && vfiopy_rb_parent(node->kid[side]) != node)
                return "a child does not know its parent";
            if (vfiopy_rb_is_red(node) && vfiopy_rb_is_red(node->kid[side]))
                return "a red node has a red child";
        }
        if (node->kid[0] && node->kid[1])
            continue;
        for (up = node; up; up = vfiopy_rb_parent(up), depth++)
            black += !vfiopy_rb_is_red(up);
        if (expected_black && black != expected_black)
            return "black heights differ";
        expected_black = black;
        if (depth > tallest)
            tallest = depth;
    }
    if (height)
        *height = tallest;
    if (count)
        *count = nodes;
    return NULL;
}
