// SPDX-License-Identifier: GPL-2.0
/*
 * Take memory blocks off the running kernel, and give them back.
 *
 * A removed block has no struct page and no direct mapping. What it needs
 * beside that:
 *
 *  - It comes out of the buddy allocator full of the host's leftovers, and
 *    goes back full of the guest's: it is zeroed both times, through a mapping
 *    that exists only meanwhile.
 *
 *  - PAT must know it as write-back. The memory type of a PFN that is not
 *    System RAM is looked up in the memtype tree when it is mapped, and is
 *    uncached where the tree has nothing to say. So the reservation that
 *    ioremap_cache() makes for zeroing stays until the memory goes back.
 *
 *  - Its addresses must stay ours: they are claimed in the resource tree, or
 *    they would look free to PCI and to other hotplug. /dev/mem is kept out too.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/atomic.h>
#include <linux/delay.h>
#include <linux/fs.h>
#include <linux/io.h>
#include <linux/ioport.h>
#include <linux/memory.h>
#include <linux/memory_hotplug.h>
#include <linux/mm.h>
#include <linux/mount.h>
#include <linux/mutex.h>
#include <linux/path.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include <linux/sort.h>
#include <linux/vmalloc.h>
#include <linux/workqueue.h>
#include <asm/pgtable.h>

#include "internal.h"
#include "offmap.h"

/* Physically contiguous memory that the kernel does not own now. */
struct piece {
	phys_addr_t start;
	u64 size;
	int nid;
	bool movable;		/* was in ZONE_MOVABLE, and shall be again */
	bool gigabyte;		/* we have all of the gigabyte that it is in */
};

struct unplugged {
	struct offmap_memory mem;
	struct piece *pieces;	/* in the order of file offsets */
	unsigned int nr;
};

/* One taker at a time: two would take turns at half of what either wants. */
static DEFINE_MUTEX(unplug_lock);
static struct workqueue_struct *workqueue;
static atomic_t pieces_out = ATOMIC_INIT(0);

bool offmap_unplug_active(void)
{
	return atomic_read(&pieces_out) > 0;
}

/* --- zeroing ----------------------------------------------------------- */

struct zero_work {
	struct work_struct work;
	void *start;
	u64 size;
};

/*
 * Past the caches, which have better things to hold than a guest's zeroes:
 * there is no line to read before it is overwritten, and what the host is
 * working on stays where it is. @size is a multiple of 64.
 */
static void zero_uncached(void *start, u64 size)
{
	u64 *word = start, *end = start + size;

	for (; word < end; word += 8)
		asm volatile("movnti %1, 0(%0)\n\t"
			     "movnti %1, 8(%0)\n\t"
			     "movnti %1, 16(%0)\n\t"
			     "movnti %1, 24(%0)\n\t"
			     "movnti %1, 32(%0)\n\t"
			     "movnti %1, 40(%0)\n\t"
			     "movnti %1, 48(%0)\n\t"
			     "movnti %1, 56(%0)"
			     : : "r"(word), "r"(0UL) : "memory");
	wmb();	/* sfence: such stores are ordered by nothing else */
}

static void zero_range(struct work_struct *work)
{
	struct zero_work *zero = container_of(work, struct zero_work, work);
	u64 done;

	for (done = 0; done < zero->size; done += SZ_2M) {
		zero_uncached(zero->start + done, min_t(u64, SZ_2M, zero->size - done));
		cond_resched();
	}
}

#define MAX_ZERO_THREADS 16

/* By as many threads as there are CPUs, up to where memory is the limit. */
static void zero_mapping(void *start, u64 size)
{
	unsigned int n = clamp_t(unsigned int, num_online_cpus(), 1, MAX_ZERO_THREADS);
	u64 share = round_up(div_u64(size, n), SZ_2M);
	struct zero_work *works, self = { .start = start, .size = size };
	unsigned int i;

	works = n > 1 ? kcalloc(n, sizeof(*works), GFP_KERNEL) : NULL;
	if (!works) {
		zero_range(&self.work);
		return;
	}
	for (i = 0; i < n && i * share < size; i++) {
		works[i].start = start + i * share;
		works[i].size = min(share, size - i * share);
		INIT_WORK(&works[i].work, zero_range);
		queue_work(workqueue, &works[i].work);
	}
	while (i--)
		flush_work(&works[i].work);
	kfree(works);
}

/*
 * Zero @piece. With @keep, leave its memory type reserved; without, it must
 * have been and is not any more.
 */
