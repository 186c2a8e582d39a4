// SPDX-License-Identifier: GPL-2.0
/*
 * /dev/offmap: guest memory that the kernel has no mapping of.
 *
 * Each open file owns what it has taken until its last reference is gone, and
 * every mapping of it holds one: however a VMM ends, its memory comes back.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/anon_inodes.h>
#include <linux/capability.h>
#include <linux/cc_platform.h>
#include <linux/completion.h>
#include <linux/delay.h>
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/kref.h>
#include <linux/kthread.h>
#include <linux/list.h>
#include <linux/miscdevice.h>
#include <linux/mm.h>
#include <linux/mman.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/nodemask.h>
#include <linux/pid.h>
#include <linux/rcupdate.h>
#include <linux/sched/mm.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include <linux/suspend.h>
#include <linux/sysfs.h>
#include <linux/uaccess.h>

#include "compat.h"
#include "internal.h"
#include "offmap.h"

struct offmap_file {
	struct mutex lock;		/* guards mem and keeper until they are set, once */
	struct offmap_memory *mem;
	struct file *keeper;		/* its release gives mem back */
	struct list_head node;		/* of files, under files_lock */
	pid_t opener;
	char comm[TASK_COMM_LEN];
	/* For the list of holders, which may not look at mem: it can go. */
	const char *source;
	u64 size;
};

/* Every open file, until what it had is back. */
static LIST_HEAD(files);
static DEFINE_MUTEX(files_lock);

/* --- giving memory back -------------------------------------------------- */

/*
 * KVM must be gone before. It maps the page of a guest's clock for itself, by
 * memremap() as there is no struct page, and unmaps it according to what
 * pfn_valid() says then: for a page that is back already, not at all.
 *
 * A process that ends closes its files in an order that nobody promises. The
 * release of a file that is dropped within a release comes after those that are
 * pending for the same thread: hence the keeper. And if not the thread that
 * drops the last of the files drops the last mapping, it has to wait for it.
 */
#define EXIT_PATIENCE	HZ

static bool others_live(void)
{
	struct task_struct *task;
	bool found = false;

	rcu_read_lock();
	for_each_thread(current, task)
		if (task != current && !READ_ONCE(task->exit_state))
			found = true;
	rcu_read_unlock();
	return found;
}

static void free_file(struct offmap_file *of)
{
	mutex_lock(&files_lock);
	list_del(&of->node);
	mutex_unlock(&files_lock);
	kfree(of);
}

static int keeper_release(struct inode *inode, struct file *file)
{
	unsigned long deadline = jiffies + EXIT_PATIENCE;
	struct offmap_file *of = file->private_data;

	/* Not longer: they may wait for us just as well. */
	if (current->flags & PF_EXITING)
		while (others_live() && time_before(jiffies, deadline))
			msleep(20);
	of->mem->source->release(of->mem);
	free_file(of);
	return 0;
}

static const struct file_operations keeper_fops = {
	.owner = THIS_MODULE,
	.release = keeper_release,
};

/* --- getting memory ------------------------------------------------------ */

/* With of->lock held, and no mem. */
static int offmap_file_set(struct offmap_file *of, struct offmap_memory *mem)
{
	struct file *keeper;

	if (IS_ERR(mem))
		return PTR_ERR(mem);
	keeper = anon_inode_getfile("[offmap]", &keeper_fops, of, O_RDONLY);
	if (IS_ERR(keeper)) {
		mem->source->release(mem);
		return PTR_ERR(keeper);
	}
	of->keeper = keeper;
	mutex_lock(&files_lock);
	of->source = mem->source->name;
	of->size = mem->size;
	mutex_unlock(&files_lock);
	/* Pairs with offmap_mmap(): who sees mem sees what it points to. */
	smp_store_release(&of->mem, mem);
	return 0;
}

static int offmap_file_unplug(struct offmap_file *of, u64 *size, int nid)
{
	int ret;

	ret = mutex_lock_interruptible(&of->lock);
	if (ret)
		return ret;
	if (of->mem)
		ret = -EBUSY;
	else
		ret = offmap_file_set(of, offmap_unplug(size, nid));
	mutex_unlock(&of->lock);
	return ret;
}

