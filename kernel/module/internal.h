/* SPDX-License-Identifier: GPL-2.0 */
#ifndef _OFFMAP_INTERNAL_H
#define _OFFMAP_INTERNAL_H

#include <linux/completion.h>
#include <linux/ioport.h>
#include <linux/list.h>
#include <linux/mutex.h>
#include <linux/types.h>
#include <linux/workqueue.h>

#include "compat.h"

struct address_space;
struct offmap_memory;
struct pool;

/* A source of pages. */
struct offmap_source {
	const char *name;
	/* Whether it has runs that are worth a large page. */
	bool large;
	/*
	 * Return the physical address of @offset, and in @length how many bytes
	 * are contiguous from there: 0 beyond the end, and in a hole.
	 */
	phys_addr_t (*phys)(const struct offmap_memory *mem, u64 offset, u64 *length);
	/* Try to have a page at @offset, where there is none. May be NULL. */
	int (*fill)(struct offmap_memory *mem, u64 offset);
	/* Whether a page of these has failed. May be NULL. */
	bool (*poisoned)(const struct offmap_memory *mem, u64 offset, u64 length);
	/* Give the memory back, now or later. No process may map it any more. */
	void (*release)(struct offmap_memory *mem);
};

/* What one open file has. */
struct offmap_memory {
	const struct offmap_source *source;
	u64 size;
	struct address_space *mapping;	/* of the file, while it has the memory */
	/*
	 * Called with @all when the memory is back, and maybe once before,
	 * without it, when that will take longer.
	 */
	void (*returned)(struct offmap_memory *mem, bool all);
	void *file;
};

/* Physically contiguous memory that the kernel does not own now. */
struct piece {
	struct list_head node;		/* of its owner, or of those on their way back */
	struct list_head all;		/* every piece */
	struct unplugged *owner;	/* NULL: no open file had it */
	struct pool *pool;		/* NULL: it is in no pool */
	phys_addr_t start;
	u64 size;
	int nid;
	bool movable;			/* it was in ZONE_MOVABLE, and goes back there */
	bool gigabyte;			/* we have all of the gigabyte that it is in */
	bool claimed;			/* in the resource tree */
	bool zeroed;
	bool mapped;			/* when it was last looked at */
	bool quarantine;		/* does not go back while VFIO has a device open */
	bool reported;			/* as one that cannot go back yet */
	unsigned long since;		/* jiffies: on its way back */
	unsigned long *bad;		/* a bit a page: it has failed */
#ifdef OFFMAP_HAVE_PFN_ADDRESS_SPACE
	struct pfn_address_space space;
#endif
};

struct unplugged {
	struct offmap_memory mem;
	struct list_head pieces;	/* in the order of file offsets */
	unsigned int out;		/* pieces that are not back, while they go back */
	bool slow;			/* has been told */
};

/* main.c: something changed that sysfs shows, or that kdump must know. */
void offmap_changed(bool memory);

/*
 * map.c. What is mapped changes under the invalidate lock of the file, and the
 * memory is there for as long as the file.
 */
int offmap_may_map(struct vm_area_struct *vma);
int offmap_map(struct offmap_memory *mem, struct vm_area_struct *vma, bool guarded);
unsigned long offmap_get_unmapped_area(struct file *file, unsigned long addr, unsigned long len,
				       unsigned long pgoff, unsigned long flags);
/* -ENXIO: it is no mapping of ours. -ENODATA: it has nothing at @addr. */
int offmap_translate(struct vm_area_struct *vma, unsigned long addr, u64 *phys, u64 *length);
/* The memory without struct page that a mapping is of, or NULL. */
struct offmap_memory *offmap_vma_memory(struct vm_area_struct *vma);

/* unplug.c: what the parameters say. */
u64 offmap_reserve(void);
unsigned long offmap_block_timeout(void);
void offmap_uncommit(u64 size);
/* False if memory is out, or somebody is getting some. Else nobody will. */
bool offmap_stop_taking(void);
void offmap_go_on_taking(void);

/*
 * Take @size bytes away from the kernel and zero them. On -ENOMEM and
 * -ETIMEDOUT, @size says how many could be had. Waits for them, interruptibly or,
 * with @killable, until the caller is killed.
 */
struct offmap_memory *offmap_unplug(u64 *size, int nid, bool killable);
ssize_t offmap_show_requests(char *buf);

/* The file offset, in pages, of @pfn. */
int offmap_pgoff(const struct offmap_memory *mem, unsigned long pfn, pgoff_t *pgoff);

/*
 * iomem.c: what is offline becomes a resource of its own that does not count as
 * RAM, and RAM again before it goes online. Both with the kernel's hotplug lock
 * held, as in a memory notifier, and once the resources for it are there.
 */
struct ram_split {
	struct resource *below, *block, *above, *again;
	struct resource ram;		/* a copy of what was there before */
	bool carved;
};

