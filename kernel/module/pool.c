// SPDX-License-Identifier: GPL-2.0
/*
 * A pool of memory that the kernel does not own.
 *
 * Pages are free, or a file's, or dirty: they were a file's, and nobody may see
 * what is in them. A worker cleans those: it looks whether the kernel still maps
 * them, as KVM may for as long as a VM lives that ran on them, zeroes what is not
 * mapped, and only then counts it as free. The rest is held back, and looked at
 * again.
 *
 * A file has all its pages from the moment it gets its size, so that a guest
 * never finds that there are none. Only where pages were given back
 * (FALLOC_FL_PUNCH_HOLE), a page is found when it is touched, or not.
 *
 * Locks: the inode's, its invalidate lock, pool->lock. Nothing sleeps long under
 * pool->lock.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/delay.h>
#include <linux/err.h>
#include <linux/fs.h>
#include <linux/kdev_t.h>
#include <linux/list_sort.h>
#include <linux/mm.h>
#include <linux/pci.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include <linux/sysfs.h>
#include <linux/vmalloc.h>

#include "pool.h"

#define SOONEST	(HZ / 50)
#define LATEST	(5 * HZ)
/* Pages that are zeroed before any of them is free, as all TLBs are flushed for that. */
#define AT_ONCE	(PUD_SIZE >> PAGE_SHIFT)

static LIST_HEAD(pools);
static DEFINE_MUTEX(pools_lock);

/* --- memory that has failed ----------------------------------------------- */

/*
 * The first page of [@pfn, @pfn + @nr) that has failed, or @pfn + @nr. With
 * pool->lock held.
 */
static unsigned long first_failed(struct pool *pool, unsigned long pfn, unsigned long nr)
{
	unsigned long found = pfn + nr, start, first, end;
	struct piece *piece;

	if (!READ_ONCE(pool->any_failed))
		return found;
	list_for_each_entry(piece, &pool->pieces, node) {
		start = PHYS_PFN(piece->start);
		first = max(pfn, start);
		end = min(found, start + PHYS_PFN(piece->size));
		if (first >= end)
			continue;
		first = start + find_next_bit(piece->bad, end - start, first - start);
		if (first < end)
			found = first;
	}
	return found;
}

/* Where a file has a page, if it has: unmap it. */
static void unmap_page(struct pool_file *file, unsigned long pfn)
{
	struct address_space *mapping = file->inode->i_mapping;
	unsigned long pgoff;
	struct run *run;

	filemap_invalidate_lock_shared(mapping);
	for (run = run_first(&file->runs, 0, ULONG_MAX); run; run = run_next(run, 0, ULONG_MAX)) {
		if (pfn - run->pfn >= run_pages(run))
			continue;
		pgoff = run->node.start + (pfn - run->pfn);
		unmap_mapping_range(mapping, (loff_t)pgoff << PAGE_SHIFT, PAGE_SIZE, 1);
	}
	filemap_invalidate_unlock_shared(mapping);
}

static void page_failed(struct pool *pool, unsigned long pfn)
{
	struct pool_file *file;
	struct run *run;

	mutex_lock(&pool->lock);
	run = run_first(&pool->free, pfn, pfn);
	if (run)
		run = run_carve(&pool->free, run, pfn, 1);
	if (run) {
		pool->nr_free--;
		pool->nr_bad++;
		kfree(run);
	}
	mutex_unlock(&pool->lock);
	mutex_lock(&pool->files_lock);
	list_for_each_entry(file, &pool->files, node)
		unmap_page(file, pfn);
	mutex_unlock(&pool->files_lock);
}

void offmap_pool_failed(struct piece *piece)
{
	unsigned long bit;

	/* First: who faults from now on looks. */
	WRITE_ONCE(piece->pool->any_failed, true);
	for_each_set_bit(bit, piece->bad, PHYS_PFN(piece->size))
		page_failed(piece->pool, PHYS_PFN(piece->start) + bit);
}