static int offmap_file_bind(struct offmap_file *of, int fd)
{
	int ret;

	ret = mutex_lock_interruptible(&of->lock);
	if (ret)
		return ret;
	if (of->mem)
		ret = -EBUSY;
	else
		ret = offmap_file_set(of, offmap_bind_secretmem(fd));
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
	request->ret = offmap_file_unplug(request->file->private_data, &request->size,
					  OFFMAP_ANY_NODE);
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
	phys_addr_t phys = of->mem->source->phys(of->mem, offset, length);

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
static vm_fault_t offmap_fault(struct vm_fault *vmf)
{
	struct vm_area_struct *vma = vmf->vma;
	vm_fault_t ret = insert_pages(vmf, 0);
	unsigned long addr, end;
	phys_addr_t phys;
	u64 length;

	if (ret != VM_FAULT_NOPAGE)
		return ret == VM_FAULT_FALLBACK ? VM_FAULT_SIGBUS : ret;
	addr = max(ALIGN_DOWN(vmf->address, PMD_SIZE), vma->vm_start);
	end = min(ALIGN_DOWN(vmf->address, PMD_SIZE) + PMD_SIZE, vma->vm_end);
	while (addr < end) {
		phys = vma_phys(vma, addr, &length);
		if (!length)
			break;
		for (length = min_t(u64, length, end - addr); length; length -= PAGE_SIZE) {
			if (vmf_insert_pfn(vma, addr, PHYS_PFN(phys)) != VM_FAULT_NOPAGE)
				return ret;
			addr += PAGE_SIZE;
			phys += PAGE_SIZE;
		}
	}
	return ret;
}

#ifdef OFFMAP_HUGE_PFNMAP
static vm_fault_t offmap_huge_fault(struct vm_fault *vmf, unsigned int order)
{
	struct offmap_file *of = vmf->vma->vm_file->private_data;

	return of->mem->source->large ? insert_pages(vmf, order) : VM_FAULT_FALLBACK;
}
#endif

/* No ->access: ptrace and process_vm_readv() are to stay out. */
static const struct vm_operations_struct offmap_vm_ops = {
	.fault = offmap_fault,
#ifdef OFFMAP_HUGE_PFNMAP
	.huge_fault = offmap_huge_fault,
#endif
};

/*
 * Where one page can map a gigabyte, the address must be that of one too.
 * thp_get_unmapped_area() aligns to 2M. Memory may be chosen by the mapping
 * itself, so whether it will have whole gigabytes is not known yet.
 */
static unsigned long offmap_get_unmapped_area(struct file *file, unsigned long addr,
					      unsigned long len, unsigned long pgoff,
					      unsigned long flags)
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

static int offmap_mmap(struct file *file, struct vm_area_struct *vma)
{
	struct offmap_file *of = file->private_data;
	u64 offset = (u64)vma->vm_pgoff << PAGE_SHIFT;
	u64 size = vma->vm_end - vma->vm_start;
	int ret;

	/* A private copy of a page would be ordinary memory. */
	if (!(vma->vm_flags & VM_SHARED))
		return -EINVAL;
	if (vma->vm_flags & VM_EXEC)
		return -EPERM;
	/* Pairs with offmap_file_set(). */
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
	offmap_vm_flags_clear(vma, VM_MAYEXEC);
	/* VM_HUGEPAGE: for hosts whose THP setting is "madvise". */
	offmap_vm_flags_set(vma, VM_PFNMAP | VM_IO | VM_DONTEXPAND | VM_DONTDUMP | VM_DONTCOPY |
			    (of->mem->source->large ? VM_HUGEPAGE : 0));
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
	of->opener = task_tgid_nr(current);
	get_task_comm(of->comm, current);
	file->private_data = of;
	mutex_lock(&files_lock);
	list_add_tail(&of->node, &files);
	mutex_unlock(&files_lock);
	return 0;
}

static int offmap_release(struct inode *inode, struct file *file)
{
	struct offmap_file *of = file->private_data;

	if (of->keeper)
		fput(of->keeper);
	else
		free_file(of);
	return 0;
}

static long ioctl_unplug(struct offmap_file *of, struct offmap_unplug __user *argp)
{
	struct offmap_unplug arg;
	u64 size;
	int ret;

	if (copy_from_user(&arg, argp, sizeof(arg)))
		return -EFAULT;
	if (arg.flags || arg.node < OFFMAP_ANY_NODE || arg.node >= MAX_NUMNODES)
		return -EINVAL;
	if (arg.node != OFFMAP_ANY_NODE && !node_online(arg.node))
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

static long ioctl_bind_secretmem(struct offmap_file *of, struct offmap_secretmem __user *argp)
{
	struct offmap_secretmem arg;
	int ret;

	if (copy_from_user(&arg, argp, sizeof(arg)))
		return -EFAULT;
	if (arg.flags)
		return -EINVAL;
	ret = offmap_file_bind(of, arg.fd);
	if (ret)
		return ret;
	return put_user(of->mem->size, &argp->size);
}

static long offmap_ioctl(struct file *file, unsigned int cmd, unsigned long arg)
{
	/* A file that was handed to somebody else can be mapped, not commanded. */
	if (!capable(CAP_SYS_ADMIN))
		return -EPERM;
	switch (cmd) {
	case OFFMAP_UNPLUG:
		return ioctl_unplug(file->private_data, (void __user *)arg);
	case OFFMAP_TRANSLATE:
		return ioctl_translate((void __user *)arg);
	case OFFMAP_BIND_SECRETMEM:
		return ioctl_bind_secretmem(file->private_data, (void __user *)arg);
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
	.get_unmapped_area = offmap_get_unmapped_area,
	.llseek = noop_llseek,
};

/* /sys/class/misc/offmap/holders: "PID SOURCE BYTES COMMAND" of whoever opened each file. */
static ssize_t holders_show(struct device *dev, struct device_attribute *attr, char *buf)
{
	struct offmap_file *of;
	int len = 0;

	mutex_lock(&files_lock);
	list_for_each_entry(of, &files, node)
		if (of->size)
			len += sysfs_emit_at(buf, len, "%d %s %llu %s\n", of->opener, of->source,
					     of->size, of->comm);
	mutex_unlock(&files_lock);
	return len;
}
static DEVICE_ATTR_ADMIN_RO(holders);

static struct attribute *offmap_attrs[] = {
	&dev_attr_holders.attr,
	NULL
};
ATTRIBUTE_GROUPS(offmap);

static struct miscdevice offmap_device = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = "offmap",
	.fops = &offmap_fops,
	.groups = offmap_groups,
	.mode = 0600,
};

/* What has no struct page is not in the image, and a guest cannot do without. */
static int offmap_pm_notify(struct notifier_block *nb, unsigned long event, void *unused)
{
	if (event == PM_HIBERNATION_PREPARE && offmap_unplug_active()) {
		pr_warn("no hibernation while guests run on memory taken from the kernel\n");
		return notifier_from_errno(-EBUSY);
	}
	return NOTIFY_DONE;
}

static struct notifier_block offmap_pm_notifier = {
	.notifier_call = offmap_pm_notify,
};

static int __init offmap_init(void)
{
	int ret;

	/* Zeroes written without the encryption bit are not zeroes with it. */
	if (cc_platform_has(CC_ATTR_MEM_ENCRYPT)) {
		pr_err("this host encrypts its memory (SME or SEV), which is not supported\n");
		return -EOPNOTSUPP;
	}
	ret = offmap_unplug_init();
	if (ret)
		return ret;
	ret = register_pm_notifier(&offmap_pm_notifier);
	if (ret)
		goto unplug_exit;
	ret = misc_register(&offmap_device);
	if (ret)
		goto unregister_notifier;
	return 0;
unregister_notifier:
	unregister_pm_notifier(&offmap_pm_notifier);
unplug_exit:
	offmap_unplug_exit();
	return ret;
}
module_init(offmap_init);

static void __exit offmap_exit(void)
{
	misc_deregister(&offmap_device);
	unregister_pm_notifier(&offmap_pm_notifier);
	offmap_unplug_exit();
}
module_exit(offmap_exit);

MODULE_AUTHOR("The offmap authors");
MODULE_DESCRIPTION("Guest memory that the kernel has no mapping of");
MODULE_VERSION("0.1.0");
MODULE_LICENSE("GPL");
