/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What differs between the kernels that this builds against, 6.1 to 7.3. Kbuild
 * looks into their headers for OFFMAP_HAVE_*.
 */
#ifndef _OFFMAP_COMPAT_H
#define _OFFMAP_COMPAT_H

#include <linux/mm.h>

/* pfn_t went in 6.17. */
#ifdef OFFMAP_HAVE_PFN_T
#include <linux/pfn_t.h>
#define offmap_pfn(phys)	phys_to_pfn_t(phys, 0)
#else
#define offmap_pfn(phys)	PHYS_PFN(phys)
#endif

/*
 * Large pages only where the kernel marks them special (6.12): before, GUP-fast
 * takes such an entry for ordinary memory, and there is no struct page.
 */
#ifdef CONFIG_ARCH_SUPPORTS_PMD_PFNMAP
#define OFFMAP_HUGE_PFNMAP
#endif

/* vm_flags_set() came in 6.3. */
#ifdef OFFMAP_HAVE_VM_FLAGS_SET
#define offmap_vm_flags_set	vm_flags_set
#define offmap_vm_flags_clear	vm_flags_clear
#else
static inline void offmap_vm_flags_set(struct vm_area_struct *vma, unsigned long flags)
{
	vma->vm_flags |= flags;
}

static inline void offmap_vm_flags_clear(struct vm_area_struct *vma, unsigned long flags)
{
	vma->vm_flags &= ~flags;
}
#endif

/* page_has_movable_ops() came in 6.17. */
#ifdef OFFMAP_HAVE_MOVABLE_OPS
#define offmap_page_movable	page_has_movable_ops
#else
#define offmap_page_movable	__PageMovable
#endif

/* register_pfn_address_space() came in 7.0. */
#ifdef OFFMAP_HAVE_PFN_ADDRESS_SPACE
#include <linux/memory-failure.h>
#endif

#endif /* _OFFMAP_COMPAT_H */