static bool pool_poisoned(const struct offmap_memory *mem, u64 offset, u64 length)
{
	struct pool_file *file = container_of(mem, struct pool_file, mem);
	unsigned long first = offset >> PAGE_SHIFT, last = (offset + length - 1) >> PAGE_SHIFT;
	unsigned long from, nr;
	struct run *run;
	bool ret = false;

	if (!READ_ONCE(file->pool->any_failed))
		return false;
	mutex_lock(&file->pool->lock);
	for (run = run_first(&file->runs, first, last); run && !ret;
	     run = run_next(run, first, last)) {
		from = max(first, run->node.start);
		nr = min(last, run->node.last) - from + 1;
		from = run->pfn + (from - run->node.start);
		ret = first_failed(file->pool, from, nr) < from + nr;
	}
	mutex_unlock(&file->pool->lock);
	return ret;
}

/*
 * From Linux 7.0 on, memory_failure() finds who maps a page by the files that
 * have registered it, and sends a signal with the address.
 */
#ifdef OFFMAP_HAVE_PFN_ADDRESS_SPACE
static int pool_pfn_to_pgoff(struct vm_area_struct *vma, unsigned long pfn, pgoff_t *pgoff)
{
	struct address_space *mapping = vma->vm_file->f_mapping;
	struct offmap_memory *mem = offmap_vma_memory(vma);
	struct pool_file *file;
	struct run *run;
	int ret = -ENOENT;

	/* We must not sleep here. If it fails, the page is just being given back. */
	if (!mem || !filemap_invalidate_trylock_shared(mapping))
		return -ENOENT;
	file = container_of(mem, struct pool_file, mem);
	for (run = run_first(&file->runs, 0, ULONG_MAX); run; run = run_next(run, 0, ULONG_MAX)) {
		if (pfn - run->pfn >= run_pages(run))
			continue;
		*pgoff = run->node.start + (pfn - run->pfn);
		if (offmap_vma_has(vma, *pgoff))
			ret = 0;
		break;
	}
	filemap_invalidate_unlock_shared(mapping);
	if (!ret)
		offmap_page_failed(pfn);
	return ret;
}

static void watch_run(struct pool_file *file, struct run *run)
{
	run->space = (struct pfn_address_space){
		.node.start = run->pfn,
		.node.last = run->pfn + run_pages(run) - 1,
		.mapping = file->inode->i_mapping,
		.pfn_to_vma_pgoff = pool_pfn_to_pgoff,
	};
	if (register_pfn_address_space(&run->space))
		run->space.mapping = NULL;
}

static void unwatch_run(struct run *run)
{
	if (run->space.mapping)
		unregister_pfn_address_space(&run->space);
}
#else
static void watch_run(struct pool_file *file, struct run *run)
{
}

static void unwatch_run(struct run *run)
{
}
#endif

/* --- runs that files gave back -------------------------------------------- */

/* With pool->lock held, as for what follows. Free it when it owns nothing any more. */
static void put_user_of(struct pool_user *user)
{
	if (user->nr_files || user->nr_runs)
		return;
	list_del(&user->node);
	kfree(user);
}

/* A file's run becomes dirty. It is on its owner's account still. Kick the cleaner afterwards. */
static void make_dirty(struct pool *pool, struct pool_user *user, struct run *run)
{
	run->held = false;
	run->user = user;
	user->nr_runs++;
	user->nr_dirty += run_pages(run);
	pool->nr_dirty += run_pages(run);
	list_add_tail(&run->list, &pool->dirty);
}

/* @nr pages of a run are to be cleaned no more. */
static void uncount(struct pool *pool, struct run *run, unsigned long nr)
{
	if (run->held) {
		pool->nr_held -= nr;
	} else {
		pool->nr_dirty -= nr;
		run->user->nr_dirty -= nr;
	}
}

/* A run is nobody's any more. */
static void disown(struct run *run)
{
	struct pool_user *user = run->user;

	run->user = NULL;
	user->nr_runs--;
	put_user_of(user);
}

/*
 * A run that is about to be cleaned, in no tree, ends before its first page that
 * has failed. What is behind that becomes a dirty run of its own. False: nothing
 * is left. With pool->lock held.
 */
