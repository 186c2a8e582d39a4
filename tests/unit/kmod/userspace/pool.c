/*
 * Does what chance says with files of a pool, and checks what the pool counts
 * against what is in its lists. Argument: where chance begins.
 */
#include <linux/fs.h>

#include "pool.h"

#define PAGES (1UL << 14)	/* of the pool */
#define QUOTA (PAGES / 3)
#define FILES 24
#define USERS 4
#define BASE 0x1000UL

unsigned long steps;
bool privileged;
struct delayed_work *queued;
struct mutex offmap_pieces_lock;
static struct pool *pool;
static bool mapped[PAGES];	/* by the kernel */
static bool dirty[PAGES];
static bool in_tlb[PAGES];	/* of somebody, though it is not mapped any more */
static unsigned int returned;

void do_work(void)
{
	struct delayed_work *work = queued;

	queued = NULL;
	work->work.call(&work->work);
}

int offmap_find_mapped(struct offmap_range *ranges, unsigned int nr)
{
	unsigned long pfn;

	for (; nr--; ranges++) {
		ranges->mapped = false;
		for (pfn = PHYS_PFN(ranges->start); pfn < PHYS_PFN(ranges->start + ranges->size); pfn++)
			ranges->mapped |= mapped[pfn - BASE];
	}
	return 0;
}

int offmap_zero_again(phys_addr_t start, u64 size)
{
	for (; size; start += PAGE_SIZE, size -= PAGE_SIZE) {
		dirty[PHYS_PFN(start) - BASE] = false;
		in_tlb[PHYS_PFN(start) - BASE] = true;
	}
	return 0;
}

void vm_unmap_aliases(void)
{
	unsigned long page;

	for (page = 0; page < PAGES; page++)
		in_tlb[page] = false;
}

int offmap_await_due(unsigned long deadline, bool killable)
{
	return 0;
}

unsigned long offmap_block_timeout(void)
{
	return 0;
}

struct offmap_memory *offmap_unplug(u64 *size, int nid, bool killable)
{
	struct unplugged *unplugged = calloc(1, sizeof(*unplugged));
	unsigned int i;

	INIT_LIST_HEAD(&unplugged->pieces);
	for (i = 0; i < 2; i++) {
		struct piece *piece = calloc(1, sizeof(*piece));

		piece->size = *size / 2;
		piece->start = PFN_PHYS(BASE) + i * piece->size;
		piece->bad = calloc(PHYS_PFN(piece->size) / 64, sizeof(long));
		piece->bad[3] = i;	/* a page of the second one has failed already */
		list_add_tail(&piece->node, &unplugged->pieces);
	}
	return &unplugged->mem;
}

void offmap_return(struct piece *piece)
{
	returned++;
	free(piece->bad);
	free(piece);
}

void offmap_sort_pieces(struct list_head *pieces)
{
	struct piece *a = container_of(pieces->next, struct piece, node);
	struct piece *b = container_of(pieces->prev, struct piece, node);

	if (a->start > b->start)
		list_move(&b->node, pieces);
}

bool offmap_poisoned(const struct piece *piece)
{
	return find_next_bit(piece->bad, PHYS_PFN(piece->size), 0) < PHYS_PFN(piece->size);
}

static unsigned long count_runs(struct rb_root_cached *root)
{
	unsigned long nr = 0;
	struct run *run;

	for (run = run_first(root, 0, ULONG_MAX); run; run = run_next(run, 0, ULONG_MAX))
		nr += run_pages(run);
	return nr;
}

static void check_user(struct pool_user *user)
{
	unsigned long files = 0, runs = 0, pages = 0, soon = 0;
	struct pool_file *file;
	struct run *run;

	list_for_each_entry(file, &pool->files, node) {
		files += file->user == user;
		pages += file->user == user ? file->nr_pages : 0;
	}
	list_for_each_entry(run, &pool->dirty, list) {
		runs += run->user == user;
		pages += run->user == user ? run_pages(run) : 0;
		soon += run->user == user && !run->held ? run_pages(run) : 0;
	}
	assert(user->nr_files == files && user->nr_runs == runs && (files || runs));
	assert(user->nr_pages == pages && user->nr_dirty == soon);
}

