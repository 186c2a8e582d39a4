// SPDX-License-Identifier: GPL-2.0
/*
 * Remove memory blocks from the kernel, and add them again.
 *
 * The kernel does both under its own hotplug lock, and tells a memory notifier
 * of each step. So what must hold is checked in that notifier, where nothing
 * can come between:
 *
 *  - A block that is isolated and about to go offline gets no new huge page and
 *    no new owner. If it has a huge page, or one that has failed, it stays. So
 *    the administrator's HugePages_Total never falls, on any node, of any size.
 *
 *  - The host keeps its reserve of memory.
 *
 *  - What is offline is no RAM in the resource tree. Nobody else adds or removes
 *    memory now, and who makes a list of RAM upon this notice comes after us.
 *
 *  - offline_pages() tries for ever, unless a signal is pending: each block has
 *    a time after which its taker, a thread of ours, gets one.
 *
 *  - A block that comes back goes online in the zone that it came from, or
 *    not until that is asked for.
 *
 * Between the two steps of removing, offline and gone, no lock is held: then
 * whoever walks over page frames has the time to leave the block. Nobody else
 * gets it online meanwhile.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/fs.h>
#include <linux/hugetlb.h>
#include <linux/ioport.h>
#include <linux/magic.h>
#include <linux/memory.h>
#include <linux/memory_hotplug.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/mount.h>
#include <linux/pagemap.h>
#include <linux/path.h>
#include <linux/sched/signal.h>
#include <linux/spinlock.h>
#include <linux/workqueue.h>
#include <asm/e820/api.h>

#include "internal.h"

static LIST_HEAD(operations);
static DEFINE_SPINLOCK(operations_lock);

int offmap_begin(struct offmap_operation *new)
{
	struct offmap_operation *op;
	int ret = 0;

	new->task = current;
	spin_lock(&operations_lock);
	list_for_each_entry(op, &operations, node)
		if (new->start < op->start + op->size && op->start < new->start + new->size)
			ret = -EBUSY;
	if (!ret)
		list_add(&new->node, &operations);
	spin_unlock(&operations_lock);
	return ret;
}

void offmap_end(struct offmap_operation *op)
{
	spin_lock(&operations_lock);
	list_del(&op->node);
	spin_unlock(&operations_lock);
}

static struct offmap_operation *own_operation(void)
{
	struct offmap_operation *op, *own = NULL;

	spin_lock(&operations_lock);
	list_for_each_entry(op, &operations, node)
		if (op->task == current)
			own = op;
	spin_unlock(&operations_lock);
	return own;
}

/* Whether one of ours, which is not @own, is about to remove @pfn. */
static bool being_removed(const struct offmap_operation *own, unsigned long pfn)
{
	phys_addr_t start = PFN_PHYS(pfn);
	struct offmap_operation *op;
	bool ret = false;

	spin_lock(&operations_lock);
	list_for_each_entry(op, &operations, node)
		ret |= op != own && !op->adding && start - op->start < op->size;
	spin_unlock(&operations_lock);
	return ret;
}

/* --- what keeps a block where it is -------------------------------------- */

static bool any_poisoned(unsigned long pfn, unsigned long nr)
{
	for (; nr--; pfn++)
		if (PageHWPoison(pfn_to_page(pfn)))
			return true;
	return false;
}

/* Or one that is just being made: it has left the free lists, and nobody refers to it yet. */
static bool any_huge(unsigned long pfn, unsigned long nr)
{
	struct page *page;

	for (; nr--; pfn++) {
		page = pfn_to_page(pfn);
		if (PageHuge(page) || (PageHead(page) && !page_ref_count(page)))
			return true;
	}
	return false;
}

/*
 * What is on its way to the LRU lists does not say so yet. offline_pages() drains
 * the batches that it waits in.
 */
static bool on_way_to_lru(struct page *page)
{
	struct folio *folio = page_folio(page);

	return folio_test_swapbacked(folio) || folio_mapping(folio);
}