static bool cut_failed(struct pool *pool, struct run *run)
{
	unsigned long nr = run_pages(run), good = first_failed(pool, run->pfn, nr) - run->pfn;
	struct run *rest;

	if (good == nr)
		return true;
	uncount(pool, run, 1);
	run->user->nr_pages--;
	pool->nr_bad++;
	if (good + 1 < nr) {
		rest = kzalloc(sizeof(*rest), GFP_KERNEL | __GFP_NOFAIL);
		rest->pfn = run->pfn + good + 1;
		rest->node.start = rest->pfn;
		rest->node.last = run->pfn + nr - 1;
		rest->held = run->held;
		rest->user = run->user;
		rest->user->nr_runs++;
		list_add_tail(&rest->list, &pool->dirty);
	}
	run->node.start = run->pfn;
	run->node.last = run->pfn + good - 1;
	if (good)
		return true;
	disown(run);
	kfree(run);
	return false;
}

/* --- cleaning ------------------------------------------------------------ */

/*
 * Whether a device that user space drives may write to memory that we do not
 * know of: VFIO maps such memory in an IOMMU by its address, and tells nobody.
 */
static int is_vfio(struct device *dev, void *unused)
{
	int ret;

	if (!device_trylock(dev))
		return -EAGAIN;
	ret = dev->driver && strstarts(dev->driver->name, "vfio") &&
	      pci_is_enabled(to_pci_dev(dev));
	device_unlock(dev);
	return ret;
}

/*
 * Most have a device locked for a moment. Who unbinds one from VFIO has it locked
 * until user space has closed it.
 */
bool offmap_any_vfio(void)
{
	unsigned int tries = 50;
	int ret;

	do {
		ret = bus_for_each_dev(&pci_bus_type, NULL, NULL, is_vfio);
		if (ret != -EAGAIN)
			return ret;
		msleep(20);
	} while (--tries);
	return true;
}

static int by_pfn(void *unused, const struct list_head *a, const struct list_head *b)
{
	const struct run *p = list_entry(a, struct run, list);
	const struct run *q = list_entry(b, struct run, list);

	return p->pfn < q->pfn ? -1 : p->pfn > q->pfn;
}

/* Which of @runs, in ascending order, the kernel maps. NULL: cannot be told. */
static struct offmap_range *find_mapped(struct list_head *runs)
{
	struct offmap_range *ranges;
	unsigned int nr = 0, i = 0;
	struct run *run;

	list_for_each_entry(run, runs, list)
		nr++;
	ranges = kvmalloc_array(nr, sizeof(*ranges), GFP_KERNEL);
	if (!ranges)
		return NULL;
	list_for_each_entry(run, runs, list)
		ranges[i++] = (struct offmap_range){
			.start = PFN_PHYS(run->pfn),
			.size = (u64)run_pages(run) << PAGE_SHIFT,
		};
	if (!offmap_find_mapped(ranges, nr))
		return ranges;
	kvfree(ranges);
	return NULL;
}

/* With pool->lock held. A run that was dirty is free, or held back. */
static void settle(struct pool *pool, struct run *run, bool clean)
{
	unsigned long nr = run_pages(run);

	uncount(pool, run, nr);
	/* A page that failed while it was being cleaned is cut out the next time. */
	if (clean && first_failed(pool, run->pfn, nr) == run->pfn + nr) {
		run->user->nr_pages -= nr;
		disown(run);
		pool->nr_free += nr;
		run_insert_free(&pool->free, run);
	} else {
		pool->nr_held += nr;
		run->held = true;
		list_add_tail(&run->list, &pool->dirty);
	}
	WRITE_ONCE(pool->settled, pool->settled + 1);
}

/*
 * What was zeroed becomes free. It was mapped for that, and is not any more, but
 * maybe by a CPU's TLB: by that the kernel would reach what its next user has there.
 */