static int zero_piece(const struct piece *piece, bool keep)
{
	void *va = (void __force *)ioremap_cache(piece->start, piece->size);

	if (!va)
		return -ENOMEM;
	zero_mapping(va, piece->size);
	if (keep) {
		/* Unlike iounmap(), this leaves the memtype tree alone. */
		vunmap(va);
	} else {
		iounmap((void __iomem __force *)va);
		arch_io_free_memtype_wc(piece->start, piece->size);
	}
	return 0;
}

/* --- giving back --------------------------------------------------------- */

/*
 * The kernel onlines added memory, or not, as the host's policy for new memory
 * says. But this is not new: it was online, and maybe where only movable pages
 * go. Nothing exported sets that; what does is a file of sysfs. It is written by
 * a kernel thread, as the caller may be exiting, in a sysfs of its own: since 7.x
 * the root folder of kernel threads is empty.
 *
 * Among the zones for kernel memory the kernel chooses, by what still spans the
 * block: one from the very end of ZONE_DMA32 comes back in ZONE_NORMAL.
 */
struct online_work {
	struct work_struct work;
	const struct piece *piece;
	int ret;
};

static struct vfsmount *mount_sysfs(void)
{
	struct file_system_type *type = get_fs_type("sysfs");

	return type ? kern_mount(type) : ERR_PTR(-ENODEV);
}

static int set_block_state(struct vfsmount *sysfs, u64 block, const char *state)
{
	const struct path root = { .mnt = sysfs, .dentry = sysfs->mnt_root };
	struct file *file;
	char path[64];
	loff_t pos = 0;
	ssize_t ret;

	snprintf(path, sizeof(path), "devices/system/memory/memory%llu/state", block);
	file = file_open_root(&root, path, O_WRONLY, 0);
	if (IS_ERR(file))
		return PTR_ERR(file);
	/* What a system call would be restarted for: the hotplug lock was taken. */
	while ((ret = kernel_write(file, state, strlen(state), &pos)) == -ERESTARTNOINTR) {
		/* restart_syscall() marks one as pending; offline_pages() would give up. */
		flush_signals(current);
		msleep(20);
	}
	filp_close(file, NULL);
	return ret < 0 ? ret : 0;
}

static void online_piece(struct work_struct *work)
{
	struct online_work *online = container_of(work, struct online_work, work);
	const struct piece *piece = online->piece;
	u64 block = memory_block_size_bytes();
	struct vfsmount *sysfs = NULL;
	struct page *page;
	phys_addr_t start;
	int ret;

	for (start = piece->start; start < piece->start + piece->size; start += block) {
		page = pfn_to_online_page(PHYS_PFN(start));
		if (page && is_zone_movable_page(page) == piece->movable)
			continue;
		if (!sysfs)
			sysfs = mount_sysfs();
		if (IS_ERR(sysfs)) {
			online->ret = PTR_ERR(sysfs);
			return;
		}
		ret = page ? set_block_state(sysfs, div64_u64(start, block), "offline") : 0;
		if (!ret)
			ret = set_block_state(sysfs, div64_u64(start, block),
					      piece->movable ? "online_movable" : "online_kernel");
		if (ret)
			online->ret = ret;
	}
	if (sysfs)
		kern_unmount(sysfs);
}

/* Adding memory takes memory, for its struct pages: wait so long for some. */
#define ADD_ATTEMPTS	30

/* What @piece holds must be harmless. */
static void add_piece(const struct piece *piece)
{
	phys_addr_t end = piece->start + piece->size - 1;
	struct online_work online = { .piece = piece };
	unsigned int attempts = ADD_ATTEMPTS;
	int ret;

	release_mem_region(piece->start, piece->size);
	atomic_dec(&pieces_out);
	while ((ret = add_memory(piece->nid, piece->start, piece->size, MHP_MERGE_RESOURCE)) ==
	       -ENOMEM && --attempts)
		schedule_timeout_uninterruptible(HZ);
	if (ret) {
		pr_err("cannot give %pa-%pa back to the kernel: %d; it is lost until the next boot\n",
		       &piece->start, &end, ret);
		return;
	}
	INIT_WORK_ONSTACK(&online.work, online_piece);
	queue_work(workqueue, &online.work);
	flush_work(&online.work);
	destroy_work_on_stack(&online.work);
	if (online.ret)
		pr_err("%pa-%pa is back, but not all online: %d; see /sys/devices/system/memory\n",
		       &piece->start, &end, online.ret);
}

static void replug_piece(const struct piece *piece)
{
	phys_addr_t end = piece->start + piece->size - 1;

	while (zero_piece(piece, false)) {
		/* Never give a guest's secrets back; wait for address space. */
		pr_warn_ratelimited("no address space to zero %pa-%pa, trying again\n",
				    &piece->start, &end);
		schedule_timeout_uninterruptible(HZ);
	}
	add_piece(piece);
}

