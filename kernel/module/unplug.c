// SPDX-License-Identifier: GPL-2.0
/*
 * Take memory blocks off the running kernel.
 *
 * A removed block has no struct page and no direct mapping. It comes out of the
 * buddy allocator full of the host's leftovers, and goes back full of the
 * guest's: it is zeroed both times. Its addresses are claimed in the resource
 * tree, or they would look free to PCI and to other hotplug; /dev/mem is kept
 * out too.
 *
 * A thread of its own serves each request. It may sleep long in the kernel's
 * hotplug code, which whoever asked need not: that one can be interrupted or
 * killed, or give up at the deadline. What comes too late goes back.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/bitmap.h>
#include <linux/completion.h>
#include <linux/ioport.h>
#include <linux/kref.h>
#include <linux/kthread.h>
#include <linux/list_sort.h>
#include <linux/memory.h>
#include <linux/memory_hotplug.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/moduleparam.h>
#include <linux/mutex.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include <linux/spinlock.h>
#include <linux/sysfs.h>
#include <asm/pgtable.h>

#include "internal.h"
#include "offmap.h"

static unsigned int block_timeout = 10;
module_param(block_timeout, uint, 0644);
MODULE_PARM_DESC(block_timeout, "seconds to try for each memory block (default 10)");

static unsigned int timeout = 60;
module_param(timeout, uint, 0644);
MODULE_PARM_DESC(timeout, "seconds for a whole request, and one more for each GiB of it (default 60)");

static unsigned int reserve = 128;
module_param(reserve, uint, 0644);
MODULE_PARM_DESC(reserve, "MiB that the host keeps available (default 128)");

static unsigned int limit;
module_param(limit, uint, 0644);
MODULE_PARM_DESC(limit, "MiB that may be out at a time (default 0: no limit)");

/* A request for memory, and the thread that serves it. */
struct request {
	struct kref ref;
	struct list_head node;		/* of requests */
	struct completion done;
	struct task_struct *task;
	pid_t pid;			/* who asked */
	char comm[TASK_COMM_LEN];
	int nid;
	u64 want;
	u64 promised;			/* of committed, for what has not come yet */
	u64 block;
	unsigned long deadline;		/* jiffies */
	unsigned int tried;		/* ranges */
	bool abandoned;			/* nobody waits for it, under requests_lock */
	bool finished;			/* under requests_lock */
	struct unplugged *unplugged;
	u64 had;			/* bytes that could be had */
	int ret;
};

static LIST_HEAD(requests);		/* under requests_lock */
static bool stopped;			/* no new requests: under requests_lock */
static DEFINE_SPINLOCK(requests_lock);
/* What is out, and what has been promised to requests: under requests_lock. */
static u64 committed;
/* Of it, what has been promised and is not out yet: under requests_lock. */
static u64 awaited;

u64 offmap_reserve(void)
{
	return (u64)READ_ONCE(reserve) << 20;
}

unsigned long offmap_block_timeout(void)
{
	return (unsigned long)clamp(READ_ONCE(block_timeout), 1U, 3600U) * HZ;
}

/*
 * Promise @want bytes, whole blocks, of @spare that the host can spare. How many
 * can be had: what others wait for is theirs, or all would run into the reserve
 * together, and nobody would get anything.
 */
static u64 commit(u64 want, u64 spare, u64 block)
{
	u64 most = READ_ONCE(limit) ? (u64)READ_ONCE(limit) << 20 : U64_MAX;
	u64 left;

	spin_lock(&requests_lock);
	left = min(most - min(most, committed), spare - min(spare, awaited));
	left = round_down(left, block);
	if (left >= want) {
		committed += want;
		awaited += want;
	}
	spin_unlock(&requests_lock);
	return left;
}

/* What was promised will not be taken. */
static void withdraw(u64 size)
{
	lockdep_assert_held(&requests_lock);
	committed -= size;
	awaited -= size;
}

void offmap_uncommit(u64 size)
{
	spin_lock(&requests_lock);
	committed -= size;
	spin_unlock(&requests_lock);
}

/* Some of what was promised is there. It may be more than that. */
static void count(struct request *req, u64 size)
{
	u64 promised;

	spin_lock(&requests_lock);
	promised = min(req->promised, size);
	req->promised -= promised;
	awaited -= promised;
	committed += size - promised;
	spin_unlock(&requests_lock);
}