static void release_zeroed(struct pool *pool, struct list_head *zeroed)
{
	struct run *run, *next;

	vm_unmap_aliases();
	mutex_lock(&pool->lock);
	list_for_each_entry_safe(run, next, zeroed, list) {
		list_del(&run->list);
		settle(pool, run, true);
	}
	mutex_unlock(&pool->lock);
	wake_up_all(&pool->cleaned);
}

static void clean(struct work_struct *work)
{
	struct pool *pool = container_of(to_delayed_work(work), struct pool, cleaner);
	struct offmap_range *ranges = NULL;
	bool blocked, any = false, again;
	struct run *run, *next;
	unsigned long nr = 0;
	unsigned int i = 0;
	LIST_HEAD(zeroed);
	LIST_HEAD(runs);
	bool ok;

	mutex_lock(&pool->lock);
	list_splice_init(&pool->dirty, &runs);
	mutex_unlock(&pool->lock);
	list_sort(NULL, &runs, by_pfn);
	blocked = !pool->set.allow_vfio && offmap_any_vfio();
	if (!blocked && !list_empty(&runs))
		ranges = find_mapped(&runs);
	list_for_each_entry_safe(run, next, &runs, list) {
		list_del(&run->list);
		mutex_lock(&pool->lock);
		ok = cut_failed(pool, run);
		mutex_unlock(&pool->lock);
		if (!ok) {
			i++;
			continue;
		}
		ok = ranges && !ranges[i++].mapped &&
		     !offmap_zero_again(PFN_PHYS(run->pfn), (u64)run_pages(run) << PAGE_SHIFT);
		if (!ok) {
			mutex_lock(&pool->lock);
			settle(pool, run, false);
			mutex_unlock(&pool->lock);
			wake_up_all(&pool->cleaned);
			continue;
		}
		any = true;
		list_add_tail(&run->list, &zeroed);
		nr += run_pages(run);
		if (nr >= AT_ONCE) {
			release_zeroed(pool, &zeroed);
			nr = 0;
		}
	}
	if (nr)
		release_zeroed(pool, &zeroed);
	kvfree(ranges);
	mutex_lock(&pool->lock);
	WRITE_ONCE(pool->settled, pool->settled + 1);
	pool->pause = any ? SOONEST : min(2 * pool->pause, LATEST);
	again = !list_empty(&pool->dirty);
	mutex_unlock(&pool->lock);
	wake_up_all(&pool->cleaned);
	if (again)
		queue_delayed_work(offmap_workqueue, &pool->cleaner, pool->pause);
}

static void kick_cleaner(struct pool *pool)
{
	WRITE_ONCE(pool->pause, SOONEST);
	mod_delayed_work(offmap_workqueue, &pool->cleaner, 0);
}

/* --- files --------------------------------------------------------------- */

/* With pool->lock held. */
static struct pool_user *get_user_of(struct pool *pool, kuid_t uid)
{
	struct pool_user *user;

	list_for_each_entry(user, &pool->users, node)
		if (uid_eq(user->uid, uid))
			goto found;
	user = kzalloc(sizeof(*user), GFP_KERNEL_ACCOUNT);
	if (!user)
		return NULL;
	user->uid = uid;
	list_add(&user->node, &pool->users);
found:
	user->nr_files++;
	return user;
}

/*
 * Whether a file can have @nr pages more: -EAGAIN if not before what is being
 * cleaned is free. With pool->lock held.
 *
 * What its owner's files gave back counts until it is clean. Else who has the
 * kernel map a page of each, as KVM does for a VM's clock, would have all of the
 * pool held back, file by file.
 */
static int check_room(struct pool_file *file, unsigned long nr)
{
	const struct pool_user *user = file->user;
	const struct pool *pool = file->pool;
	unsigned long quota = READ_ONCE(pool->set.quota);

	if (quota && user->nr_pages + nr > quota && !capable(CAP_SYS_RESOURCE))
		return user->nr_pages - user->nr_dirty + nr > quota ? -EDQUOT : -EAGAIN;
	if (pool->nr_free < nr)
		return pool->nr_free + pool->nr_dirty < nr ? -ENOSPC : -EAGAIN;
	return 0;
}

