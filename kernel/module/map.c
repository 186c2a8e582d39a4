// SPDX-License-Identifier: GPL-2.0
/*
 * Map memory that the kernel does not own.
 *
 * A mapping is shared and VM_PFNMAP: KVM takes the addresses from it, and the
 * host kernel cannot pin it. It is made of the largest pages that there are.
 *
 * What a mapping is of changes under the invalidate lock of its file.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/fs.h>
#include <linux/mm.h>
#include <linux/mman.h>
#include <linux/sched/signal.h>

#include "compat.h"
#include "internal.h"

static u64 vma_offset(struct vm_area_struct *vma, unsigned long addr)
{
	return ((u64)vma->vm_pgoff << PAGE_SHIFT) + (addr - vma->vm_start);
}

static bool vma_poisoned(struct vm_area_struct *vma, unsigned long addr, u64 length)
{
	const struct offmap_memory *mem = vma->vm_private_data;

	return mem->source->poisoned &&
	       mem->source->poisoned(mem, vma_offset(vma, addr), length);
}

static phys_addr_t vma_phys(struct vm_area_struct *vma, unsigned long addr, u64 *length)
{
	const struct offmap_memory *mem = vma->vm_private_data;
	phys_addr_t phys = mem->source->phys(mem, vma_offset(vma, addr), length);

	*length = min_t(u64, *length, vma->vm_end - addr);
	return phys;
}

/* Map the aligned 2^@order pages around the fault, if they are that in physical memory too. */
static vm_fault_t insert_pages(struct vm_fault *vmf, unsigned int order)
{
	unsigned long size = PAGE_SIZE << order;
	unsigned long addr = ALIGN_DOWN(vmf->address, size);
	struct vm_area_struct *vma = vmf->vma;
	phys_addr_t phys;
	u64 length;

	if (addr < vma->vm_start)
		return VM_FAULT_FALLBACK;
	phys = vma_phys(vma, addr, &length);
	if (length < size || !IS_ALIGNED(phys, size))
		return VM_FAULT_FALLBACK;
	if (vma_poisoned(vma, addr, size))
		return order ? VM_FAULT_FALLBACK : VM_FAULT_HWPOISON;
	switch (order) {
	case 0:
		return vmf_insert_pfn(vma, addr, PHYS_PFN(phys));
#ifdef OFFMAP_HUGE_PFNMAP
	case PMD_ORDER:
		return vmf_insert_pfn_pmd(vmf, offmap_pfn(phys), vmf->flags & FAULT_FLAG_WRITE);
#ifdef CONFIG_ARCH_SUPPORTS_PUD_PFNMAP
	case PUD_ORDER:
		return vmf_insert_pfn_pud(vmf, offmap_pfn(phys), vmf->flags & FAULT_FLAG_WRITE);
#endif
#endif
	default:
		return VM_FAULT_FALLBACK;
	}
}

/*
 * A large page could not be had, so a fault would come for each small one: map
 * the others of its page table as well.
 */
static vm_fault_t insert_around(struct vm_fault *vmf)
{
	struct vm_area_struct *vma = vmf->vma;
	vm_fault_t ret = insert_pages(vmf, 0);
	unsigned long addr, end;
	phys_addr_t phys;
	bool poisoned;
	u64 length;

	if (ret != VM_FAULT_NOPAGE)
		return ret;
	addr = max(ALIGN_DOWN(vmf->address, PMD_SIZE), vma->vm_start);
	end = min(ALIGN_DOWN(vmf->address, PMD_SIZE) + PMD_SIZE, vma->vm_end);
	poisoned = vma_poisoned(vma, addr, end - addr);
	while (addr < end) {
		phys = vma_phys(vma, addr, &length);
		if (!length) {
			addr += PAGE_SIZE;
			continue;
		}
		for (length = min_t(u64, length, end - addr); length; length -= PAGE_SIZE) {
			if (!(poisoned && vma_poisoned(vma, addr, PAGE_SIZE)) &&
			    vmf_insert_pfn(vma, addr, PHYS_PFN(phys)) != VM_FAULT_NOPAGE)
				return ret;
			addr += PAGE_SIZE;
			phys += PAGE_SIZE;
		}
	}
	return ret;
}

static vm_fault_t offmap_fault(struct vm_fault *vmf)
{
	struct address_space *mapping = vmf->vma->vm_file->f_mapping;
	struct offmap_memory *mem = vmf->vma->vm_private_data;
	vm_fault_t ret;

	do {
		filemap_invalidate_lock_shared(mapping);
		ret = insert_around(vmf);
		filemap_invalidate_unlock_shared(mapping);
		/* There is nothing there: maybe there can be. */
	} while (ret == VM_FAULT_FALLBACK && mem->source->fill &&
		 !fatal_signal_pending(current) &&
		 !mem->source->fill(mem, vma_offset(vmf->vma, vmf->address & PAGE_MASK)));
	return ret == VM_FAULT_FALLBACK ? VM_FAULT_SIGBUS : ret;
}