/* --- candidates ---------------------------------------------------------- */

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

/* --- taking -------------------------------------------------------------- */

static void free_pieces(struct list_head *pieces)
{
	struct piece *piece, *next;

	list_for_each_entry_safe(piece, next, pieces, node) {
		list_del(&piece->node);
		bitmap_free(piece->bad);
		kfree(piece);
	}
}

static struct piece *new_piece(phys_addr_t start, u64 size)
{
	struct page *page = pfn_to_online_page(PHYS_PFN(start));
	struct piece *piece = kzalloc(sizeof(*piece), GFP_KERNEL);

	if (!page || !piece)
		goto fail;
	piece->start = start;
	piece->size = size;
	piece->nid = page_to_nid(page);
	piece->movable = is_zone_movable_page(page);
	piece->bad = bitmap_zalloc(PHYS_PFN(size), GFP_KERNEL);
	if (piece->bad)
		return piece;
fail:
	kfree(piece);
	return NULL;
}

/*
 * Plan what is in [@start, @start + @size) as pieces of @step bytes, which it is
 * given back in. False if it cannot be taken, or not as such pieces.
 */
static bool plan_pieces(struct request *req, struct list_head *pieces, phys_addr_t start,
			u64 size, u64 step)
{
	struct piece *piece = NULL;
	struct page *page;
	u64 offset;

	for (offset = 0; offset < size; offset += req->block) {
		if (offmap_obstacle(start + offset, req->block))
			return false;
		page = pfn_to_online_page(PHYS_PFN(start + offset));
		if (!page || (req->nid != OFFMAP_ANY_NODE && page_to_nid(page) != req->nid))
			return false;
		if (!(offset & (step - 1))) {
			piece = new_piece(start + offset, step);
			if (!piece)
				return false;
			list_add_tail(&piece->node, pieces);
		} else if (piece->nid != page_to_nid(page) ||
			   piece->movable != is_zone_movable_page(page)) {
			return false;
		}
		cond_resched();
	}
	return true;
}

/* Whether @piece, which is out, can be given to a guest. Else it is dealt with. */
static bool accept_piece(struct piece *piece, bool poisoned)
{
	offmap_piece_out(piece);
	piece->claimed = request_mem_region_exclusive(piece->start, piece->size, KBUILD_MODNAME);
	if (!piece->claimed)
		pr_warn("somebody else claims the memory at %pa\n", &piece->start);
	if (poisoned) {
		/* Which page it was is not known. None is touched. */
		bitmap_set(piece->bad, 0, PHYS_PFN(piece->size));
		offmap_keep(piece);
		return false;
	}
	if (piece->claimed && !offmap_zero(piece->start, piece->size, true))
		return true;
	/* It holds what it held before: nobody but the kernel has seen it. */
	piece->zeroed = true;
	offmap_return(piece);
	return false;
}

/*
 * Try to take @size bytes at @start, which are whole memory blocks. What a leaf
 * of the direct map covers goes back at once, so that it is covered by one
 * again. Elsewhere blocks do, so that no leaf comes where there was none.
 */
static void take(struct request *req, phys_addr_t start, u64 size, bool leaf)
{
	struct offmap_operation op = {
		.start = start,
		.size = size,
		.deadline = req->deadline,
	};
	struct piece *piece, *next;
	LIST_HEAD(pieces);
	int ret = -EBUSY;

	/* Another thread is at it. */
	if (offmap_begin(&op))
		return;
	WRITE_ONCE(req->tried, req->tried + 1);
	if ((direct_map_page_size(start) == PUD_SIZE) == leaf &&
	    plan_pieces(req, &pieces, start, size, leaf ? size : req->block))
		ret = offmap_remove_memory(&op);
	if (ret && ret != -EHWPOISON)
		free_pieces(&pieces);
	offmap_end(&op);
	list_for_each_entry_safe(piece, next, &pieces, node) {
		list_del(&piece->node);
		count(req, piece->size);
		if (!accept_piece(piece, ret))
			continue;
		piece->owner = req->unplugged;
		list_add(&piece->node, &req->unplugged->pieces);
		WRITE_ONCE(req->unplugged->mem.size, req->unplugged->mem.size + piece->size);
	}
}