void pool_file_set_owner(struct pool_file *file)
{
	struct pool *pool = file->pool;
	struct pool_user *user;

	mutex_lock(&pool->lock);
	/* Without memory for a new one, the old one has it on its account. */
	user = get_user_of(pool, file->inode->i_uid);
	if (user) {
		user->nr_pages += file->nr_pages;
		file->user->nr_pages -= file->nr_pages;
		file->user->nr_files--;
		put_user_of(file->user);
		file->user = user;
	}
	mutex_unlock(&pool->lock);
}

/* With the invalidate lock held, for both. */
static void add_run(struct pool_file *file, struct run *run)
{
	interval_tree_insert(&run->node, &file->runs);
	watch_run(file, run);
}

static void remove_run(struct pool_file *file, struct run *run)
{
	unwatch_run(run);
	interval_tree_remove(&run->node, &file->runs);
}

static unsigned long count_holes(struct pool_file *file, unsigned long first, unsigned long last)
{
	unsigned long nr = last - first + 1;
	struct run *run;

	for (run = run_first(&file->runs, first, last); run; run = run_next(run, first, last))
		nr -= min(run->node.last, last) - max(run->node.start, first) + 1;
	return nr;
}

/* Take pages for the hole from @first to @last of a file, with pool->lock held. */
static int take_hole(struct pool *pool, struct run_search *search, struct list_head *taken,
		     unsigned long first, unsigned long last)
{
	struct run *run;

	while (first <= last) {
		run = run_take(&pool->free, search, first, last - first + 1);
		if (IS_ERR(run))
			return PTR_ERR(run);
		pool->nr_free -= run_pages(run);
		list_add_tail(&run->list, taken);
		first = run->node.last + 1;
	}
	return 0;
}

/* With the invalidate lock held. -EAGAIN: try again when pool->settled is not @settled any more. */
static int take_holes(struct pool_file *file, struct list_head *taken, unsigned long first,
		      unsigned long last, unsigned int *settled)
{
	unsigned long nr = count_holes(file, first, last);
	struct pool *pool = file->pool;
	struct run_search search = {};
	struct run *run, *next;
	unsigned long start = first;
	int ret;

	if (!nr)
		return 0;
	mutex_lock(&pool->lock);
	*settled = pool->settled;
	ret = check_room(file, nr);
	for (run = run_first(&file->runs, first, last); run && !ret;
	     run = run_next(run, first, last)) {
		if (run->node.start > start)
			ret = take_hole(pool, &search, taken, start, run->node.start - 1);
		start = run->node.last + 1;
	}
	if (!ret && start <= last)
		ret = take_hole(pool, &search, taken, start, last);
	if (ret) {
		/* Nobody has seen these: they are as clean as they were. */
		list_for_each_entry_safe(run, next, taken, list) {
			list_del(&run->list);
			pool->nr_free += run_pages(run);
			run_insert_free(&pool->free, run);
		}
	} else {
		file->user->nr_pages += nr;
		file->nr_pages += nr;
	}
	mutex_unlock(&pool->lock);
	return ret;
}

int pool_file_fill(struct pool_file *file, unsigned long first, unsigned long last, bool fault)
{
	struct address_space *mapping = file->inode->i_mapping;
	struct pool *pool = file->pool;
	struct run *run, *next;
	unsigned int settled;
	LIST_HEAD(taken);
	int ret;

	for (;;) {
		filemap_invalidate_lock(mapping);
		/* A file that has become shorter has given back what was behind its end. */
		if (fault && last >= DIV_ROUND_UP_ULL(i_size_read(file->inode), PAGE_SIZE)) {
			filemap_invalidate_unlock(mapping);
			return -EFAULT;
		}
		ret = take_holes(file, &taken, first, last, &settled);
		list_for_each_entry_safe(run, next, &taken, list) {
			list_del(&run->list);
			add_run(file, run);
		}
		filemap_invalidate_unlock(mapping);
		if (ret != -EAGAIN)
			break;
		if (fault)
			ret = wait_event_killable(pool->cleaned,
						  READ_ONCE(pool->settled) != settled);
		else
			ret = wait_event_interruptible(pool->cleaned,
						       READ_ONCE(pool->settled) != settled);
		if (ret)
			return -EINTR;
	}
	file->inode->i_blocks = (u64)file->nr_pages << (PAGE_SHIFT - 9);
	return ret;
}