int offmap_prepare_carving(struct ram_split *split);
int offmap_carve_ram(phys_addr_t start, phys_addr_t end, struct ram_split *split);
int offmap_uncarve_ram(struct ram_split *split);
/* It is removed, or RAM: free what is left. */
void offmap_end_carving(struct ram_split *split);

/*
 * hotplug.c. What a thread of ours does to a range. No two do anything to the
 * same, so what is online stays so, and its struct pages can be read.
 */
struct offmap_operation {
	struct list_head node;
	struct task_struct *task;
	phys_addr_t start;
	u64 size;
	bool adding;
	bool movable;			/* adding: to ZONE_MOVABLE */
	/* What follows is of a removal. */
	bool poisoned;			/* a page had failed when it went offline */
	unsigned long deadline;		/* jiffies */
	unsigned long offline;		/* a bit a block: it went offline */
	unsigned long was_movable;	/* a bit a block: it was in ZONE_MOVABLE */
	struct delayed_work expiry;
	struct ram_split split;
	int split_error;		/* it could not be carved out */
};

int offmap_begin(struct offmap_operation *op);
void offmap_end(struct offmap_operation *op);
/*
 * May take as long as one block's timeout for each block, and once more. Ends
 * soon after the deadline, or when a signal is pending: then all of it is online
 * again. -EHWPOISON: it is removed, and a page of it failed meanwhile.
 */
int offmap_remove_memory(struct offmap_operation *op);
int offmap_add_memory(const struct piece *piece);
/* What keeps a block that is in an operation, as far as can be told; or NULL. */
const char *offmap_obstacle(phys_addr_t start, u64 size);
/* Read from a file of sysfs. How many bytes, or an error. */
ssize_t offmap_read_sysfs(const char *name, char *buf, size_t size);
int offmap_hotplug_init(void);
void offmap_hotplug_exit(void);

/* return.c: give a piece back, as soon as nothing maps it. */
void offmap_return(struct piece *piece);
void offmap_return_all(struct unplugged *unplugged);
u64 offmap_returning(void);
/* Whether any is on its way that should be back soon, and wait until there is none. */
bool offmap_due(void);
void offmap_due_begin(void);
void offmap_due_end(void);
int offmap_await_due(unsigned long deadline, bool killable);
/*
 * How many jiffies to wait at once for what ends by @deadline, or 0 if that is
 * over. The timer of a wait comes up to an eighth of it late.
 */
static inline unsigned long offmap_step(unsigned long deadline)
{
	long left = deadline - jiffies;

	return left > 0 ? left - left / 8 : 0;
}

u64 offmap_kept(void);
/* Keep a piece out for good, as a page of it has failed. */
void offmap_keep(struct piece *piece);
bool offmap_unplug_active(void);
void offmap_piece_out(struct piece *piece);
int offmap_return_init(void);
void offmap_return_exit(void);

/* poison.c */
extern struct mutex offmap_pieces_lock;
extern struct list_head offmap_pieces;		/* under offmap_pieces_lock */
void offmap_watch_all(struct offmap_memory *mem, struct address_space *mapping);
void offmap_unwatch_all(struct offmap_memory *mem);
bool offmap_poisoned(const struct piece *piece);
/*
 * For memory_failure(), which asks without letting us sleep. Whether a mapping
 * has a page of its file: of one that it has not, it would kill the process.
 */
bool offmap_vma_has(struct vm_area_struct *vma, pgoff_t pgoff);
/* A page has failed: it is marked soon. */
void offmap_page_failed(unsigned long pfn);
void offmap_poison_init(void);
void offmap_poison_exit(void);

/* pool.c: pages of a piece have failed. With offmap_pieces_lock held. */
void offmap_pool_failed(struct piece *piece);
/* Whether user space may drive a device. */
bool offmap_any_vfio(void);

/*
 * alias.c: find what a kernel page table maps. An error if that cannot be told.
 * Ranges are in ascending order, and do not overlap.
 */
struct offmap_range {
	phys_addr_t start;
	u64 size;
	bool mapped;
};

int offmap_find_mapped(struct offmap_range *ranges, unsigned int nr);
void offmap_sort_pieces(struct list_head *pieces);
/* Sorts them, and sets piece->mapped. */
int offmap_find_mapped_pieces(struct list_head *pieces);

/*
 * walkers.c: wait until nobody reads struct pages of memory that is offline now.
 * -ETIMEDOUT: at @deadline, somebody may still do so.
 */
int offmap_await_walkers(unsigned long deadline);

/* zero.c */
extern struct workqueue_struct *offmap_workqueue;
int offmap_zero(phys_addr_t start, u64 size, bool keep);
int offmap_zero_again(phys_addr_t start, u64 size);
int offmap_zero_init(void);
void offmap_zero_exit(void);

/* bridge.c: all pages of the secretmem file @fd. */
struct offmap_memory *offmap_bind_secretmem(int fd);

#endif /* _OFFMAP_INTERNAL_H */
