/* SPDX-License-Identifier: GPL-2.0 */
#ifndef _OFFMAP_INTERNAL_H
#define _OFFMAP_INTERNAL_H

#include <linux/types.h>

/* Physically contiguous memory that the kernel does not own now. */
struct offmap_piece {
	phys_addr_t start;
	u64 size;
	int nid;
};

/* What one open file has taken: @pieces in the order of its file offsets. */
struct offmap_memory {
	struct offmap_piece *pieces;
	unsigned int nr;
	u64 size;
};

/*
 * Take @size bytes away from the kernel and zero them. On -ENOMEM, @size says
 * how many could be had. May sleep long; not to be called with an mmap_lock
 * held, as memory notifiers (KSM's) wait for those who take it.
 */
struct offmap_memory *offmap_unplug(u64 *size, int nid);

/*
 * Where @offset of it is in physical memory, and in @length how many bytes are
 * contiguous from there: 0 beyond the end.
 */
phys_addr_t offmap_phys(const struct offmap_memory *mem, u64 offset, u64 *length);

/* Zero it and give it back to the kernel. Nothing may map it any more. */
void offmap_replug(struct offmap_memory *mem);

#endif /* _OFFMAP_INTERNAL_H */