/* The part of a file's run from @first on becomes one of its own. */
static void split_run(struct pool_file *file, struct run *run, unsigned long first)
{
	struct run *rest = kzalloc(sizeof(*rest), GFP_KERNEL_ACCOUNT | __GFP_NOFAIL);

	remove_run(file, run);
	rest->node.start = first;
	rest->node.last = run->node.last;
	rest->pfn = run->pfn + (first - run->node.start);
	run->node.last = first - 1;
	add_run(file, run);
	add_run(file, rest);
}

void pool_file_punch(struct pool_file *file, unsigned long first, unsigned long last)
{
	struct address_space *mapping = file->inode->i_mapping;
	struct pool *pool = file->pool;
	struct run *run;
	bool any = false;

	filemap_invalidate_lock(mapping);
	unmap_mapping_range(mapping, (loff_t)first << PAGE_SHIFT,
			    last == ULONG_MAX ? 0 : (loff_t)(last - first + 1) << PAGE_SHIFT, 0);
	while ((run = run_first(&file->runs, first, last))) {
		if (run->node.start < first) {
			split_run(file, run, first);
			continue;
		}
		if (run->node.last > last)
			split_run(file, run, last + 1);
		remove_run(file, run);
		mutex_lock(&pool->lock);
		file->nr_pages -= run_pages(run);
		make_dirty(pool, file->user, run);
		mutex_unlock(&pool->lock);
		any = true;
	}
	file->inode->i_blocks = (u64)file->nr_pages << (PAGE_SHIFT - 9);
	filemap_invalidate_unlock(mapping);
	if (any)
		kick_cleaner(pool);
}

static phys_addr_t pool_phys(const struct offmap_memory *mem, u64 offset, u64 *length)
{
	struct pool_file *file = container_of(mem, struct pool_file, mem);
	unsigned long pgoff = offset >> PAGE_SHIFT, pfn, end;
	struct run *run = run_first(&file->runs, pgoff, pgoff);

	*length = 0;
	if (!run)
		return 0;
	pfn = run->pfn + (pgoff - run->node.start);
	/* Neighbours in the file may be neighbours in memory. */
	do {
		end = run->pfn + run_pages(run);
		*length = PFN_PHYS(end - pfn) - offset_in_page(offset);
		pgoff = run->node.last + 1;
		run = run_first(&file->runs, pgoff, pgoff);
	} while (run && run->pfn == end);
	return PFN_PHYS(pfn) + offset_in_page(offset);
}

/* A page where one was given back: with it, all that one large page can map. */
static int pool_fill(struct offmap_memory *mem, u64 offset)
{
	struct pool_file *file = container_of(mem, struct pool_file, mem);
	unsigned long pgoff = offset >> PAGE_SHIFT;
	unsigned long first = round_down(pgoff, PMD_SIZE >> PAGE_SHIFT);
	unsigned long last = first + (PMD_SIZE >> PAGE_SHIFT) - 1;
	unsigned long pages = DIV_ROUND_UP_ULL(i_size_read(file->inode), PAGE_SIZE);

	if (pgoff >= pages)
		return -EFAULT;
	if (!pool_file_fill(file, first, min(last, pages - 1), true))
		return 0;
	return pool_file_fill(file, pgoff, pgoff, true);
}

static const struct offmap_source pool_source = {
	.name = "pool",
	.large = true,
	.phys = pool_phys,
	.fill = pool_fill,
	.poisoned = pool_poisoned,
};

