// SPDX-License-Identifier: GPL-2.0
/*
 * Takes calls out of the running kernel, so that a test can show that it sees what goes wrong without them.
 *
 * `calls` are addresses of direct calls (e8) in the kernel's text. They do nothing while the module is loaded.
 *
 * Only for disposable hosts, where nobody runs what is being written.
 */
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/vmalloc.h>

#define MOST 8
#define CALL_BYTES 5

static const u8 nothing[CALL_BYTES] = { 0x0f, 0x1f, 0x44, 0x00, 0x00 };
static unsigned long calls[MOST];
static u8 was[MOST][CALL_BYTES];
static unsigned int count;
module_param_array(calls, ulong, &count, 0400);

/* By a mapping of our own: the kernel's is read-only. */
static int put(unsigned long address, const u8 *bytes)
{
	struct page *pages[] = {
		pfn_to_page(PHYS_PFN(__pa(address))),
		pfn_to_page(PHYS_PFN(__pa(address + CALL_BYTES - 1))),
	};
	void *mapped = vmap(pages, ARRAY_SIZE(pages), VM_MAP, PAGE_KERNEL);

	if (!mapped)
		return -ENOMEM;
	memcpy(mapped + offset_in_page(address), bytes, CALL_BYTES);
	vunmap(mapped);
	return 0;
}

static void skip_exit(void)
{
	while (count--)
		put(calls[count], was[count]);
}

static int __init skip_init(void)
{
	unsigned int wanted = count;
	int error = wanted ? 0 : -EINVAL;

	for (count = 0; count < wanted && !error; ) {
		memcpy(was[count], (void *)calls[count], CALL_BYTES);
		error = was[count][0] == 0xe8 ? put(calls[count], nothing) : -EINVAL;
		if (!error)
			count++;
	}
	if (error)
		skip_exit();
	return error;
}

module_init(skip_init);
module_exit(skip_exit);
MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("Takes calls out of the running kernel, for tests of what they are for");