/* A page of a file that refuses when it is to be moved: secretmem, guest_memfd. */
static bool is_fixed(struct folio *folio)
{
	struct address_space *mapping;
	bool ret = false;

	if (!folio_test_unevictable(folio) || !folio_try_get(folio))
		return false;
	/* While it is locked, the file is there. */
	if (folio_trylock(folio)) {
		mapping = folio_mapping(folio);
		ret = mapping && mapping->host &&
		      (offmap_mapping_fixed(mapping) ||
		       mapping->host->i_sb->s_magic == SECRETMEM_MAGIC);
		folio_unlock(folio);
	}
	folio_put(folio);
	return ret;
}

/*
 * As has_unmovable_pages(), which would dump the page to the log. And a page
 * that is pinned: offline_pages() would try to move it until its time is over.
 */
static bool any_unmovable(unsigned long pfn, unsigned long nr)
{
	bool movable_zone = is_zone_movable_page(pfn_to_page(pfn));
	struct page *page;

	for (; nr--; pfn++) {
		page = pfn_to_page(pfn);
		if (PageReserved(page))
			return true;
		if (!page_ref_count(page) || PageOffline(page))
			continue;
		if (PageLRU(page)) {
			if (folio_maybe_dma_pinned(page_folio(page)) || is_fixed(page_folio(page)))
				return true;
		} else if (!movable_zone && !offmap_page_movable(page) && !on_way_to_lru(page)) {
			return true;
		}
	}
	return false;
}

/*
 * KVM asks this of a page without struct page, of the firmware's table: on Intel
 * a guest's page is uncached where it is not so. The kernel's own table, which
 * is asked here, has less RAM in it, unless memmap= added some.
 */
static bool all_in_e820(phys_addr_t start, u64 size)
{
	for (; size; start += PAGE_SIZE, size -= PAGE_SIZE)
		if (!e820__mapped_any(start, start + PAGE_SIZE - 1, E820_TYPE_RAM))
			return false;
	return true;
}

const char *offmap_obstacle(phys_addr_t start, u64 size)
{
	unsigned long pfn = PHYS_PFN(start), nr = PHYS_PFN(size);

	/* First: others may remove what was not there at boot, while we look at it. */
	if (!all_in_e820(start, size))
		return "not in the boot memory map";
	if (!pfn_to_online_page(pfn))
		return "offline";
	if (any_poisoned(pfn, nr))
		return "failed memory";
	if (any_huge(pfn, nr))
		return "huge pages";
	if (any_unmovable(pfn, nr))
		return "unmovable pages";
	return NULL;
}

/* --- the notifier -------------------------------------------------------- */

/* There are at most eight: nothing larger than 1 GiB, or one block, is removed at once. */
static unsigned int block_in(const struct offmap_operation *op, unsigned long pfn)
{
	return div64_u64(PFN_PHYS(pfn) - op->start, memory_block_size_bytes());
}

static int going_offline(struct offmap_operation *op, const struct memory_notify *arg)
{
	unsigned long timeout = offmap_block_timeout(), left;
	int ret;

	if (any_poisoned(arg->start_pfn, arg->nr_pages) || any_huge(arg->start_pfn, arg->nr_pages))
		return notifier_from_errno(-EBUSY);
	/* What is free in this block does not count any more. */
	if ((u64)max(si_mem_available(), 0L) << PAGE_SHIFT < offmap_reserve())
		return notifier_from_errno(-ENOMEM);
	ret = offmap_prepare_carving(&op->split);
	if (ret)
		return notifier_from_errno(ret);
	if (is_zone_movable_page(pfn_to_page(arg->start_pfn)))
		op->was_movable |= BIT(block_in(op, arg->start_pfn));
	left = time_before(jiffies, op->deadline) ? op->deadline - jiffies : 0;
	mod_delayed_work(offmap_workqueue, &op->expiry, min(timeout, left));
	return NOTIFY_OK;
}

static void is_offline(struct offmap_operation *op, const struct memory_notify *arg)
{
	op->poisoned |= any_poisoned(arg->start_pfn, arg->nr_pages);
	op->offline |= BIT(block_in(op, arg->start_pfn));
	/* The next block has a time of its own. */
	cancel_delayed_work(&op->expiry);
	/*
	 * Of a zone without holes nobody asks whether a block is online. The
	 * kernel sets this anew right after, under the hotplug lock.
	 */
	page_zone(pfn_to_page(arg->start_pfn))->contiguous = false;
	if (hweight_long(op->offline) * (u64)memory_block_size_bytes() == op->size)
		op->split_error = offmap_carve_ram(op->start, op->start + op->size - 1,
						   &op->split);
}

