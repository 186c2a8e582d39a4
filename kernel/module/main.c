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
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/kref.h>
#include <linux/kobject.h>
#include <linux/list.h>
#include <linux/miscdevice.h>
#include <linux/mm.h>
#include <linux/mman.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/nodemask.h>
#include <linux/pid.h>
#include <linux/sched/mm.h>
#include <linux/slab.h>
#include <linux/suspend.h>
#include <linux/sysfs.h>
#include <linux/uaccess.h>

#include "compat.h"
#include "internal.h"
#include "offmap.h"
#include "pool.h"

struct offmap_file {
	struct kref ref;
	struct mutex lock;		/* guards what follows, and is held for no work */
	bool taking;			/* somebody gets memory for this file */
	bool guarded;			/* mappings of it stay as they are */
	struct offmap_memory *mem;	/* set once */
	struct file *keeper;		/* its release gives mem back */
	struct completion returned;	/* mem is back, or takes its time */
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

static void free_file(struct kref *ref)
{
	kfree(container_of(ref, struct offmap_file, ref));
}

static void forget_file(struct offmap_file *of)
{
	mutex_lock(&files_lock);
	list_del(&of->node);
	mutex_unlock(&files_lock);
	kref_put(&of->ref, free_file);
}

static void memory_returned(struct offmap_memory *mem, bool all)
{
	struct offmap_file *of = mem->file;

	complete_all(&of->returned);
	if (all)
		forget_file(of);
}

/*
 * Who ends finds its memory given back, in the ordinary case. It waits no longer
 * than the thread that does so may take for one block, and not for memory that
 * something else still maps. A kernel thread does not wait: it may be the one
 * that releases everybody's files.
 *
 * A process that ends closes its files in no certain order. The release of a
 * file that is dropped within a release comes after those that are pending for
 * the same thread: hence the keeper. A VM that the same thread drops is gone
 * before its memory is looked at.
 */
static int keeper_release(struct inode *inode, struct file *file)
{
	struct offmap_file *of = file->private_data;

	kref_get(&of->ref);
	of->mem->source->release(of->mem);
	if (!(current->flags & PF_KTHREAD))
		wait_for_completion_timeout(&of->returned, offmap_block_timeout());
	kref_put(&of->ref, free_file);
	return 0;
}

static const struct file_operations keeper_fops = {
	.owner = THIS_MODULE,
	.release = keeper_release,
};

/* --- getting memory ------------------------------------------------------ */

static int file_set(struct offmap_file *of, struct file *file, struct offmap_memory *mem)
{
	struct file *keeper;

	keeper = anon_inode_getfile("[offmap]", &keeper_fops, of, O_RDONLY);
	if (IS_ERR(keeper)) {
		mem->source->release(mem);
		return PTR_ERR(keeper);
	}
	of->keeper = keeper;
	mem->file = of;
	mem->returned = memory_returned;
	if (mem->source->large)
		offmap_watch_all(mem, file->f_mapping);
	mutex_lock(&files_lock);
	of->source = mem->source->name;
	of->size = mem->size;
	mutex_unlock(&files_lock);
	/* Pairs with offmap_mmap(): who sees mem sees what it points to. */
	smp_store_release(&of->mem, mem);
	return 0;
}

/* Only one may get memory for a file, and only once. */
static int begin_taking(struct offmap_file *of)
{
	int ret = 0;

	mutex_lock(&of->lock);
	if (of->mem || of->taking)
		ret = -EBUSY;
	else
		of->taking = true;
	mutex_unlock(&of->lock);
	return ret;
}

static int end_taking(struct offmap_file *of, struct file *file, struct offmap_memory *mem)
{
	int ret;

	mutex_lock(&of->lock);
	of->taking = false;
	ret = IS_ERR(mem) ? PTR_ERR(mem) : file_set(of, file, mem);
	mutex_unlock(&of->lock);
	return ret;
}

static int file_unplug(struct file *file, u64 *size, int nid, bool killable)
{
	struct offmap_file *of = file->private_data;
	int ret = begin_taking(of);

	if (ret)
		return ret;
	return end_taking(of, file, offmap_unplug(size, nid, killable));
}

static int file_bind(struct file *file, int fd)
{
	struct offmap_file *of = file->private_data;
	int ret = begin_taking(of);

	if (ret)
		return ret;
	return end_taking(of, file, offmap_bind_secretmem(fd));
}

/* --- mapping it ---------------------------------------------------------- */

static int offmap_mmap(struct file *file, struct vm_area_struct *vma)
{
	struct offmap_file *of = file->private_data;
	u64 taken;
	int ret = offmap_may_map(vma);

	if (ret)
		return ret;
	/* Pairs with file_set(). */
	if (!smp_load_acquire(&of->mem)) {
		if (vma->vm_pgoff)
			return -EINVAL;
		/* Who was handed the file may map what it has, and take no more. */
		if (!capable(CAP_SYS_ADMIN))
			return -EPERM;
		/*
		 * mmap() holds the mmap_lock, and memory notifiers can wait for
		 * somebody who wants it (ksmd does, under the mutex that KSM's
		 * notifier takes). So this gives up after a while.
		 */
		taken = vma->vm_end - vma->vm_start;
		ret = file_unplug(file, &taken, OFFMAP_ANY_NODE, true);
		/* -EBUSY: another mapping was faster; is it large enough? */
		if (ret && !(ret == -EBUSY && smp_load_acquire(&of->mem)))
			return ret;
	}
	return offmap_map(of->mem, vma, READ_ONCE(of->guarded));
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
	kref_init(&of->ref);
	mutex_init(&of->lock);
	init_completion(&of->returned);
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

	if (!of->keeper) {
		forget_file(of);
		return 0;
	}
	/* The file's inode may be gone before its keeper is. */
	if (of->mem->source->large)
		offmap_unwatch_all(of->mem);
	fput(of->keeper);
	return 0;
}

static long ioctl_unplug(struct file *file, struct offmap_unplug __user *argp)
{
	struct offmap_file *of = file->private_data;
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
	ret = file_unplug(file, &size, arg.node, false);
	if (ret && ret != -ENOMEM && ret != -ETIMEDOUT)
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
		if (vma && vma->vm_start <= arg.addr)
			ret = offmap_translate(vma, arg.addr, &arg.phys, &arg.length);
		else
			ret = -ENXIO;
		mmap_read_unlock(mm);
	}
	mmput(mm);
	if (!ret && copy_to_user(argp, &arg, sizeof(arg)))
		ret = -EFAULT;
	return ret;
}