int pool_file_init(struct pool *pool, struct inode *inode)
{
	struct pool_file *file = kzalloc(sizeof(*file), GFP_KERNEL_ACCOUNT);

	if (!file)
		return -ENOMEM;
	mutex_lock(&pool->lock);
	file->user = get_user_of(pool, inode->i_uid);
	mutex_unlock(&pool->lock);
	if (!file->user) {
		kfree(file);
		return -ENOMEM;
	}
	file->mem.source = &pool_source;
	file->pool = pool;
	file->inode = inode;
	file->runs = RB_ROOT_CACHED;
	inode->i_private = file;
	mutex_lock(&pool->files_lock);
	pool->nr_files++;
	list_add(&file->node, &pool->files);
	mutex_unlock(&pool->files_lock);
	return 0;
}

void pool_file_free(struct pool_file *file)
{
	struct pool *pool = file->pool;

	pool_file_punch(file, 0, ULONG_MAX);
	mutex_lock(&pool->files_lock);
	pool->nr_files--;
	list_del(&file->node);
	mutex_unlock(&pool->files_lock);
	mutex_lock(&pool->lock);
	file->user->nr_files--;
	put_user_of(file->user);
	mutex_unlock(&pool->lock);
	kfree(file);
}

/* --- the pool ------------------------------------------------------------ */

/* The memory of @unplugged becomes the pool's, or goes back. */
static int add_pieces(struct pool *pool, struct unplugged *unplugged)
{
	struct piece *piece, *next;
	struct run *run;
	int ret = 0;

	list_for_each_entry_safe(piece, next, &unplugged->pieces, node) {
		list_del(&piece->node);
		run = ret ? NULL : kzalloc(sizeof(*run), GFP_KERNEL);
		if (!run) {
			offmap_return(piece);
			ret = -ENOMEM;
			continue;
		}
		run->pfn = PHYS_PFN(piece->start);
		run->node.start = run->pfn;
		run->node.last = run->pfn + PHYS_PFN(piece->size) - 1;
		mutex_lock(&pool->lock);
		list_add(&piece->node, &pool->pieces);
		offmap_sort_pieces(&pool->pieces);
		pool->nr_pages += run_pages(run);
		pool->nr_free += run_pages(run);
		run_insert_free(&pool->free, run);
		mutex_unlock(&pool->lock);
		mutex_lock(&offmap_pieces_lock);
		piece->owner = NULL;
		piece->pool = pool;
		/* Nobody is told again of what failed while others were still to come. */
		if (offmap_poisoned(piece))
			offmap_pool_failed(piece);
		mutex_unlock(&offmap_pieces_lock);
	}
	kfree(unplugged);
	return ret;
}

int pool_grow(struct pool *pool, u64 size)
{
	struct offmap_memory *mem = offmap_unplug(&size, pool->set.nid, false);

	if (IS_ERR(mem))
		return PTR_ERR(mem);
	return add_pieces(pool, container_of(mem, struct unplugged, mem));
}

/* Take a piece out of the pool, if all of it is free. With pool->lock held. */
static bool remove_piece(struct pool *pool, struct piece *piece)
{
	unsigned long first = PHYS_PFN(piece->start), nr = PHYS_PFN(piece->size);
	struct run *run = run_first(&pool->free, first, first);

	if (!run || run->node.last < first + nr - 1)
		return false;
	run = run_carve(&pool->free, run, first, nr);
	if (!run)
		return false;
	kfree(run);
	pool->nr_free -= nr;
	pool->nr_pages -= nr;
	return true;
}

u64 pool_shrink(struct pool *pool, u64 size)
{
	struct piece *piece, *next;
	LIST_HEAD(out);
	u64 left;

	mutex_lock(&pool->lock);
	list_for_each_entry_safe_reverse(piece, next, &pool->pieces, node) {
		if (((u64)pool->nr_pages << PAGE_SHIFT) < size + piece->size)
			continue;
		if (remove_piece(pool, piece))
			list_move(&piece->node, &out);
	}
	left = (u64)pool->nr_pages << PAGE_SHIFT;
	mutex_unlock(&pool->lock);
	list_for_each_entry_safe(piece, next, &out, node) {
		list_del(&piece->node);
		offmap_return(piece);
	}
	return left;
}

