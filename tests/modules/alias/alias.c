// SPDX-License-Identifier: GPL-2.0
/*
 * /dev/offmap-alias: kernel mappings of whatever memory a test asks for, so that the audit has something to find.
 *
 * What is written to it is "vmap ADDRESS..." (pages of RAM, side by side in the order given) or "memremap ADDRESS
 * LENGTH [wc]" (memory that Linux does not own; write-combining instead of cached). One mapping for each open file; it goes with the file. Reading 8 * N bytes
 * makes exactly N loads of 8 bytes by that mapping.
 *
 * "loose ADDRESS..." is vmap without a reference: the pages may be free, or go to somebody else.
 *
 * "image ADDRESS..." maps pages behind the end of the kernel's image, in the 2 MiB after those that it is mapped by.
 *
 * "flash ADDRESS MICROSECONDS" maps one page for so long, makes one load by the mapping, and unmaps it.
 *
 * Only for disposable hosts: it maps what it is told to.
 */
#include <linux/delay.h>
#include <linux/fs.h>
#include <linux/io.h>
#include <linux/miscdevice.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/slab.h>
#include <linux/uaccess.h>
#include <linux/vmalloc.h>
#include <asm/pgalloc.h>

#define MOST_PAGES 64

struct alias {
	struct page *pages[MOST_PAGES];
	unsigned int count;
	bool held;
	void *vmapped;
	void *remapped;
	pte_t *table;
	unsigned long slot_addr;
	size_t mapped_bytes;
};

static int alias_open(struct inode *inode, struct file *file)
{
	file->private_data = kzalloc(sizeof(struct alias), GFP_KERNEL);
	return file->private_data ? 0 : -ENOMEM;
}

static int alias_pages(struct alias *alias, char *words, bool hold)
{
	char *word;

	alias->held = hold;

	while ((word = strsep(&words, " \n"))) {
		u64 phys;

		if (!*word)
			continue;
		if (kstrtoull(word, 0, &phys) || alias->count == MOST_PAGES || !pfn_valid(PHYS_PFN(phys)))
			return -EINVAL;
		alias->pages[alias->count++] = pfn_to_page(PHYS_PFN(phys));
		if (hold)
			get_page(pfn_to_page(PHYS_PFN(phys)));
	}
	return alias->count ? 0 : -EINVAL;
}

static int alias_vmap(struct alias *alias, char *words, bool hold)
{
	int error = alias_pages(alias, words, hold);

	if (error)
		return error;
	alias->mapped_bytes = alias->count * PAGE_SIZE;
	alias->vmapped = vmap(alias->pages, alias->count, VM_MAP, PAGE_KERNEL);
	return alias->vmapped ? 0 : -ENOMEM;
}

static pmd_t *pmd_of(unsigned long addr)
{
	/* The kernel half is the same for all. */
	pgd_t *pgd = pgd_offset_pgd(current->active_mm->pgd, addr);

	return pmd_offset(pud_offset(p4d_offset(pgd, addr), addr), addr);
}

static int alias_image(struct alias *alias, char *words)
{
	unsigned long addr = ALIGN((unsigned long)&vmap, PMD_SIZE);
	int error = alias_pages(alias, words, true);
	unsigned int i;

	if (error)
		return error;
	while (addr < MODULES_VADDR && !pmd_none(*pmd_of(addr)))
		addr += PMD_SIZE;
	alias->table = addr < MODULES_VADDR ? (pte_t *)get_zeroed_page(GFP_KERNEL) : NULL;
	if (!alias->table)
		return -ENOMEM;
	for (i = 0; i < alias->count; i++)
		set_pte(&alias->table[i], mk_pte(alias->pages[i], PAGE_KERNEL_RO));
	alias->slot_addr = addr;
	set_pmd(pmd_of(addr), __pmd(__pa(alias->table) | _KERNPG_TABLE));
	return 0;
}

static void alias_image_end(struct alias *alias)
{
	unsigned int i;

	set_pmd(pmd_of(alias->slot_addr), __pmd(0));
	/* These hosts have one processor. */
	for (i = 0; i < alias->count; i++)
		asm volatile("invlpg (%0)" : : "r" (alias->slot_addr + i * PAGE_SIZE) : "memory");
	free_page((unsigned long)alias->table);
}

