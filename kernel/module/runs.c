// SPDX-License-Identifier: GPL-2.0
/*
 * Runs of pages, in interval trees.
 *
 * Free runs are kept merged, so what is contiguous can be had in the largest
 * pieces there are: a gigabyte, 2 MiB, or a page. What a file gets is aligned in
 * memory as it is in the file.
 */
#include <linux/err.h>
#include <linux/mm.h>
#include <linux/slab.h>

#include "pool.h"

#define PMD_PAGES	(PMD_SIZE >> PAGE_SHIFT)
#define PUD_PAGES	(PUD_SIZE >> PAGE_SHIFT)

static struct run *to_run(struct interval_tree_node *node)
{
	return node ? container_of(node, struct run, node) : NULL;
}

struct run *run_first(struct rb_root_cached *root, unsigned long first, unsigned long last)
{
	return to_run(interval_tree_iter_first(root, first, last));
}

struct run *run_next(struct run *run, unsigned long first, unsigned long last)
{
	return to_run(interval_tree_iter_next(&run->node, first, last));
}

void run_insert_free(struct rb_root_cached *root, struct run *run)
{
	unsigned long last = run->pfn + run_pages(run) - 1;
	struct run *other;

	run->node.start = run->pfn;
	run->node.last = last;
	other = run_first(root, run->pfn - 1, run->pfn - 1);
	if (other) {
		interval_tree_remove(&other->node, root);
		run->pfn = other->pfn;
		run->node.start = other->pfn;
		kfree(other);
	}
	other = run_first(root, last + 1, last + 1);
	if (other) {
		interval_tree_remove(&other->node, root);
		run->node.last = other->node.last;
		kfree(other);
	}
	run->held = false;
	interval_tree_insert(&run->node, root);
}

static struct run *new_run(unsigned long first, unsigned long last)
{
	/* Who takes pages one by one pays for what describes them. */
	struct run *run = kzalloc(sizeof(*run), GFP_KERNEL_ACCOUNT);

	if (!run)
		return NULL;
	run->pfn = first;
	run->node.start = first;
	run->node.last = last;
	return run;
}

struct run *run_carve(struct rb_root_cached *root, struct run *run, unsigned long pfn,
		      unsigned long nr)
{
	unsigned long first = run->node.start, last = run->node.last;
	struct run *below = NULL, *above = NULL;

	if (pfn > first) {
		below = new_run(first, pfn - 1);
		if (!below)
			return NULL;
	}
	if (pfn + nr - 1 < last) {
		above = new_run(pfn + nr, last);
		if (!above) {
			kfree(below);
			return NULL;
		}
	}
	interval_tree_remove(&run->node, root);
	run->pfn = pfn;
	run->node.start = pfn;
	run->node.last = pfn + nr - 1;
	if (below)
		interval_tree_insert(&below->node, root);
	if (above)
		interval_tree_insert(&above->node, root);
	return run;
}

/*
 * The lowest run from @from on that has @size aligned pages, and where they start
 * in it. The next search begins there.
 */
static struct run *find_aligned(struct rb_root_cached *root, unsigned long size,
				unsigned long *from, unsigned long *start)
{
	struct run *run;

	for (run = run_first(root, *from, ULONG_MAX); run; run = run_next(run, 0, ULONG_MAX)) {
		*from = run->node.start;
		*start = ALIGN(run->node.start, size);
		if (*start + size - 1 <= run->node.last)
			return run;
	}
	*from = ULONG_MAX;
	return NULL;
}

/* A run for small pages: one that is good for nothing else, if there is one. */
static struct run *find_small(struct rb_root_cached *root, unsigned long *from)
{
	unsigned long start;
	struct run *run;

	for (run = run_first(root, *from, ULONG_MAX); run; run = run_next(run, 0, ULONG_MAX)) {
		*from = run->node.start;
		start = ALIGN(run->node.start, PMD_PAGES);
		if (start + PMD_PAGES - 1 > run->node.last)
			return run;
	}
	*from = ULONG_MAX;
	return run_first(root, 0, ULONG_MAX);
}

struct run *run_take(struct rb_root_cached *root, struct run_search *search, unsigned long pgoff,
		     unsigned long nr)
{
	static const unsigned long sizes[] = { PUD_PAGES, PMD_PAGES };
	unsigned long start, end;
	struct run *run = NULL;
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(sizes) && !run; i++) {
		if (!IS_ALIGNED(pgoff, sizes[i]) || nr < sizes[i])
			continue;
		run = find_aligned(root, sizes[i], &search->aligned[i], &start);
		if (run)
			nr = round_down(min(nr, run->node.last + 1 - start), sizes[i]);
	}
	if (!run) {
		run = find_small(root, &search->small);
		if (!run)
			return ERR_PTR(-ENOSPC);
		start = run->node.start;
		/* Up to where large pages can begin. */
		end = ALIGN(pgoff + 1, PMD_PAGES);
		nr = min3(nr, end - pgoff, run_pages(run));
	}
	run = run_carve(root, run, start, nr);
	if (!run)
		return ERR_PTR(-ENOMEM);
	run->node.start = pgoff;
	run->node.last = pgoff + nr - 1;
	return run;
}
