// SPDX-License-Identifier: GPL-2.0
/*
 * The structures that "offmap attack" reads, for kernels that do not describe them (CONFIG_DEBUG_INFO_BTF): compiled
 * with such a kernel's headers, this object does. It is never loaded.
 */
#include <linux/dcache.h>
#include <linux/fdtable.h>
#include <linux/fs.h>
#include <linux/fs_struct.h>
#include <linux/kvm_host.h>
#include <linux/maple_tree.h>
#include <linux/mm_types.h>
#include <linux/sched.h>
#include <linux/xarray.h>

struct offmap_types {
	struct address_space address_space;
	struct dentry dentry;
	struct fdtable fdtable;
	struct file file;
	struct file_system_type file_system_type;
	struct files_struct files_struct;
	struct fpstate fpstate;
	struct fs_struct fs_struct;
	struct inode inode;
	struct kvm kvm;
	struct kvm_memory_slot kvm_memory_slot;
	struct kvm_memslots kvm_memslots;
	struct kvm_vcpu kvm_vcpu;
	struct maple_arange_64 maple_arange_64;
	struct maple_range_64 maple_range_64;
	struct mm_struct mm_struct;
	struct page page;
	struct super_block super_block;
	struct task_struct task_struct;
	struct vm_area_struct vm_area_struct;
	struct xa_node xa_node;
	struct xarray xarray;
};

extern struct offmap_types *offmap_types;
struct offmap_types *offmap_types; /* else gcc leaves them out */