static int going_online(struct offmap_operation *op, const struct memory_notify *arg)
{
	bool movable = is_zone_movable_page(pfn_to_page(arg->start_pfn));

	if (!op->adding)
		return notifier_from_errno(offmap_uncarve_ram(&op->split));
	return movable == op->movable ? NOTIFY_OK : notifier_from_errno(-EAGAIN);
}

static int offmap_memory_notify(struct notifier_block *nb, unsigned long action, void *data)
{
	struct offmap_operation *op = own_operation();
	const struct memory_notify *arg = data;

	if (action == MEM_GOING_ONLINE && being_removed(op, arg->start_pfn))
		return notifier_from_errno(-EBUSY);
	if (!op)
		return NOTIFY_DONE;
	if (action == MEM_GOING_OFFLINE && !op->adding)
		return going_offline(op, arg);
	if (action == MEM_OFFLINE && !op->adding)
		is_offline(op, arg);
	if (action == MEM_GOING_ONLINE)
		return going_online(op, arg);
	return NOTIFY_DONE;
}

static struct notifier_block memory_notifier = {
	.notifier_call = offmap_memory_notify,
	/* Before the kernel makes the crash kernel's list of memory again. */
	.priority = 1,
};

/* --- blocks online and offline -------------------------------------------- */

/*
 * No exported function sets whether a block is online, and in which zone. A file
 * of sysfs does, written by a thread of ours in a sysfs of its own: since 7.x the
 * root folder of kernel threads is empty.
 */
static struct vfsmount *sysfs;

static int mount_sysfs(void)
{
	struct file_system_type *type = get_fs_type("sysfs");

	sysfs = type ? kern_mount(type) : ERR_PTR(-ENODEV);
	return PTR_ERR_OR_ZERO(sysfs);
}

static struct file *open_sysfs(const char *name, int flags)
{
	const struct path root = { .mnt = sysfs, .dentry = sysfs->mnt_root };

	return file_open_root(&root, name, flags, 0);
}

ssize_t offmap_read_sysfs(const char *name, char *buf, size_t size)
{
	struct file *file = open_sysfs(name, O_RDONLY);
	loff_t pos = 0;
	ssize_t ret;

	if (IS_ERR(file))
		return PTR_ERR(file);
	ret = kernel_read(file, buf, size, &pos);
	filp_close(file, NULL);
	return ret;
}

/* With @deadline, in jiffies: end then, or when a signal is pending. */
static int set_block_state(phys_addr_t start, const char *state, const unsigned long *deadline)
{
	struct file *file;
	char path[64];
	loff_t pos = 0;
	ssize_t ret;

	snprintf(path, sizeof(path), "devices/system/memory/memory%llu/state",
		 div64_u64(start, memory_block_size_bytes()));
	file = open_sysfs(path, O_WRONLY);
	if (IS_ERR(file))
		return PTR_ERR(file);
	/* A system call would start again: somebody has the hotplug lock, and 5 ms are over. */
	while ((ret = kernel_write(file, state, strlen(state), &pos)) == -ERESTARTNOINTR) {
		if (!deadline) {
			flush_signals(current);
			continue;
		}
		recalc_sigpending();
		if (signal_pending(current) || time_after_eq(jiffies, *deadline)) {
			ret = -EINTR;
			break;
		}
	}
	filp_close(file, NULL);
	return ret < 0 ? ret : 0;
}

static int set_online(phys_addr_t start, bool movable)
{
	if (pfn_to_online_page(PHYS_PFN(start)))
		return 0;
	return set_block_state(start, movable ? "online_movable" : "online_kernel", NULL);
}

/* --- removing ------------------------------------------------------------ */

static void expire(struct work_struct *work)
{
	struct delayed_work *expiry = to_delayed_work(work);
	struct offmap_operation *op = container_of(expiry, struct offmap_operation, expiry);

	send_sig(SIGKILL, op->task, 1);
}