#ifdef OFFMAP_HUGE_PFNMAP
static vm_fault_t offmap_huge_fault(struct vm_fault *vmf, unsigned int order)
{
	struct address_space *mapping = vmf->vma->vm_file->f_mapping;
	struct offmap_memory *mem = vmf->vma->vm_private_data;
	vm_fault_t ret;

	if (!mem->source->large)
		return VM_FAULT_FALLBACK;
	filemap_invalidate_lock_shared(mapping);
	ret = insert_pages(vmf, order);
	filemap_invalidate_unlock_shared(mapping);
	return ret;
}
#endif

/* No ->access: ptrace and process_vm_readv() are to stay out. */
static const struct vm_operations_struct offmap_vm_ops = {
	.fault = offmap_fault,
#ifdef OFFMAP_HUGE_PFNMAP
	.huge_fault = offmap_huge_fault,
#endif
};

/* --- mappings that stay as they are -------------------------------------- */

static int guarded_may_split(struct vm_area_struct *vma, unsigned long addr)
{
	return -EINVAL;
}

static int guarded_mremap(struct vm_area_struct *vma)
{
	return -EPERM;
}

static int guarded_mprotect(struct vm_area_struct *vma, unsigned long start, unsigned long end,
			    unsigned long newflags)
{
	return -EPERM;
}

/*
 * A process that ends has no users of its memory any more. One that goes on
 * would do so with other memory, where its guest's had been.
 */
static void guarded_close(struct vm_area_struct *vma)
{
	if (!atomic_read(&vma->vm_mm->mm_users))
		return;
	pr_warn_ratelimited("%s (%d) unmapped guest memory that was to stay: killed\n",
			    current->comm, task_tgid_nr(current));
	send_sig(SIGKILL, current, 1);
}

static const struct vm_operations_struct guarded_vm_ops = {
	.may_split = guarded_may_split,
	.mremap = guarded_mremap,
	.mprotect = guarded_mprotect,
	.close = guarded_close,
	.fault = offmap_fault,
#ifdef OFFMAP_HUGE_PFNMAP
	.huge_fault = offmap_huge_fault,
#endif
};

/* --- making them --------------------------------------------------------- */

/* What a mapping is of, or NULL if it is not one of ours. */
static struct offmap_memory *vma_memory(struct vm_area_struct *vma)
{
	if (vma->vm_ops != &offmap_vm_ops && vma->vm_ops != &guarded_vm_ops)
		return NULL;
	return vma->vm_private_data;
}

struct offmap_memory *offmap_vma_memory(struct vm_area_struct *vma)
{
	struct offmap_memory *mem = vma_memory(vma);

	return mem && mem->source->large ? mem : NULL;
}

int offmap_translate(struct vm_area_struct *vma, unsigned long addr, u64 *phys, u64 *length)
{
	struct address_space *mapping;

	if (!vma_memory(vma))
		return -ENXIO;
	mapping = vma->vm_file->f_mapping;
	filemap_invalidate_lock_shared(mapping);
	*phys = vma_phys(vma, addr, length);
	filemap_invalidate_unlock_shared(mapping);
	return *length ? 0 : -ENODATA;
}

/*
 * Where one page can map a gigabyte, the address must be that of one too.
 * thp_get_unmapped_area() aligns to 2M. Memory may be chosen by the mapping
 * itself, so whether it will have whole gigabytes is not known yet.
 */
unsigned long offmap_get_unmapped_area(struct file *file, unsigned long addr, unsigned long len,
				       unsigned long pgoff, unsigned long flags)
{
#ifdef CONFIG_ARCH_SUPPORTS_PUD_PFNMAP
	unsigned long phase = (pgoff << PAGE_SHIFT) & ~PUD_MASK;
	unsigned long room;

	if (len >= PUD_SIZE && len + PUD_SIZE > len && !addr && !(flags & MAP_FIXED)) {
		room = thp_get_unmapped_area(file, 0, len + PUD_SIZE, pgoff, flags);
		if (!IS_ERR_VALUE(room))
			return ALIGN(room - phase, PUD_SIZE) + phase;
	}
#endif
	return thp_get_unmapped_area(file, addr, len, pgoff, flags);
}

/* Whether a mapping can be one of ours at all. */
int offmap_may_map(struct vm_area_struct *vma)
{
	/* A private copy of a page would be ordinary memory. */
	if (!(vma->vm_flags & VM_SHARED))
		return -EINVAL;
	return vma->vm_flags & VM_EXEC ? -EPERM : 0;
}

int offmap_map(struct offmap_memory *mem, struct vm_area_struct *vma, bool guarded)
{
	u64 offset = (u64)vma->vm_pgoff << PAGE_SHIFT;
	u64 size = vma->vm_end - vma->vm_start;

	if (size > mem->size || offset > mem->size - size)
		return -EINVAL;
	offmap_vm_flags_clear(vma, VM_MAYEXEC);
	/* VM_HUGEPAGE: for hosts whose THP setting is "madvise". */
	offmap_vm_flags_set(vma, VM_PFNMAP | VM_IO | VM_DONTEXPAND | VM_DONTDUMP | VM_DONTCOPY |
			    (mem->source->large ? VM_HUGEPAGE : 0) |
			    (guarded ? OFFMAP_VM_SEALED : 0));
	vma->vm_private_data = mem;
	vma->vm_ops = guarded ? &guarded_vm_ops : &offmap_vm_ops;
	return 0;
}
