/*
 * A red-black tree that its elements are part of, and that can keep a value per subtree.
 *
 * The tree never allocates and never compares: the caller finds the place, the tree keeps itself
 * balanced. `refresh` recomputes what a node says of its subtree from the node and its children.
 */
#ifndef VFIOPY_IOVA_RBTREE_H
#define VFIOPY_IOVA_RBTREE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct vfiopy_rb {
    uintptr_t parent_and_colour; /* bit 0 set: black */
    struct vfiopy_rb *kid[2];    /* smaller, larger */
};

struct vfiopy_rb_tree {
    struct vfiopy_rb *top;
    bool (*refresh)(struct vfiopy_rb *node); /* true if the node's value changed; NULL: the tree keeps none */
};

#define VFIOPY_ENTRY(pointer, type, member) ((type *)((char *)(pointer) - offsetof(type, member)))

static inline struct vfiopy_rb *vfiopy_rb_parent(const struct vfiopy_rb *node)
{
    return (struct vfiopy_rb *)(node->parent_and_colour & ~(uintptr_t)1);
}

static inline bool vfiopy_rb_is_red(const struct vfiopy_rb *node)
{
    return node && !(node->parent_and_colour & 1);
}

/* Link a node below `parent` (NULL: the tree is empty) on the given side, then balance. */
void vfiopy_rb_insert(struct vfiopy_rb_tree *tree, struct vfiopy_rb *node, struct vfiopy_rb *parent,
                      int side);

void vfiopy_rb_erase(struct vfiopy_rb_tree *tree, struct vfiopy_rb *node);

/* The node's own key changed, its place did not: bring the values above it up to date. Only for trees with values. */
void vfiopy_rb_touch(struct vfiopy_rb_tree *tree, struct vfiopy_rb *node);

/* Smallest (side 0) or largest (side 1) node, or NULL. */
struct vfiopy_rb *vfiopy_rb_end(const struct vfiopy_rb_tree *tree, int side);

/* Next smaller (side 0) or next larger (side 1) node, or NULL. */
struct vfiopy_rb *vfiopy_rb_step(const struct vfiopy_rb *node, int side);

/* NULL if links, colours and black heights are right, else what is wrong. Height and number of nodes on request. */
const char *vfiopy_rb_verify(const struct vfiopy_rb_tree *tree, unsigned *height, size_t *count);

#endif