static void unplugged_release(struct offmap_memory *mem)
{
	struct unplugged *unplugged = container_of(mem, struct unplugged, mem);

	mutex_lock(&unplug_lock);
	while (unplugged->nr)
		replug_piece(&unplugged->pieces[--unplugged->nr]);
	mutex_unlock(&unplug_lock);
	kvfree(unplugged->pieces);
	kfree(unplugged);
}

/* --- taking -------------------------------------------------------------- */

/* How the direct map maps @start: with which size of page. */
static u64 direct_map_page_size(phys_addr_t start)
{
	unsigned int level;
	pte_t *pte = lookup_address((unsigned long)__va(start), &level);

	if (!pte || level == PG_LEVEL_NONE)
		return 0;
	return page_level_size(level);
}

struct candidates {
	phys_addr_t *start;
	unsigned int nr;
	unsigned int room;
	u64 unit;
};

/* Collect the whole units of a System RAM resource. */
static int collect(struct resource *res, void *arg)
{
	struct candidates *found = arg;
	phys_addr_t start;

	for (start = round_up(res->start, found->unit); start + found->unit - 1 <= res->end;
	     start += found->unit) {
		if (found->start) {
			if (found->nr == found->room)
				return 1;
			found->start[found->nr] = start;
		}
		found->nr++;
	}
	return 0;
}

/* All whole @unit bytes of System RAM, in ascending order. */
static int find_candidates(struct candidates *found, u64 unit)
{
	const unsigned long flags = IORESOURCE_SYSTEM_RAM | IORESOURCE_BUSY;

	*found = (struct candidates){ .unit = unit };
	walk_iomem_res_desc(IORES_DESC_NONE, flags, 0, -1, found, collect);
	found->room = found->nr;
	found->nr = 0;
	if (!found->room)
		return 0;
	found->start = kvmalloc_array(found->room, sizeof(*found->start), GFP_KERNEL);
	if (!found->start)
		return -ENOMEM;
	walk_iomem_res_desc(IORES_DESC_NONE, flags, 0, -1, found, collect);
	return 0;
}

/*
 * release_mem_region_adjustable() cannot take a piece out of a System RAM
 * resource that has children above it (the kernel image, a crash kernel): it
 * warns, and the removed memory still counts as RAM, which the next look at
 * its struct page does not survive. So these children, which only name a part
 * of what stays, leave the tree for as long as that takes.
 *
 * The tree is read without its lock, which is not exported; System RAM
 * resources change by memory hotplug only.
 */
#define MAX_CHILDREN 16

struct children {
	struct resource *res[MAX_CHILDREN];
	unsigned int nr;
};

static bool detach_children_above(phys_addr_t end, struct children *detached)
{
	struct resource *ram, *child;
	unsigned int i;

	detached->nr = 0;
	for (ram = iomem_resource.child; ram; ram = ram->sibling)
		if (ram->start <= end && end <= ram->end)
			break;
	if (!ram || (ram->flags & IORESOURCE_SYSTEM_RAM) != IORESOURCE_SYSTEM_RAM)
		return false;
	for (child = ram->child; child; child = child->sibling) {
		if (child->start <= end)
			continue;
		if (detached->nr == MAX_CHILDREN)
			return false;
		detached->res[detached->nr++] = child;
	}
	for (i = 0; i < detached->nr; i++)
		release_resource(detached->res[i]);
	return true;
}

static void attach_children(const struct children *detached)
{
	unsigned int i;

	for (i = 0; i < detached->nr; i++)
		if (insert_resource(&iomem_resource, detached->res[i]))
			pr_warn("lost %pR (%s) from the resource tree\n", detached->res[i],
				detached->res[i]->name);
}

static bool remove_memory_at(phys_addr_t start, u64 size)
{
	struct children detached;
	int ret;

	if (!detach_children_above(start + size - 1, &detached))
		return false;
	ret = offline_and_remove_memory(start, size);
	attach_children(&detached);
	if (ret)
		return false;
	if (region_intersects(start, size, IORESOURCE_SYSTEM_RAM, IORES_DESC_NONE) !=
	    REGION_DISJOINT) {
		pr_err("the block at %pa was removed and still counts as RAM; it is lost until the next boot\n",
		       &start);
		return false;
	}
	return true;
}

/*
 * What is in [@start, @start + @size), in pieces of @step bytes, which it is
 * given back in. How many; 0 if it may not be taken, or not as such pieces.
 */
