/* What pool.c and runs.c need of the kernel, in one thread of a process. */
#ifndef _OFFMAP_COMPAT_H
#define _OFFMAP_COMPAT_H /* which is of the real kernel's headers */

#include <assert.h>
#include <errno.h>
#include <limits.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/types.h>

typedef uint64_t u64, phys_addr_t;
typedef struct { unsigned int val; } kuid_t, kgid_t;
typedef unsigned int umode_t, wait_queue_head_t, atomic_t;

#define PAGE_SHIFT 12
#define PAGE_SIZE (1UL << PAGE_SHIFT)
#define PMD_SIZE (2UL << 20)
#define PUD_SIZE (1UL << 30)
#define PHYS_PFN(phys) ((phys) >> PAGE_SHIFT)
#define PFN_PHYS(pfn) ((phys_addr_t)(pfn) << PAGE_SHIFT)
#define ALIGN(x, a) (((x) + (a) - 1) & ~((a) - 1))
#define IS_ALIGNED(x, a) (!((x) & ((a) - 1)))
#define DIV_ROUND_UP_ULL(x, a) (((u64)(x) + (a) - 1) / (a))
#define offset_in_page(x) ((x) & (PAGE_SIZE - 1))
#define round_down(x, a) ((x) & ~((a) - 1))
#define min(a, b) ((a) < (b) ? (a) : (b))
#define max(a, b) ((a) > (b) ? (a) : (b))
#define min3(a, b, c) min(min(a, b), c)
#define container_of(pointer, type, member) ((type *)((char *)(pointer) - offsetof(type, member)))
#define ARRAY_SIZE(array) (sizeof(array) / sizeof((array)[0]))
#define READ_ONCE(x) (x)
#define WRITE_ONCE(x, value) ((x) = (value))
#define ERR_PTR(error) ((void *)(long)(error))
#define PTR_ERR(pointer) ((long)(pointer))
#define IS_ERR(pointer) ((unsigned long)(pointer) >= -4095UL)

#define kzalloc(size, flags) calloc(1, size)
#define kvmalloc_array(nr, size, flags) calloc(nr, size)
#define kfree free
#define kvfree free

/* --- lists ----------------------------------------------------------------- */

struct list_head { struct list_head *next, *prev; };

#define LIST_HEAD_INIT(name) { &(name), &(name) }
#define LIST_HEAD(name) struct list_head name = LIST_HEAD_INIT(name)
#define list_entry container_of
#define list_for_each_entry(pos, head, member)						\
	for (pos = container_of((head)->next, __typeof__(*pos), member); &pos->member != (head);	\
	     pos = container_of(pos->member.next, __typeof__(*pos), member))
#define list_for_each_entry_safe(pos, n, head, member)					\
	for (pos = container_of((head)->next, __typeof__(*pos), member),			\
	     n = container_of(pos->member.next, __typeof__(*pos), member); &pos->member != (head);	\
	     pos = n, n = container_of(n->member.next, __typeof__(*n), member))
#define list_for_each_entry_safe_reverse(pos, n, head, member)				\
	for (pos = container_of((head)->prev, __typeof__(*pos), member),			\
	     n = container_of(pos->member.prev, __typeof__(*pos), member); &pos->member != (head);	\
	     pos = n, n = container_of(n->member.prev, __typeof__(*n), member))

static inline void INIT_LIST_HEAD(struct list_head *head)
{
	head->next = head->prev = head;
}

static inline bool list_empty(const struct list_head *head)
{
	return head->next == head;
}

static inline void list_add(struct list_head *new, struct list_head *head)
{
	new->next = head->next;
	new->prev = head;
	head->next->prev = new;
	head->next = new;
}

static inline void list_add_tail(struct list_head *new, struct list_head *head)
{
	list_add(new, head->prev);
}

static inline void list_del(struct list_head *entry)
{
	entry->prev->next = entry->next;
	entry->next->prev = entry->prev;
	entry->next = entry->prev = NULL;
}

static inline void list_move(struct list_head *entry, struct list_head *head)
{
	list_del(entry);
	list_add(entry, head);
}

static inline void list_splice_init(struct list_head *list, struct list_head *head)
{
	while (!list_empty(list)) {
		struct list_head *entry = list->prev;

		list_move(entry, head);
	}
}

