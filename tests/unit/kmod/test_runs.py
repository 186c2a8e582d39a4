"""How the module chooses pages for a file (kernel/module/runs.c), compiled for this process."""

import shutil
import subprocess
from pathlib import Path

import pytest

RUNS = Path(__file__).parents[3] / "kernel/module/runs.c"
# What runs.c needs of the kernel. Its interval tree is a list here, and counts the steps of a walk.
KERNEL = """
#ifndef _OFFMAP_INTERNAL_H
#define _OFFMAP_INTERNAL_H
#include <errno.h>
#include <limits.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/types.h>

typedef uint64_t u64;
typedef ssize_t loff_t;
typedef unsigned int kuid_t, kgid_t, umode_t, wait_queue_head_t, atomic_t;
struct list_head { struct list_head *next, *prev; };
struct mutex { int held; };
struct delayed_work { int pending; };
struct offmap_memory { u64 size; };

#define PAGE_SHIFT 12
#define PMD_SIZE (2UL << 20)
#define PUD_SIZE (1UL << 30)
#define ALIGN(x, a) (((x) + (a) - 1) & ~((a) - 1))
#define IS_ALIGNED(x, a) (!((x) & ((a) - 1)))
#define round_down(x, a) ((x) & ~((a) - 1))
#define min(a, b) ((a) < (b) ? (a) : (b))
#define min3(a, b, c) min(min(a, b), c)
#define container_of(pointer, type, member) ((type *)((char *)(pointer) - offsetof(type, member)))
#define ARRAY_SIZE(array) (sizeof(array) / sizeof((array)[0]))
#define ERR_PTR(error) ((void *)(long)(error))
#define IS_ERR(pointer) ((unsigned long)(pointer) >= -4095UL)
#define kzalloc(size, flags) calloc(1, size)
#define kfree free

struct interval_tree_node { unsigned long start, last; struct interval_tree_node *next; };
struct rb_root_cached { struct interval_tree_node *first; };
static unsigned long steps;

static inline void interval_tree_insert(struct interval_tree_node *node, struct rb_root_cached *root)
{
	struct interval_tree_node **at = &root->first;

	while (*at && (*at)->start < node->start)
		at = &(*at)->next;
	node->next = *at;
	*at = node;
}

static inline void interval_tree_remove(struct interval_tree_node *node, struct rb_root_cached *root)
{
	struct interval_tree_node **at = &root->first;

	while (*at != node)
		at = &(*at)->next;
	*at = node->next;
}

static inline struct interval_tree_node *
interval_tree_iter_first(struct rb_root_cached *root, unsigned long start, unsigned long last)
{
	struct interval_tree_node *node = root->first;

	while (node && node->last < start)
		node = node->next;
	return node && node->start <= last ? node : NULL;
}

static inline struct interval_tree_node *
interval_tree_iter_next(struct interval_tree_node *node, unsigned long start, unsigned long last)
{
	steps++;
	return node->next && node->next->start <= last ? node->next : NULL;
}
#endif
"""
# Frees runs "PFN COUNT", highest first, up to "0 0"; then takes pages for files of "PAGES", and says what they got.
PROGRAM = """
#include "runs.c"
#include <stdio.h>

int main(void)
{
	struct rb_root_cached root = {};
	unsigned long pfn, nr, first;
	struct run *run;

	while (scanf("%lu %lu", &pfn, &nr) == 2 && nr) {
		run = new_run(pfn, pfn + nr - 1);
		run_insert_free(&root, run);
	}
	while (scanf("%lu", &nr) == 1) {
		struct run_search search = {};

		steps = 0;
		for (first = 0; first < nr; first = run->node.last + 1) {
			run = run_take(&root, &search, first, nr - first);
			if (IS_ERR(run))
				return 1;
			printf("%lu+%lu ", run->pfn, run_pages(run));
		}
		printf("%lu\\n", steps);
	}
	return 0;
}
"""
HEADERS = ("err", "mm", "slab", "interval_tree", "list", "mutex", "rbtree", "uidgid", "wait", "workqueue")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("gcc") is None:
        pytest.skip("no gcc: how the module chooses pages was not tried (install gcc)")
    folder = tmp_path_factory.mktemp("runs")
    (folder / "linux").mkdir()
    for header in HEADERS:
        (folder / "linux" / f"{header}.h").write_text(KERNEL)
    (folder / "main.c").write_text(PROGRAM)
    include = [f"-I{folder}", f"-I{RUNS.parent}"]
    subprocess.run(["gcc", "-O1", *include, "-o", folder / "runs", folder / "main.c"], check=True)
    return folder / "runs"


def taken(program: Path, free: list[tuple[int, int]], *files: int) -> list[tuple[list[tuple[int, int]], int]]:
    """What each file gets, as (PFN, pages), and how many free runs were walked over for that."""
    runs = "".join(f"{pfn} {count}\n" for pfn, count in reversed(free))
    words = f"{runs}0 0\n" + "".join(f"{file}\n" for file in files)
    said = subprocess.run([program], input=words, stdout=subprocess.PIPE, text=True, check=True).stdout
    found = []
    for line in said.splitlines():
        *pieces, steps = line.split()
        found.append(([(int(pfn), int(count)) for pfn, count in (piece.split("+") for piece in pieces)], int(steps)))
    return found


def test_large_pages_are_kept_for_what_can_use_them(program: Path) -> None:
    free = [(100, 3), (512, 1024), (2000, 2), (4096, 512)]
    (large, _), (small, _) = taken(program, free, 1024, 6)
    assert large == [(512, 1024)]
    assert small == [(100, 3), (2000, 2), (4096, 1)]


def test_a_user_who_left_a_hole_at_every_other_page_keeps_nobody_waiting(program: Path) -> None:
    """Nothing is walked over twice for one file, though each 2 MiB of it are looked for, with the pool locked."""
    count = 1 << 14
    holes = [(1 + 2 * index, 1) for index in range(count)]
    ((pages, steps),) = taken(program, holes, count)
    assert pages == holes
    assert steps <= 3 * count