/* Why not to go on: 0 if there is no reason. */
static int stop(struct request *req)
{
	/* What ended the last block's time does not end the next one's. */
	flush_signals(current);
	if (READ_ONCE(req->abandoned))
		return -EINTR;
	if (time_after_eq(jiffies, req->deadline))
		return -ETIMEDOUT;
	if ((u64)max(si_mem_available(), 0L) << PAGE_SHIFT < offmap_reserve())
		return -ENOMEM;
	return 0;
}

/*
 * Take units of @unit bytes, from the top of memory down. remove_pud_table()
 * follows a 1 GiB leaf of the direct map as if it were a table when less than
 * all of it is removed: so whole gigabytes there, and blocks elsewhere.
 */
static int take_units(struct request *req, u64 want, u64 unit, bool leaves)
{
	struct candidates found;
	int ret = find_candidates(&found, unit);
	unsigned int i;

	for (i = found.nr; !ret && i-- && req->unplugged->mem.size < want;) {
		take(req, found.start[i], unit, leaves);
		ret = stop(req);
	}
	kvfree(found.start);
	return ret;
}

/*
 * Whole gigabytes first: there, what is aligned in the file is aligned in
 * memory, and one page can map each of them. Behind them, neighbours next to
 * each other.
 */
static int by_place(void *unused, const struct list_head *a, const struct list_head *b)
{
	const struct piece *p = list_entry(a, struct piece, node);
	const struct piece *q = list_entry(b, struct piece, node);

	return (int)q->gigabyte - p->gigabyte;
}

static void arrange(struct unplugged *unplugged)
{
	struct piece *piece, *first = NULL;
	u64 size = 0;

	offmap_sort_pieces(&unplugged->pieces);
	list_for_each_entry(piece, &unplugged->pieces, node) {
		if (!first || first->start >> PUD_SHIFT != piece->start >> PUD_SHIFT) {
			first = piece;
			size = 0;
		}
		size += piece->size;
		if (size < PUD_SIZE)
			continue;
		for (;; first = list_next_entry(first, node)) {
			first->gigabyte = true;
			if (first == piece)
				break;
		}
	}
	/* It keeps the order of equals. */
	list_sort(NULL, &unplugged->pieces, by_place);
}

/* Give back what is not needed for @want, what came last first. */
static void trim(struct unplugged *unplugged, u64 want)
{
	struct piece *piece, *next;

	list_for_each_entry_safe(piece, next, &unplugged->pieces, node) {
		if (unplugged->mem.size - piece->size < want)
			continue;
		list_del(&piece->node);
		unplugged->mem.size -= piece->size;
		offmap_return(piece);
	}
}

/* Give back what somebody mapped for good before it was ours. */
static int check_mapped(struct unplugged *unplugged)
{
	struct piece *piece, *next;
	int ret = offmap_find_mapped_pieces(&unplugged->pieces);

	if (ret)
		return ret;
	list_for_each_entry_safe(piece, next, &unplugged->pieces, node) {
		if (!piece->mapped)
			continue;
		pr_warn("the kernel maps some of the memory at %pa: it is no guest's\n",
			&piece->start);
		list_del(&piece->node);
		unplugged->mem.size -= piece->size;
		offmap_return(piece);
		ret = -ENOMEM;
	}
	return ret;
}

/* At most so much can go; how much really can is known by trying only. */
static u64 spare(u64 block, int nid)
{
	u64 pages = max(si_mem_available(), 0L), bytes;

	if (nid != OFFMAP_ANY_NODE)
		pages = min_t(u64, pages, node_present_pages(nid));
	bytes = pages << PAGE_SHIFT;
	return round_down(bytes - min(bytes, offmap_reserve()), block);
}

/*
 * Promise @want bytes, and what is missing in the last block. False if the host
 * cannot spare them: @had says how many it can.
 */
static bool promise(u64 *want, u64 *had, u64 block, int nid)
{
	u64 whole = round_up(*want, block);

	/* Do not starve the host only to find out that it is too much. */
	*had = commit(whole < *want ? U64_MAX : whole, spare(block, nid), block);
	if (whole < *want || *had < whole)
		return false;
	*want = whole;
	return true;
}

