// SPDX-License-Identifier: GPL-2.0
/*
 * /dev/offmap: guest memory that the kernel has no mapping of.
 *
 * Each open file owns what it has taken until its last reference is gone, and
 * every mapping of it holds one: however a VMM ends, its memory comes back.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/capability.h>
#include <linux/completion.h>
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/kref.h>
#include <linux/kthread.h>
#include <linux/miscdevice.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/pfn_t.h>
#include <linux/pid.h>
#include <linux/sched/mm.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include <linux/uaccess.h>

#include "internal.h"
#include "offmap.h"

struct offmap_file {
	struct mutex lock;		/* guards mem until it is set, once */
	struct offmap_memory *mem;
};

/* --- taking memory ------------------------------------------------------ */

static int offmap_file_unplug(struct offmap_file *of, u64 *size, int nid)
{
	struct offmap_memory *mem;
	int ret;

	ret = mutex_lock_interruptible(&of->lock);
	if (ret)
		return ret;
	if (of->mem) {
		ret = -EBUSY;
	} else {
		mem = offmap_unplug(size, nid);
		if (IS_ERR(mem))
			ret = PTR_ERR(mem);
		else
			smp_store_release(&of->mem, mem);
	}
	mutex_unlock(&of->lock);
	return ret;
}

/*
 * A mapping may be what asks for the memory, and mmap() holds the mmap_lock.
 * Memory notifiers can wait for somebody who wants that lock (ksmd does, under
 * the mutex that KSM's notifier takes). So a thread does it, and the mapping
 * gives up on it after a while: then everybody gets on, and the memory that
 * may have come is there for the next attempt or goes back with the file.
 */
#define MMAP_UNPLUG_TIMEOUT	(60 * HZ)

struct unplug_request {
	struct kref ref;
	struct completion done;
	struct file *file;
	u64 size;
	int ret;
};

static void free_request(struct kref *ref)
{
	kfree(container_of(ref, struct unplug_request, ref));
}

static int unplug_thread(void *arg)
{
	struct unplug_request *request = arg;

	allow_signal(SIGKILL);
	request->ret = offmap_file_unplug(request->file->private_data, &request->size, OFFMAP_ANY_NODE);
	complete(&request->done);
	fput(request->file);
	kref_put(&request->ref, free_request);
	/* The file may have been what kept this module. */
	module_put_and_kthread_exit(0);
}

static int unplug_for_mmap(struct file *file, u64 size)
{
	struct unplug_request *request;
	struct task_struct *task;
	long left;
	int ret;

	request = kzalloc(sizeof(*request), GFP_KERNEL);
	if (!request)
		return -ENOMEM;
	kref_init(&request->ref);
	init_completion(&request->done);
	request->size = size;
	request->file = get_file(file);
	kref_get(&request->ref);	/* the thread's */
	__module_get(THIS_MODULE);
	task = kthread_create(unplug_thread, request, "offmap-unplug");
	if (IS_ERR(task)) {
		module_put(THIS_MODULE);
		fput(file);
		kref_put(&request->ref, free_request);
		kref_put(&request->ref, free_request);
		return PTR_ERR(task);
	}
	get_task_struct(task);
	wake_up_process(task);
	left = wait_for_completion_killable_timeout(&request->done, MMAP_UNPLUG_TIMEOUT);
	if (left > 0) {
		ret = request->ret;
	} else {
		send_sig(SIGKILL, task, 1);
		ret = left ? left : -ETIMEDOUT;
	}
	put_task_struct(task);
	kref_put(&request->ref, free_request);
	return ret;
}

/* --- mapping it ---------------------------------------------------------- */

static phys_addr_t vma_phys(struct vm_area_struct *vma, unsigned long addr, u64 *length)
{
	struct offmap_file *of = vma->vm_file->private_data;
	u64 offset = ((u64)vma->vm_pgoff << PAGE_SHIFT) + (addr - vma->vm_start);
	phys_addr_t phys = offmap_phys(of->mem, offset, length);

	*length = min_t(u64, *length, vma->vm_end - addr);
	return phys;
}

static vm_fault_t offmap_huge_fault(struct vm_fault *vmf, unsigned int order)
{
	unsigned long size = PAGE_SIZE << order;
	unsigned long addr = ALIGN_DOWN(vmf->address, size);
	struct vm_area_struct *vma = vmf->vma;
	bool write = vmf->flags & FAULT_FLAG_WRITE;
	phys_addr_t phys;
	u64 length;

	if (addr < vma->vm_start)
		return VM_FAULT_FALLBACK;
	phys = vma_phys(vma, addr, &length);
	if (length < size || !IS_ALIGNED(phys, size))
		return VM_FAULT_FALLBACK;
	switch (order) {
	case 0:
		return vmf_insert_pfn(vma, addr, PHYS_PFN(phys));
#ifdef CONFIG_ARCH_SUPPORTS_PMD_PFNMAP
	case PMD_ORDER:
		return vmf_insert_pfn_pmd(vmf, phys_to_pfn_t(phys, 0), write);
#endif
#ifdef CONFIG_ARCH_SUPPORTS_PUD_PFNMAP
	case PUD_ORDER:
		return vmf_insert_pfn_pud(vmf, phys_to_pfn_t(phys, 0), write);
#endif
	default:
		return VM_FAULT_FALLBACK;
	}
}