static void check(void)
{
	unsigned long files = 0, soon = 0, held = 0;
	struct pool_user *user;
	struct pool_file *file;
	struct run *run;

	for (run = run_first(&pool->free, 0, ULONG_MAX); run; run = run_next(run, 0, ULONG_MAX))
		for (unsigned long page = run->node.start; page <= run->node.last; page++)
			assert(!dirty[page - BASE] && !in_tlb[page - BASE]);
	list_for_each_entry(file, &pool->files, node) {
		assert(count_runs(&file->runs) == file->nr_pages);
		files += file->nr_pages;
	}
	list_for_each_entry(run, &pool->dirty, list)
		*(run->held ? &held : &soon) += run_pages(run);
	assert(count_runs(&pool->free) == pool->nr_free && soon == pool->nr_dirty && held == pool->nr_held);
	assert(pool->nr_free + soon + held + files + pool->nr_bad == PAGES);
	list_for_each_entry(user, &pool->users, node)
		check_user(user);
}

/* A file has pages: their users write to them. */
static void use(struct pool_file *file)
{
	struct run *run;

	for (run = run_first(&file->runs, 0, ULONG_MAX); run; run = run_next(run, 0, ULONG_MAX))
		for (unsigned long i = 0; i < run_pages(run); i++)
			dirty[run->pfn + i - BASE] = true;
}

static void lengthen(struct inode *inode, unsigned long *refused)
{
	unsigned long now = inode->size / PAGE_SIZE, then = now + rand() % 1500 + 1;
	struct pool_file *file = inode->i_private;
	int ret = pool_file_fill(file, now, then - 1, false);

	assert(!ret || ret == -EDQUOT || ret == -ENOSPC);
	assert(ret || privileged || file->user->nr_pages <= QUOTA);
	*refused += ret == -EDQUOT;
	if (!ret)
		inode->size = then * PAGE_SIZE;
}

static struct inode *make(void)
{
	struct inode *inode = calloc(1, sizeof(*inode));

	inode->i_mapping = &inode->data;
	inode->i_uid.val = rand() % USERS;
	assert(!pool_file_init(pool, inode));
	return inode;
}

static void drop(struct inode **inode)
{
	use((*inode)->i_private);
	pool_file_free((*inode)->i_private);
	free(*inode);
	*inode = NULL;
}

static void step(struct inode **inode, unsigned long *refused)
{
	struct pool_file *file;
	unsigned long pages, first;
	int what = rand() % 100;

	if (!*inode)
		*inode = make();
	file = (*inode)->i_private;
	pages = (*inode)->size / PAGE_SIZE;
	use(file);
	privileged = rand() % 20 == 0;
	if (what < 40) {
		lengthen(*inode, refused);
	} else if (what < 55 && pages) {
		first = rand() % pages;
		pool_file_punch(file, first, first + rand() % (pages - first));
	} else if (what < 65 && pages) {
		file->mem.source->fill(&file->mem, (rand() % pages) * PAGE_SIZE);
	} else if (what < 70) {
		(*inode)->i_uid.val = rand() % USERS;
		pool_file_set_owner(file);
	} else if (what < 80) {
		drop(inode);
	} else if (what < 83) {
		mapped[rand() % PAGES] = true;
	} else if (what < 86) {
		for (first = 0; first < PAGES; first++)
			mapped[first] = false;
	} else if (what < 87) {
		struct piece *piece = container_of(pool->pieces.next, struct piece, node);

		if (rand() % 4 == 0) {
			piece->bad[rand() % (PAGES / 128)] |= 1UL << rand() % 64;
			mutex_lock(&offmap_pieces_lock);
			offmap_pool_failed(piece);
			mutex_unlock(&offmap_pieces_lock);
		}
	} else if (queued) {
		do_work();
	}
}

int main(int argc, char **argv)
{
	struct inode *inodes[FILES] = {};
	unsigned long refused = 0;
	unsigned int i;

	srand(atoi(argv[1]));
	pool = calloc(1, sizeof(*pool));
	pool_init(pool);
	pool->set.quota = QUOTA;
	assert(!pool_grow(pool, PAGES * PAGE_SIZE));
	assert(pool->nr_bad == 1 && pool->nr_free == PAGES - 1);
	for (i = 0; i < 20000; i++) {
		step(&inodes[rand() % FILES], &refused);
		if (i % 20 == 0)
			check();
	}
	for (i = 0; i < FILES; i++)
		if (inodes[i])
			drop(&inodes[i]);
	for (i = 0; i < PAGES; i++)
		mapped[i] = false;
	while (queued)
		do_work();
	check();
	assert(list_empty(&pool->users) && pool->nr_free + pool->nr_bad == PAGES);
	printf("%d\n", refused > 0);
	pool_destroy(pool);
	assert(returned == 2);
	return 0;
}