static unsigned int plan_pieces(struct piece *pieces, phys_addr_t start, u64 size, u64 step,
				int nid)
{
	u64 block = memory_block_size_bytes(), offset;
	struct piece *piece = pieces - 1;

	for (offset = 0; offset < size; offset += block) {
		struct page *page = pfn_to_online_page(PHYS_PFN(start + offset));

		if (!page || (nid != OFFMAP_ANY_NODE && page_to_nid(page) != nid))
			return 0;
		if (!(offset & (step - 1)))
			*++piece = (struct piece){
				.start = start + offset,
				.size = step,
				.nid = page_to_nid(page),
				.movable = is_zone_movable_page(page),
			};
		else if (piece->nid != page_to_nid(page) ||
			 piece->movable != is_zone_movable_page(page))
			return 0;
	}
	return piece + 1 - pieces;
}

/*
 * Try to take @size bytes at @start, which are whole memory blocks. What a leaf
 * of the direct map covers goes back at once, so that it is covered by one
 * again; elsewhere blocks do, so that no leaf comes where there was none.
 */
static void take(struct unplugged *unplugged, phys_addr_t start, u64 size, bool leaf, int nid)
{
	struct piece *pieces = &unplugged->pieces[unplugged->nr];
	unsigned int nr, i;

	nr = plan_pieces(pieces, start, size, leaf ? size : memory_block_size_bytes(), nid);
	if (!nr || !remove_memory_at(start, size))
		return;
	for (i = 0; i < nr; i++) {
		struct piece piece = pieces[i];

		atomic_inc(&pieces_out);
		if (!request_mem_region_exclusive(piece.start, piece.size, KBUILD_MODNAME))
			pr_warn("somebody else claims the memory at %pa\n", &piece.start);
		if (zero_piece(&piece, true)) {
			/* It holds what it held before; nobody but the kernel has seen it. */
			add_piece(&piece);
			continue;
		}
		unplugged->pieces[unplugged->nr++] = piece;
		unplugged->mem.size += piece.size;
	}
}

/*
 * Take units of @unit bytes, from the top of memory down. remove_pud_table()
 * follows a 1 GiB leaf of the direct map as if it were a table when less than
 * all of it is removed: so whole gigabytes there, and blocks elsewhere.
 */
static int take_units(struct unplugged *unplugged, u64 want, u64 unit, bool leaves, int nid)
{
	struct candidates found;
	int ret = find_candidates(&found, unit);
	unsigned int i;

	if (ret)
		return ret;
	for (i = found.nr; i-- && unplugged->mem.size < want;) {
		if (signal_pending(current)) {
			ret = -EINTR;
			break;
		}
		if ((direct_map_page_size(found.start[i]) == PUD_SIZE) == leaves)
			take(unplugged, found.start[i], unit, leaves, nid);
	}
	kvfree(found.start);
	return ret;
}

static int by_start(const void *a, const void *b)
{
	const struct piece *p = a, *q = b;

	return p->start < q->start ? -1 : p->start > q->start;
}

/*
 * Whole gigabytes first: there, what is aligned in the file is aligned in
 * memory, and one page can map each of them. Behind them, neighbours next to
 * each other.
 */
static int by_place(const void *a, const void *b)
{
	const struct piece *p = a, *q = b;

	return p->gigabyte == q->gigabyte ? by_start(a, b) : q->gigabyte - p->gigabyte;
}

static void arrange(struct unplugged *unplugged)
{
	struct piece *pieces = unplugged->pieces;
	unsigned int i, j, nr = unplugged->nr;
	u64 number, size;

	sort(pieces, nr, sizeof(*pieces), by_start, NULL);
	for (i = 0; i < nr; i = j) {
		number = pieces[i].start >> PUD_SHIFT;
		size = 0;
		for (j = i; j < nr && pieces[j].start >> PUD_SHIFT == number; j++)
			size += pieces[j].size;
		while (i < j)
			pieces[i++].gigabyte = size >= PUD_SIZE;
	}
	sort(pieces, nr, sizeof(*pieces), by_place, NULL);
}

static phys_addr_t unplugged_phys(const struct offmap_memory *mem, u64 offset, u64 *length)
{
	struct unplugged *unplugged = container_of(mem, struct unplugged, mem);
	phys_addr_t phys = 0;
	unsigned int i;

	*length = 0;
	for (i = 0; i < unplugged->nr; i++) {
		const struct piece *piece = &unplugged->pieces[i];

		if (*length) {
			if (piece->start != phys + *length)
				break;
			*length += piece->size;
		} else if (offset < piece->size) {
			phys = piece->start + offset;
			*length = piece->size - offset;
		} else {
			offset -= piece->size;
		}
	}
	return phys;
}

