/*
 * Frees runs "PFN COUNT", highest first, up to "0 0"; then takes pages for files of
 * "PAGES", and says what each got, and how many free runs were walked over.
 */
#include "pool.h"
#include <linux/slab.h>

unsigned long steps;

int main(void)
{
	struct rb_root_cached root = {};
	unsigned long pfn, nr, first;
	struct run *run;

	while (scanf("%lu %lu", &pfn, &nr) == 2 && nr) {
		run = kzalloc(sizeof(*run), GFP_KERNEL);
		run->pfn = pfn;
		run->node.start = pfn;
		run->node.last = pfn + nr - 1;
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
		printf("%lu\n", steps);
	}
	return 0;
}