void pool_init(struct pool *pool)
{
	mutex_init(&pool->lock);
	mutex_init(&pool->files_lock);
	INIT_LIST_HEAD(&pool->pieces);
	INIT_LIST_HEAD(&pool->dirty);
	INIT_LIST_HEAD(&pool->users);
	INIT_LIST_HEAD(&pool->files);
	pool->free = RB_ROOT_CACHED;
	init_waitqueue_head(&pool->cleaned);
	INIT_DELAYED_WORK(&pool->cleaner, clean);
	pool->pause = SOONEST;
	mutex_lock(&pools_lock);
	list_add_tail(&pool->node, &pools);
	mutex_unlock(&pools_lock);
}

/* A device may still write to what files gave back, and was not cleaned since. */
static void quarantine(struct pool *pool)
{
	unsigned long first, last;
	struct piece *piece;
	struct run *run;

	list_for_each_entry(piece, &pool->pieces, node) {
		first = PHYS_PFN(piece->start);
		last = first + PHYS_PFN(piece->size) - 1;
		list_for_each_entry(run, &pool->dirty, list)
			if (run->pfn <= last && run->pfn + run_pages(run) > first)
				piece->quarantine = true;
	}
}

/* Give all back: what the kernel still maps, as soon as it does not any more. */
void pool_destroy(struct pool *pool)
{
	struct piece *piece, *next;
	struct run *run, *next_run;

	mutex_lock(&pools_lock);
	list_del(&pool->node);
	mutex_unlock(&pools_lock);
	cancel_delayed_work_sync(&pool->cleaner);
	/* A page may fail now, and be looked for among those that are free. */
	mutex_lock(&pool->lock);
	if (!pool->set.allow_vfio)
		quarantine(pool);
	list_for_each_entry_safe(run, next_run, &pool->dirty, list) {
		disown(run);
		kfree(run);
	}
	while ((run = run_first(&pool->free, 0, ULONG_MAX))) {
		interval_tree_remove(&run->node, &pool->free);
		kfree(run);
	}
	mutex_unlock(&pool->lock);
	list_for_each_entry_safe(piece, next, &pool->pieces, node) {
		list_del(&piece->node);
		offmap_return(piece);
	}
	kfree(pool);
	if (!(current->flags & PF_KTHREAD))
		offmap_await_due(jiffies + offmap_block_timeout(), true);
}

ssize_t offmap_show_pools(char *buf)
{
	struct pool *pool;
	ssize_t len = 0;

	mutex_lock(&pools_lock);
	list_for_each_entry(pool, &pools, node) {
		mutex_lock(&pool->lock);
		len += sysfs_emit_at(buf, len, "%u:%u %llu %llu %llu %llu %llu %lu %d\n",
				     MAJOR(pool->dev), MINOR(pool->dev),
				     (u64)pool->nr_pages << PAGE_SHIFT,
				     (u64)pool->nr_free << PAGE_SHIFT,
				     (u64)pool->nr_dirty << PAGE_SHIFT,
				     (u64)pool->nr_held << PAGE_SHIFT,
				     (u64)pool->nr_bad << PAGE_SHIFT, pool->nr_files,
				     pool->set.nid);
		mutex_unlock(&pool->lock);
	}
	mutex_unlock(&pools_lock);
	return len;
}

ssize_t offmap_show_pool_users(char *buf)
{
	struct pool_user *user;
	struct pool *pool;
	ssize_t len = 0;

	mutex_lock(&pools_lock);
	list_for_each_entry(pool, &pools, node) {
		mutex_lock(&pool->lock);
		list_for_each_entry(user, &pool->users, node)
			len += sysfs_emit_at(buf, len, "%u:%u %u %llu %lu\n", MAJOR(pool->dev),
					     MINOR(pool->dev),
					     from_kuid_munged(&init_user_ns, user->uid),
					     (u64)user->nr_pages << PAGE_SHIFT, user->nr_files);
		mutex_unlock(&pool->lock);
	}
	mutex_unlock(&pools_lock);
	return len;
}