static const struct offmap_source unplugged_source = {
	.name = "unplugged",
	.large = true,
	.phys = unplugged_phys,
	.release = unplugged_release,
};

/* At most so much can go; how much really can is known by trying only. */
static u64 spare(u64 block, int nid)
{
	u64 pages = max(si_mem_available(), 0L);

	if (nid != OFFMAP_ANY_NODE)
		pages = min_t(u64, pages, node_present_pages(nid));
	return round_down(pages << PAGE_SHIFT, block);
}

/* Give back what of the pieces from @first on is not needed for @want. */
static void trim(struct unplugged *unplugged, u64 want, unsigned int first)
{
	while (first < unplugged->nr) {
		struct piece piece = unplugged->pieces[first];

		if (unplugged->mem.size - piece.size < want) {
			first++;
			continue;
		}
		unplugged->pieces[first] = unplugged->pieces[--unplugged->nr];
		unplugged->mem.size -= piece.size;
		replug_piece(&piece);
	}
}

/* With unplug_lock held. */
static int take_memory(struct unplugged *unplugged, u64 want, u64 block, int nid)
{
	unsigned int whole = 0;
	u64 gigabytes = 0;
	int ret = 0;

	/* Do not starve the host only to find out that it is too much. */
	if (want > spare(block, nid)) {
		unplugged->mem.size = spare(block, nid);
		return -ENOMEM;
	}
	if (block >= PUD_SIZE) {
		ret = take_units(unplugged, want, block, true, nid);
		if (!ret)
			ret = take_units(unplugged, want, block, false, nid);
	} else {
		/* Whole gigabytes where one page can map them, and blocks for the rest. */
		if (IS_ENABLED(CONFIG_ARCH_SUPPORTS_PUD_PFNMAP))
			gigabytes = round_down(want, PUD_SIZE);
		if (gigabytes)
			ret = take_units(unplugged, gigabytes, PUD_SIZE, false, nid);
		if (!ret && gigabytes)
			ret = take_units(unplugged, gigabytes, PUD_SIZE, true, nid);
		whole = unplugged->nr;
		if (!ret)
			ret = take_units(unplugged, want, block, false, nid);
		if (!ret)
			ret = take_units(unplugged, want, PUD_SIZE, true, nid);
	}
	if (!ret && unplugged->mem.size < want)
		ret = -ENOMEM;
	/* A gigabyte at the end may have made blocks from before it too many. */
	if (!ret) {
		trim(unplugged, want, whole);
		trim(unplugged, want, 0);
	}
	return ret;
}

struct offmap_memory *offmap_unplug(u64 *size, int nid)
{
	u64 block = memory_block_size_bytes();
	struct unplugged *unplugged;
	u64 want = *size;
	int ret;

	*size = 0;
	if (!want)
		return ERR_PTR(-EINVAL);
	if (want > (u64)totalram_pages() << PAGE_SHIFT) {
		*size = spare(block, nid);
		return ERR_PTR(-ENOMEM);
	}
	want = round_up(want, block);
	unplugged = kzalloc(sizeof(*unplugged), GFP_KERNEL);
	if (!unplugged)
		return ERR_PTR(-ENOMEM);
	unplugged->mem.source = &unplugged_source;
	ret = -ENOMEM;
	/* The last unit to be taken may be a gigabyte of which one block is wanted. */
	unplugged->pieces = kvcalloc(div64_u64(want + PUD_SIZE, block), sizeof(*unplugged->pieces),
				     GFP_KERNEL);
	if (!unplugged->pieces)
		goto fail;
	ret = mutex_lock_killable(&unplug_lock);
	if (ret)
		goto fail;
	ret = take_memory(unplugged, want, block, nid);
	mutex_unlock(&unplug_lock);
	*size = unplugged->mem.size;
	if (ret)
		goto fail;
	arrange(unplugged);
	/* The mappings used for zeroing are gone, but maybe not from every TLB. */
	vm_unmap_aliases();
	pr_debug("%llu MiB taken from the kernel in %u pieces\n", *size >> 20, unplugged->nr);
	return &unplugged->mem;
fail:
	unplugged_release(&unplugged->mem);
	return ERR_PTR(ret);
}

int offmap_unplug_init(void)
{
	workqueue = alloc_workqueue("offmap", WQ_UNBOUND, 0);
	return workqueue ? 0 : -ENOMEM;
}

void offmap_unplug_exit(void)
{
	destroy_workqueue(workqueue);
}
