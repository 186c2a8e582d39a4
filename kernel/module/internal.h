/* SPDX-License-Identifier: GPL-2.0 */
#ifndef _OFFMAP_INTERNAL_H
#define _OFFMAP_INTERNAL_H

#include <linux/types.h>

struct offmap_memory;

/* A source of pages. */
struct offmap_source {
	const char *name;
	/* Whether it has runs that are worth a large page. */
	bool large;
	/*
	 * Where @offset of it is in physical memory, and in @length how many
	 * bytes are contiguous from there: 0 beyond the end.
	 */
	phys_addr_t (*phys)(const struct offmap_memory *mem, u64 offset, u64 *length);
	/* Give it back. Nothing may map it any more. */
	void (*release)(struct offmap_memory *mem);
};

/* What one open file has. */
struct offmap_memory {
	const struct offmap_source *source;
	u64 size;
};

/*
 * Take @size bytes away from the kernel and zero them. On -ENOMEM, @size says
 * how many could be had. May sleep long; not to be called with an mmap_lock
 * held, as memory notifiers (KSM's) wait for those who take it.
 */
struct offmap_memory *offmap_unplug(u64 *size, int nid);
bool offmap_unplug_active(void);
int offmap_unplug_init(void);
void offmap_unplug_exit(void);

/* All pages of the secretmem file @fd. */
struct offmap_memory *offmap_bind_secretmem(int fd);

#endif /* _OFFMAP_INTERNAL_H */
