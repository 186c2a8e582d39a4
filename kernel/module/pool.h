/* SPDX-License-Identifier: GPL-2.0 */
/* A pool of memory that the kernel does not own, which is given out as files. */
#ifndef _OFFMAP_POOL_H
#define _OFFMAP_POOL_H

#include <linux/interval_tree.h>
#include <linux/list.h>
#include <linux/mutex.h>
#include <linux/rbtree.h>
#include <linux/uidgid.h>
#include <linux/wait.h>
#include <linux/workqueue.h>

#include "internal.h"

struct fs_context;
struct inode;

/*
 * Pages that are contiguous in physical memory. It is in one tree or list at a
 * time: so freeing memory needs none.
 */
struct run {
	struct interval_tree_node node;	/* pages of a file; else, PFNs */
	struct list_head list;
	unsigned long pfn;
	bool held;			/* to be cleaned, and could not be */
	struct pool_user *user;		/* to be cleaned: whose it was */
#ifdef OFFMAP_HAVE_PFN_ADDRESS_SPACE
	struct pfn_address_space space;	/* while it is a file's */
#endif
};

static inline unsigned long run_pages(const struct run *run)
{
	return run->node.last - run->node.start + 1;
}

/* What a pool is mounted with, beside its size. */
struct pool_settings {
	int nid;
	kuid_t uid;
	kgid_t gid;
	umode_t mode;
	unsigned long quota;		/* pages that one user may have; 0: any number */
	bool allow_nested;
	bool allow_vfio;
};

/* Who owns files of a pool, or did. */
struct pool_user {
	struct list_head node;		/* of pool->users */
	kuid_t uid;
	unsigned long nr_files;
	unsigned long nr_runs;		/* that files gave back, and that are not clean yet */
	unsigned long nr_pages;		/* of files and of these runs */
	unsigned long nr_dirty;		/* of these pages: to be cleaned, and soon */
};

struct pool {
	struct list_head node;		/* of all pools */
	dev_t dev;
	struct pool_settings set;
	bool any_failed;		/* a page has */

	struct mutex lock;		/* guards what follows */
	struct list_head pieces;
	struct rb_root_cached free;	/* runs of zeroes, by PFN */
	struct list_head dirty;		/* runs that must be cleaned */
	struct list_head users;
	unsigned long nr_pages;
	unsigned long nr_free;
	unsigned long nr_dirty;		/* to be cleaned, and soon */
	unsigned long nr_held;		/* to be cleaned, when nothing maps them any more */
	unsigned long nr_bad;		/* never given out again */
	unsigned int settled;		/* changes when a dirty run has become free, or held */
	struct delayed_work cleaner;
	unsigned long pause;		/* jiffies, until it tries again */
	wait_queue_head_t cleaned;

	atomic_t nr_inodes;		/* files and folders */
	struct mutex files_lock;	/* guards what follows */
	unsigned long nr_files;
	struct list_head files;
};

/* The memory of a file. */
struct pool_file {
	struct offmap_memory mem;
	struct pool *pool;
	struct inode *inode;
	struct list_head node;		/* of pool->files */
	struct pool_user *user;		/* under pool->lock */
	/* By page of the file. Changes under the invalidate lock of the inode. */
	struct rb_root_cached runs;
	unsigned long nr_pages;
};

/* runs.c */
struct run *run_first(struct rb_root_cached *root, unsigned long first, unsigned long last);
struct run *run_next(struct run *run, unsigned long first, unsigned long last);
/* Insert a run by its PFN, and merge it with its neighbours. */
void run_insert_free(struct rb_root_cached *root, struct run *run);
/* Take [@pfn, @pfn + @nr) out of @run, which has them. NULL: no memory for a struct. */
struct run *run_carve(struct rb_root_cached *root, struct run *run, unsigned long pfn,
		      unsigned long nr);
/*
 * Where the next search for each size begins, in PFNs: below, there is nothing of
 * it. At first 0, and good for as long as nothing becomes free. A user can make
 * free runs of single pages by the million: not every search may walk over all.
 */
struct run_search {
	unsigned long aligned[2];	/* a gigabyte, 2 MiB */
	unsigned long small;
};

/*
 * Take pages for the page @pgoff of a file, and up to @nr - 1 after it: as many
 * as can be mapped by the largest pages. An error if there are none.
 */
struct run *run_take(struct rb_root_cached *root, struct run_search *search, unsigned long pgoff,
		     unsigned long nr);

/* How many files and folders a pool may have. */
#define POOL_MAX_INODES 65536

/* pool.c */
int pool_grow(struct pool *pool, u64 size);
/* Give back down to @size bytes. How many bytes there are then. */
u64 pool_shrink(struct pool *pool, u64 size);
void pool_init(struct pool *pool);
void pool_destroy(struct pool *pool);
/*
 * Fill holes of a file among the pages @first to @last. All or nothing: -ENOSPC
 * if there is no room, -EDQUOT if its owner may not have so much. Waits for pages
 * that are being cleaned: interruptibly or, for a @fault, until the caller is
 * killed. A fault gets nothing behind the end of the file (-EFAULT).
 */
int pool_file_fill(struct pool_file *file, unsigned long first, unsigned long last, bool fault);
void pool_file_punch(struct pool_file *file, unsigned long first, unsigned long last);
int pool_file_init(struct pool *pool, struct inode *inode);
/* The owner of the inode has changed. */
void pool_file_set_owner(struct pool_file *file);
void pool_file_free(struct pool_file *file);
ssize_t offmap_show_pools(char *buf);
ssize_t offmap_show_pool_users(char *buf);

/* poolfs.c */
int offmap_poolfs_init(void);
void offmap_poolfs_exit(void);

#endif /* _OFFMAP_POOL_H */