static int alias_memremap(struct alias *alias, char *words)
{
	u64 phys, length;
	char *word = strsep(&words, " \n");

	if (kstrtoull(word, 0, &phys) || !words || kstrtoull(strsep(&words, " \n"), 0, &length))
		return -EINVAL;
	alias->mapped_bytes = length;
	alias->remapped = memremap(phys, length, words && !strncmp(words, "wc", 2) ? MEMREMAP_WC : MEMREMAP_WB);
	return alias->remapped ? 0 : -ENOMEM;
}

static int alias_flash(char *words)
{
	char *word = strsep(&words, " \n");
	unsigned long microseconds;
	struct page *page;
	void *mapped;
	u64 phys;

	if (kstrtoull(word, 0, &phys) || !words || kstrtoul(strsep(&words, " \n"), 0, &microseconds))
		return -EINVAL;
	phys &= PAGE_MASK;
	page = pfn_valid(PHYS_PFN(phys)) ? pfn_to_page(PHYS_PFN(phys)) : NULL;
	mapped = page ? vmap(&page, 1, VM_MAP, PAGE_KERNEL) : memremap(phys, PAGE_SIZE, MEMREMAP_WB);
	if (!mapped)
		return -ENOMEM;
	fsleep(microseconds);
	READ_ONCE(*(u64 *)mapped);
	if (page)
		vunmap(mapped);
	else
		memunmap(mapped);
	return 0;
}

static ssize_t alias_write(struct file *file, const char __user *text, size_t length, loff_t *at)
{
	struct alias *alias = file->private_data;
	char *copy;
	int error = -EINVAL;

	if (alias->vmapped || alias->remapped || alias->count)
		return -EBUSY;
	if (length > PAGE_SIZE)
		return -EINVAL;
	copy = memdup_user_nul(text, length);
	if (IS_ERR(copy))
		return PTR_ERR(copy);
	if (!strncmp(copy, "vmap ", 5))
		error = alias_vmap(alias, copy + 5, true);
	else if (!strncmp(copy, "loose ", 6))
		error = alias_vmap(alias, copy + 6, false);
	else if (!strncmp(copy, "image ", 6))
		error = alias_image(alias, copy + 6);
	else if (!strncmp(copy, "memremap ", 9))
		error = alias_memremap(alias, copy + 9);
	else if (!strncmp(copy, "flash ", 6))
		error = alias_flash(copy + 6);
	kfree(copy);
	return error ? error : length;
}

static ssize_t alias_read(struct file *file, char __user *to, size_t length, loff_t *at)
{
	struct alias *alias = file->private_data;
	const u64 *words = alias->vmapped ? alias->vmapped : alias->remapped;
	size_t count = alias->mapped_bytes / sizeof(u64);
	size_t i;

	if (!words || !count)
		return -EINVAL;
	for (i = 0; i < length / sizeof(u64); i++) {
		u64 word = READ_ONCE(words[i % count]);

		if (put_user(word, (u64 __user *)to + i))
			return -EFAULT;
	}
	return i * sizeof(u64);
}

static int alias_release(struct inode *inode, struct file *file)
{
	struct alias *alias = file->private_data;

	vunmap(alias->vmapped);
	if (alias->table)
		alias_image_end(alias);
	if (alias->remapped)
		memunmap(alias->remapped);
	while (alias->held && alias->count)
		put_page(alias->pages[--alias->count]);
	/* What vunmap() has left for later is still mapped: a test that looks must not see it. */
	vm_unmap_aliases();
	kfree(alias);
	return 0;
}

static const struct file_operations alias_operations = {
	.owner = THIS_MODULE,
	.open = alias_open,
	.read = alias_read,
	.write = alias_write,
	.release = alias_release,
};

static struct miscdevice alias_device = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = "offmap-alias",
	.fops = &alias_operations,
	.mode = 0600,
};

module_misc_device(alias_device);
MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("Kernel mappings for tests of offmap's audit");