static int take_memory(struct request *req)
{
	u64 want = req->want, gigabytes = 0;
	int ret = 0;

	if (req->block >= PUD_SIZE) {
		ret = take_units(req, want, req->block, true);
		if (!ret)
			ret = take_units(req, want, req->block, false);
	} else {
		/* Whole gigabytes where one page can map them, and blocks for the rest. */
		if (IS_ENABLED(CONFIG_ARCH_SUPPORTS_PUD_PFNMAP))
			gigabytes = round_down(want, PUD_SIZE);
		if (gigabytes)
			ret = take_units(req, gigabytes, PUD_SIZE, false);
		if (!ret && gigabytes)
			ret = take_units(req, gigabytes, PUD_SIZE, true);
		if (!ret)
			ret = take_units(req, want, req->block, false);
		if (!ret)
			ret = take_units(req, want, PUD_SIZE, true);
	}
	if (req->unplugged->mem.size < want)
		return ret ? ret : -ENOMEM;
	/* All is there: only the deadline does not matter any more. */
	return ret == -ETIMEDOUT ? 0 : ret;
}

static phys_addr_t unplugged_phys(const struct offmap_memory *mem, u64 offset, u64 *length)
{
	struct unplugged *unplugged = container_of(mem, struct unplugged, mem);
	phys_addr_t phys = 0;
	struct piece *piece;

	*length = 0;
	list_for_each_entry(piece, &unplugged->pieces, node) {
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

static bool unplugged_poisoned(const struct offmap_memory *mem, u64 offset, u64 length)
{
	struct unplugged *unplugged = container_of(mem, struct unplugged, mem);
	unsigned long first, end;
	struct piece *piece;

	list_for_each_entry(piece, &unplugged->pieces, node) {
		if (offset < piece->size) {
			first = PHYS_PFN(offset);
			end = PHYS_PFN(min(offset + length, piece->size));
			if (find_next_bit(piece->bad, end, first) < end)
				return true;
			length -= min(length, piece->size - offset);
			offset = piece->size;
		}
		if (!length)
			break;
		offset -= piece->size;
	}
	return false;
}

int offmap_pgoff(const struct offmap_memory *mem, unsigned long pfn, pgoff_t *pgoff)
{
	struct unplugged *unplugged = container_of(mem, struct unplugged, mem);
	struct piece *piece;

	*pgoff = 0;
	list_for_each_entry(piece, &unplugged->pieces, node) {
		if (pfn - PHYS_PFN(piece->start) < PHYS_PFN(piece->size)) {
			*pgoff += pfn - PHYS_PFN(piece->start);
			return 0;
		}
		*pgoff += PHYS_PFN(piece->size);
	}
	return -ENOENT;
}

static void unplugged_release(struct offmap_memory *mem)
{
	offmap_return_all(container_of(mem, struct unplugged, mem));
}

static const struct offmap_source unplugged_source = {
	.name = "unplugged",
	.large = true,
	.phys = unplugged_phys,
	.poisoned = unplugged_poisoned,
	.release = unplugged_release,
};

/* --- requests ------------------------------------------------------------ */

static void free_request(struct kref *ref)
{
	kfree(container_of(ref, struct request, ref));
}

static void serve(struct request *req)
{
	struct unplugged *unplugged = req->unplugged;
	bool give_back, abandoned, due;

	do {
		due = offmap_due();
		req->ret = take_memory(req);
		/* What comes back meanwhile may be what was missing. */
	} while (req->ret == -ENOMEM && due && !offmap_await_due(req->deadline, false));
	if (!req->ret) {
		/* A gigabyte at the end may have made blocks from before it too many. */
		trim(unplugged, req->want);
		req->ret = check_mapped(unplugged);
	}
	arrange(unplugged);
	spin_lock(&requests_lock);
	withdraw(req->promised);
	list_del(&req->node);
	req->finished = true;
	req->had = unplugged->mem.size;
	abandoned = req->abandoned;
	give_back = req->ret || abandoned;
	spin_unlock(&requests_lock);
	if (give_back) {
		trim(unplugged, 0);
		kfree(unplugged);
		req->unplugged = NULL;
	} else {
		offmap_changed(true);
	}
	if (abandoned)
		offmap_due_end();
}

static int request_thread(void *arg)
{
	struct request *req = arg;

	allow_signal(SIGKILL);
	serve(req);
	complete(&req->done);
	kref_put(&req->ref, free_request);
	/* The file may have been what kept this module. */
	module_put_and_kthread_exit(0);
}

static int start_request(struct request *req)
{
	req->unplugged = kzalloc(sizeof(*req->unplugged), GFP_KERNEL);
	if (!req->unplugged)
		return -ENOMEM;
	INIT_LIST_HEAD(&req->unplugged->pieces);
	req->unplugged->mem.source = &unplugged_source;
	req->task = kthread_create(request_thread, req, "offmap-unplug");
	if (IS_ERR(req->task)) {
		kfree(req->unplugged);
		return PTR_ERR(req->task);
	}
	get_task_struct(req->task);
	spin_lock(&requests_lock);
	if (!stopped)
		list_add_tail(&req->node, &requests);
	spin_unlock(&requests_lock);
	if (list_empty(&req->node)) {
		/* It has not run, and never will. */
		kthread_stop(req->task);
		put_task_struct(req->task);
		kfree(req->unplugged);
		return -EBUSY;
	}
	__module_get(THIS_MODULE);
	kref_get(&req->ref);
	wake_up_process(req->task);
	return 0;
}

bool offmap_stop_taking(void)
{
	spin_lock(&requests_lock);
	stopped = list_empty(&requests) && !offmap_unplug_active();
	spin_unlock(&requests_lock);
	return stopped;
}

void offmap_go_on_taking(void)
{
	spin_lock(&requests_lock);
	stopped = false;
	spin_unlock(&requests_lock);
}

/* Wait for @req, or leave it to itself. */
static int await_request(struct request *req, bool killable)
{
	/* The thread looks at the deadline itself, between blocks. */
	unsigned long end = req->deadline + 2 * offmap_block_timeout(), step;
	bool finished;
	long ret = 0;

	while (!ret && (step = offmap_step(end))) {
		if (killable)
			ret = wait_for_completion_killable_timeout(&req->done, step);
		else
			ret = wait_for_completion_interruptible_timeout(&req->done, step);
	}
	if (ret > 0)
		return req->ret;
	spin_lock(&requests_lock);
	finished = req->finished;
	if (!finished) {
		req->abandoned = true;
		offmap_due_begin();
	}
	spin_unlock(&requests_lock);
	if (finished) {
		wait_for_completion(&req->done);
		return req->ret;
	}
	send_sig(SIGKILL, req->task, 1);
	return ret ? -EINTR : -ETIMEDOUT;
}

struct offmap_memory *offmap_unplug(u64 *size, int nid, bool killable)
{
	u64 block = memory_block_size_bytes(), want = *size;
	unsigned long deadline = jiffies + (READ_ONCE(timeout) + (want >> 30)) * HZ;
	struct offmap_memory *mem;
	bool promised, due;
	struct request *req;
	int ret = 0;

	*size = 0;
	if (!want)
		return ERR_PTR(-EINVAL);
	do {
		due = offmap_due();
		promised = promise(&want, size, block, nid);
	} while (!promised && due && !(ret = offmap_await_due(deadline, killable)));
	if (!promised)
		return ERR_PTR(ret == -EINTR ? -EINTR : -ENOMEM);
	*size = 0;
	req = kzalloc(sizeof(*req), GFP_KERNEL);
	if (!req) {
		ret = -ENOMEM;
		goto refuse;
	}
	kref_init(&req->ref);
	INIT_LIST_HEAD(&req->node);
	init_completion(&req->done);
	req->pid = task_tgid_nr(current);
	get_task_comm(req->comm, current);
	req->nid = nid;
	req->want = want;
	req->promised = want;
	req->block = block;
	req->deadline = deadline;
	ret = start_request(req);
	if (ret) {
		kfree(req);
		goto refuse;
	}
	ret = await_request(req, killable);
	*size = READ_ONCE(req->had);
	mem = ret ? ERR_PTR(ret) : &req->unplugged->mem;
	put_task_struct(req->task);
	kref_put(&req->ref, free_request);
	return mem;

refuse:
	spin_lock(&requests_lock);
	withdraw(want);
	spin_unlock(&requests_lock);
	return ERR_PTR(ret);
}

ssize_t offmap_show_requests(char *buf)
{
	struct request *req;
	int len = 0;

	spin_lock(&requests_lock);
	list_for_each_entry(req, &requests, node)
		len += sysfs_emit_at(buf, len, "%d %llu %llu %u %s\n", req->pid, req->want,
				     READ_ONCE(req->unplugged->mem.size), READ_ONCE(req->tried),
				     req->comm);
	spin_unlock(&requests_lock);
	return len;
}