static int set_all_offline(struct offmap_operation *op)
{
	phys_addr_t start;
	int ret = 0;

	INIT_DELAYED_WORK_ONSTACK(&op->expiry, expire);
	for (start = op->start; !ret && start < op->start + op->size;
	     start += memory_block_size_bytes())
		ret = set_block_state(start, "offline", &op->deadline);
	cancel_delayed_work_sync(&op->expiry);
	destroy_delayed_work_on_stack(&op->expiry);
	return ret;
}

/* What went offline is as it was. */
static void undo_offline(const struct offmap_operation *op)
{
	unsigned long bits = op->offline;
	phys_addr_t start;
	unsigned int i;
	int ret;

	for_each_set_bit(i, &bits, BITS_PER_LONG) {
		start = op->start + i * memory_block_size_bytes();
		ret = set_online(start, op->was_movable & BIT(i));
		if (ret)
			pr_err("the memory block at %pa stays offline: %d; see /sys/devices/system/memory\n",
			       &start, ret);
	}
}

int offmap_remove_memory(struct offmap_operation *op)
{
	unsigned long deadline;
	int ret = set_all_offline(op);

	deadline = jiffies + offmap_block_timeout();
	if (!ret)
		ret = op->split_error;
	if (!ret)
		ret = offmap_await_walkers(time_before(deadline, op->deadline) ? deadline :
									       op->deadline);
	if (!ret)
		ret = remove_memory(op->start, op->size);
	if (ret)
		undo_offline(op);
	/* What could not be put right in the resource tree has our name. */
	if (ret && op->split.carved)
		__module_get(THIS_MODULE);
	offmap_end_carving(&op->split);
	if (ret)
		return ret;
	if (region_intersects(op->start, op->size, IORESOURCE_SYSTEM_RAM, IORES_DESC_NONE) !=
	    REGION_DISJOINT)
		pr_err("the memory at %pa was removed and still counts as RAM\n", &op->start);
	return op->poisoned ? -EHWPOISON : 0;
}

/* --- adding -------------------------------------------------------------- */

/*
 * The kernel onlines added memory, or not, as the host's policy for new memory
 * says. But this memory is not new: it was online, and maybe in ZONE_MOVABLE.
 *
 * Among the zones for kernel memory the kernel chooses, by what still spans the
 * block: one from the very end of ZONE_DMA32 comes back in ZONE_NORMAL.
 */
static int online(const struct piece *piece)
{
	phys_addr_t start;
	int ret = 0, err;

	for (start = piece->start; start < piece->start + piece->size;
	     start += memory_block_size_bytes()) {
		err = set_online(start, piece->movable);
		if (err)
			ret = err;
	}
	return ret;
}

/* -ENOMEM: there was no memory for its struct pages. Else, it is done with. */
int offmap_add_memory(const struct piece *piece)
{
	phys_addr_t last = piece->start + piece->size - 1;
	struct offmap_operation op = {
		.start = piece->start,
		.size = piece->size,
		.adding = true,
		.movable = piece->movable,
	};
	int ret = offmap_begin(&op);

	if (ret)
		return -ENOMEM;
	ret = add_memory(piece->nid, piece->start, piece->size, MHP_MERGE_RESOURCE);
	if (!ret) {
		ret = online(piece);
		if (ret)
			pr_err("%pa-%pa is back, but not all online: %d; see /sys/devices/system/memory\n",
			       &piece->start, &last, ret);
		ret = 0;
	} else if (ret != -ENOMEM) {
		pr_err("cannot give %pa-%pa back to the kernel: %d; it is lost until the next boot\n",
		       &piece->start, &last, ret);
		ret = 0;
	}
	offmap_end(&op);
	return ret;
}

int offmap_hotplug_init(void)
{
	int ret = mount_sysfs();

	if (ret)
		return ret;
	ret = register_memory_notifier(&memory_notifier);
	if (ret)
		kern_unmount(sysfs);
	return ret;
}

void offmap_hotplug_exit(void)
{
	unregister_memory_notifier(&memory_notifier);
	kern_unmount(sysfs);
}