static inline void list_sort(void *priv, struct list_head *head,
			     int (*cmp)(void *, const struct list_head *, const struct list_head *))
{
	LIST_HEAD(sorted);

	while (!list_empty(head)) {
		struct list_head *entry = head->next, *at = sorted.prev;

		list_del(entry);
		while (at != &sorted && cmp(priv, at, entry) > 0)
			at = at->prev;
		list_add(entry, at);
	}
	list_splice_init(&sorted, head);
}

/* --- an interval tree, which is a list, and counts the steps of a walk -------- */

struct interval_tree_node { unsigned long start, last; struct interval_tree_node *next; };
struct rb_root_cached { struct interval_tree_node *first; };
#define RB_ROOT_CACHED ((struct rb_root_cached){})
extern unsigned long steps;

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

/* --- locks, which nobody takes twice, and work ------------------------------- */

struct mutex { bool held; };

#define DEFINE_MUTEX(name) struct mutex name
#define mutex_init(mutex) ((mutex)->held = false)
#define mutex_lock(mutex) take_lock(&(mutex)->held)
#define mutex_unlock(mutex) give_lock(&(mutex)->held)

static inline void take_lock(bool *held)
{
	assert(!*held);
	*held = true;
}

static inline void give_lock(bool *held)
{
	assert(*held);
	*held = false;
}

struct work_struct { void (*call)(struct work_struct *work); };
struct delayed_work { struct work_struct work; };
/* What is queued: there is one work at most. Who waits does it. */
extern struct delayed_work *queued;

#define to_delayed_work(pointer) container_of(pointer, struct delayed_work, work)
#define INIT_DELAYED_WORK(delayed, function) ((delayed)->work.call = (function))
#define queue_delayed_work(queue, delayed, jiffies) (queued = (delayed))
#define mod_delayed_work(queue, delayed, jiffies) (queued = (delayed))
#define cancel_delayed_work_sync(delayed) (queued = NULL)
#define HZ 250
#define msleep(ms)
#define init_waitqueue_head(queue)
#define wake_up_all(queue)
/* Nobody else would wake it: where nothing is queued, it would sleep for ever. */
#define wait_event_killable(queue, condition) ({		\
	while (!(condition)) {				\
		assert(queued);				\
		do_work();				\
	}						\
	0;						\
})
#define wait_event_interruptible wait_event_killable
void do_work(void);

/* --- files, devices, processes ----------------------------------------------- */

struct address_space { bool locked; };
struct inode {
	struct address_space *i_mapping, data;
	kuid_t i_uid;
	loff_t size;
	u64 i_blocks;
	void *i_private;
};

#define i_size_read(inode) ((inode)->size)
#define filemap_invalidate_lock(mapping) take_lock(&(mapping)->locked)
#define filemap_invalidate_unlock(mapping) give_lock(&(mapping)->locked)
#define filemap_invalidate_lock_shared filemap_invalidate_lock
#define filemap_invalidate_unlock_shared filemap_invalidate_unlock
#define unmap_mapping_range(mapping, start, size, even_cows) ((void)(mapping))
#define uid_eq(a, b) ((a).val == (b).val)
#define from_kuid_munged(ns, uid) ((uid).val)
#define capable(capability) privileged
extern bool privileged;

struct device { const struct device_driver { const char *name; } *driver; };
#define bus_for_each_dev(bus, start, data, function) ((void)(function), 0)
#define device_trylock(dev) true
#define device_unlock(dev)
#define strstarts(string, prefix) false
#define pci_is_enabled(dev) false

#define current (&(struct { unsigned int flags; }){ PF_KTHREAD })
#define PF_KTHREAD 1
#define jiffies 0UL
#define sysfs_emit_at(buf, at, ...) sprintf((buf) + (at), __VA_ARGS__)
#define MAJOR(dev) 0U
#define MINOR(dev) 0U

static inline unsigned long find_next_bit(const unsigned long *bits, unsigned long nr, unsigned long bit)
{
	while (bit < nr && !(bits[bit / 64] >> bit % 64 & 1))
		bit++;
	return min(bit, nr);
}

#define for_each_set_bit(bit, bits, nr)							\
	for (bit = find_next_bit(bits, nr, 0); bit < (nr); bit = find_next_bit(bits, nr, bit + 1))

/* --- what the module's internal.h names, and nobody here looks into --------------- */

typedef unsigned long pgoff_t;
struct file;
struct vm_area_struct;
struct workqueue_struct;
struct resource { phys_addr_t start; };

void vm_unmap_aliases(void);

#endif