static vm_fault_t offmap_fault(struct vm_fault *vmf)
{
	vm_fault_t ret = offmap_huge_fault(vmf, 0);

	return ret == VM_FAULT_FALLBACK ? VM_FAULT_SIGBUS : ret;
}

/* No ->access: ptrace and process_vm_readv() are to stay out. */
static const struct vm_operations_struct offmap_vm_ops = {
	.fault = offmap_fault,
	.huge_fault = offmap_huge_fault,
};

static int offmap_mmap(struct file *file, struct vm_area_struct *vma)
{
	struct offmap_file *of = file->private_data;
	u64 offset = (u64)vma->vm_pgoff << PAGE_SHIFT;
	u64 size = vma->vm_end - vma->vm_start;
	int ret;

	if (!(vma->vm_flags & VM_SHARED))
		return -EINVAL;
	if (!smp_load_acquire(&of->mem)) {
		if (offset)
			return -EINVAL;
		ret = unplug_for_mmap(file, size);
		/* -EBUSY: another mapping was faster; is it large enough? */
		if (ret && ret != -EBUSY)
			return ret;
	}
	if (size > of->mem->size || offset > of->mem->size - size)
		return -EINVAL;
	vm_flags_set(vma, VM_PFNMAP | VM_IO | VM_DONTEXPAND | VM_DONTDUMP | VM_DONTCOPY);
	vma->vm_ops = &offmap_vm_ops;
	return 0;
}

/* --- the device ---------------------------------------------------------- */

static int offmap_open(struct inode *inode, struct file *file)
{
	struct offmap_file *of;

	if (!capable(CAP_SYS_ADMIN))
		return -EPERM;
	of = kzalloc(sizeof(*of), GFP_KERNEL);
	if (!of)
		return -ENOMEM;
	mutex_init(&of->lock);
	file->private_data = of;
	return 0;
}

static int offmap_release(struct inode *inode, struct file *file)
{
	struct offmap_file *of = file->private_data;

	offmap_replug(of->mem);
	kfree(of);
	return 0;
}

static long ioctl_unplug(struct offmap_file *of, struct offmap_unplug __user *argp)
{
	struct offmap_unplug arg;
	u64 size;
	int ret;

	if (copy_from_user(&arg, argp, sizeof(arg)))
		return -EFAULT;
	if (arg.flags || arg.node < OFFMAP_ANY_NODE)
		return -EINVAL;
	size = arg.size;
	ret = offmap_file_unplug(of, &size, arg.node);
	if (ret && ret != -ENOMEM)
		return ret;
	if (!ret)
		size = of->mem->size;
	if (put_user(size, &argp->size))
		return -EFAULT;
	return ret;
}

static long ioctl_translate(struct offmap_translate __user *argp)
{
	struct offmap_translate arg;
	struct vm_area_struct *vma;
	struct task_struct *task;
	struct mm_struct *mm;
	struct pid *pid;
	int ret;

	if (copy_from_user(&arg, argp, sizeof(arg)))
		return -EFAULT;
	if (arg.flags)
		return -EINVAL;
	pid = find_get_pid(arg.pid);
	task = pid ? get_pid_task(pid, PIDTYPE_PID) : NULL;
	put_pid(pid);
	if (!task)
		return -ESRCH;
	mm = get_task_mm(task);
	put_task_struct(task);
	if (!mm)
		return -ESRCH;
	ret = mmap_read_lock_killable(mm);
	if (!ret) {
		vma = find_vma(mm, arg.addr);
		if (vma && vma->vm_start <= arg.addr && vma->vm_ops == &offmap_vm_ops)
			arg.phys = vma_phys(vma, arg.addr, &arg.length);
		else
			ret = -ENXIO;
		mmap_read_unlock(mm);
	}
	mmput(mm);
	if (!ret && copy_to_user(argp, &arg, sizeof(arg)))
		ret = -EFAULT;
	return ret;
}

static long offmap_ioctl(struct file *file, unsigned int cmd, unsigned long arg)
{
	switch (cmd) {
	case OFFMAP_UNPLUG:
		return ioctl_unplug(file->private_data, (void __user *)arg);
	case OFFMAP_TRANSLATE:
		return ioctl_translate((void __user *)arg);
	default:
		return -ENOTTY;
	}
}

static const struct file_operations offmap_fops = {
	.owner = THIS_MODULE,
	.open = offmap_open,
	.release = offmap_release,
	.mmap = offmap_mmap,
	.unlocked_ioctl = offmap_ioctl,
	.compat_ioctl = compat_ptr_ioctl,
	.get_unmapped_area = thp_get_unmapped_area,
	.llseek = noop_llseek,
};

static struct miscdevice offmap_device = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = "offmap",
	.fops = &offmap_fops,
	.mode = 0600,
};

module_misc_device(offmap_device);

MODULE_AUTHOR("The offmap authors");
MODULE_DESCRIPTION("Guest memory that the kernel has no mapping of");
MODULE_LICENSE("GPL");
