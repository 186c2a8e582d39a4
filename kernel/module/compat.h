/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What differs between the kernels that this builds against, 6.1 to 7.3. Kbuild
 * looks into their headers for OFFMAP_HAVE_*.
 */
#ifndef _OFFMAP_COMPAT_H
#define _OFFMAP_COMPAT_H

#include <linux/fs.h>
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

/* mapping_inaccessible() came in 6.11. */
#ifdef OFFMAP_HAVE_INACCESSIBLE
#define offmap_mapping_fixed	mapping_inaccessible
#else
static inline bool offmap_mapping_fixed(const struct address_space *mapping)
{
	return false;
}
#endif

/* register_pfn_address_space() came in 7.0. */
#ifdef OFFMAP_HAVE_PFN_ADDRESS_SPACE
#include <linux/memory-failure.h>
#endif

/* mseal() came in 6.10. */
#ifdef VM_SEALED
#define OFFMAP_VM_SEALED	VM_SEALED
#else
#define OFFMAP_VM_SEALED	0
#endif

/* struct mnt_idmap came in 6.3. */
#ifndef OFFMAP_HAVE_MNT_IDMAP
#define mnt_idmap		user_namespace
#define nop_mnt_idmap		init_user_ns
#endif

/* simple_inode_init_ts() came in 6.7. */
#ifdef OFFMAP_HAVE_INODE_TIMES
#define offmap_init_times	simple_inode_init_ts

static inline void offmap_touch(struct inode *inode)
{
	inode_set_mtime_to_ts(inode, inode_set_ctime_current(inode));
}
#else
static inline void offmap_touch(struct inode *inode)
{
	inode->i_ctime = current_time(inode);
	inode->i_mtime = inode->i_ctime;
}

static inline void offmap_init_times(struct inode *inode)
{
	offmap_touch(inode);
	inode->i_atime = inode->i_ctime;
}
#endif

/* ->create() lost its flag in 7.x. */
#ifdef OFFMAP_HAVE_CREATE_EXCL
#define OFFMAP_CREATE_MODE	umode_t mode, bool excl
#else
#define OFFMAP_CREATE_MODE	umode_t mode
#endif

/* Dentries that stay without a user are marked so from 6.19 on. */
#ifdef OFFMAP_HAVE_PERSISTENT_DENTRIES
#define offmap_make_persistent	d_make_persistent
#define offmap_kill_super	kill_anon_super
#else
#define offmap_kill_super	kill_litter_super

static inline void offmap_make_persistent(struct dentry *dentry, struct inode *inode)
{
	d_instantiate(dentry, inode);
	dget(dentry);
}
#endif

#endif /* _OFFMAP_COMPAT_H */