static long ioctl_bind_secretmem(struct file *file, struct offmap_secretmem __user *argp)
{
	struct offmap_file *of = file->private_data;
	struct offmap_secretmem arg;
	int ret;

	if (copy_from_user(&arg, argp, sizeof(arg)))
		return -EFAULT;
	if (arg.flags)
		return -EINVAL;
	ret = file_bind(file, arg.fd);
	if (ret)
		return ret;
	return put_user(of->mem->size, &argp->size);
}

static long offmap_ioctl(struct file *file, unsigned int cmd, unsigned long arg)
{
	struct offmap_file *of = file->private_data;

	/* A file that was handed to somebody else can be mapped, not commanded. */
	if (!capable(CAP_SYS_ADMIN))
		return -EPERM;
	switch (cmd) {
	case OFFMAP_UNPLUG:
		return ioctl_unplug(file, (void __user *)arg);
	case OFFMAP_TRANSLATE:
		return ioctl_translate((void __user *)arg);
	case OFFMAP_BIND_SECRETMEM:
		return ioctl_bind_secretmem(file, (void __user *)arg);
	case OFFMAP_GUARD:
		WRITE_ONCE(of->guarded, true);
		return 0;
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

/* "PID WANTED TAKEN TRIED COMMAND" of each request that is served: bytes, and ranges tried. */
static ssize_t requests_show(struct device *dev, struct device_attribute *attr, char *buf)
{
	return offmap_show_requests(buf);
}
static DEVICE_ATTR_ADMIN_RO(requests);

/* Bytes that are on their way back to the kernel. */
static ssize_t returning_show(struct device *dev, struct device_attribute *attr, char *buf)
{
	return sysfs_emit(buf, "%llu\n", offmap_returning());
}
static DEVICE_ATTR_ADMIN_RO(returning);

/* Bytes that stay out until the next boot, as memory in them has failed. */
static ssize_t kept_show(struct device *dev, struct device_attribute *attr, char *buf)
{
	return sysfs_emit(buf, "%llu\n", offmap_kept());
}
static DEVICE_ATTR_ADMIN_RO(kept);

/*
 * "DEVICE SIZE FREE CLEANING HELD FAILED FILES NODE" of each pool: bytes, but for
 * the number of the mount's device, of files, and of the NUMA node (-1: any).
 */
static ssize_t pools_show(struct device *dev, struct device_attribute *attr, char *buf)
{
	return offmap_show_pools(buf);
}
static DEVICE_ATTR_RO(pools);

/* "DEVICE UID BYTES FILES" of each user who owns files of a pool. */
static ssize_t pool_users_show(struct device *dev, struct device_attribute *attr, char *buf)
{
	return offmap_show_pool_users(buf);
}
static DEVICE_ATTR_ADMIN_RO(pool_users);

static struct attribute *offmap_attrs[] = {
	&dev_attr_pools.attr,
	&dev_attr_pool_users.attr,
	&dev_attr_holders.attr,
	&dev_attr_requests.attr,
	&dev_attr_returning.attr,
	&dev_attr_kept.attr,
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

/*
 * Wake those who poll what sysfs shows. With @memory, the kernel's memory is
 * another now: a crash kernel's list of it may have to be made again.
 */
void offmap_changed(bool memory)
{
	struct kobject *kobj = &offmap_device.this_device->kobj;

	sysfs_notify(kobj, NULL, "holders");
	sysfs_notify(kobj, NULL, "returning");
	if (memory)
		kobject_uevent(kobj, KOBJ_CHANGE);
}

/* What has no struct page is not in the image, and a guest cannot do without. */
static int offmap_pm_notify(struct notifier_block *nb, unsigned long event, void *unused)
{
	if (event == PM_HIBERNATION_PREPARE && !offmap_stop_taking()) {
		pr_warn("no hibernation while guests run on memory taken from the kernel\n");
		return notifier_from_errno(-EBUSY);
	}
	if (event == PM_POST_HIBERNATION)
		offmap_go_on_taking();
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
	ret = offmap_zero_init();
	if (ret)
		return ret;
	ret = offmap_hotplug_init();
	if (ret)
		goto zero_exit;
	ret = offmap_return_init();
	if (ret)
		goto hotplug_exit;
	offmap_poison_init();
	ret = register_pm_notifier(&offmap_pm_notifier);
	if (ret)
		goto poison_exit;
	ret = misc_register(&offmap_device);
	if (ret)
		goto unregister_notifier;
	ret = offmap_poolfs_init();
	if (ret)
		goto deregister_device;
	return 0;
deregister_device:
	misc_deregister(&offmap_device);
unregister_notifier:
	unregister_pm_notifier(&offmap_pm_notifier);
poison_exit:
	offmap_poison_exit();
	offmap_return_exit();
hotplug_exit:
	offmap_hotplug_exit();
zero_exit:
	offmap_zero_exit();
	return ret;
}
module_init(offmap_init);

static void __exit offmap_exit(void)
{
	offmap_poolfs_exit();
	/* First: its thread may still tell the device that the last piece is back. */
	offmap_return_exit();
	misc_deregister(&offmap_device);
	unregister_pm_notifier(&offmap_pm_notifier);
	offmap_poison_exit();
	offmap_hotplug_exit();
	offmap_zero_exit();
}
module_exit(offmap_exit);

MODULE_AUTHOR("The offmap authors");
MODULE_DESCRIPTION("Guest memory that the kernel has no mapping of");
MODULE_VERSION("0.1.0");
MODULE_LICENSE("GPL");
