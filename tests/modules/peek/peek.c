// SPDX-License-Identifier: GPL-2.0
/*
 * /dev/offmap-peek: reads of kernel memory at an address of the caller's choice, as a leak in the kernel would give them.
 *
 * PEEK_READ copies by plain loads at the kernel address. Where the page tables do not map it, the load faults, the fault
 * is caught, and the copy ends there. What comes back is how many bytes were copied: fewer than asked for means that the
 * next one is not mapped. Addresses of user space are refused. Nothing else of the kernel is asked.
 *
 * PEEK_READ_USER copies in the same way from an address of a process's own, by that process's page tables: what a leak
 * in the process itself would give. It fails where they map nothing now.
 *
 * Only for disposable hosts: whoever has the device reads what the kernel has.
 */
#include <linux/fs.h>
#include <linux/ioctl.h>
#include <linux/miscdevice.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/slab.h>
#include <linux/uaccess.h>
#include <linux/kthread.h>
#include <linux/mmu_context.h>
#include <linux/pid.h>
#include <linux/sched/mm.h>
#include <linux/sched/task.h>
#include <asm/page.h>
#include <asm/processor.h>

struct peek_read {
	__u64 address;
	__u64 to; /* user address */
	__u64 length; /* in: bytes wanted, at most PEEK_MOST; out: bytes read */
};

struct peek_read_user {
	struct peek_read read; /* all of it is read, or nothing; at most a page */
	__u64 pid;
};

#define PEEK_MOST (1UL << 20)
#define PEEK_READ _IOWR('P', 1, struct peek_read)
#define PEEK_READ_USER _IOWR('P', 2, struct peek_read_user)

static struct kthread_worker *peek_worker;

static bool peek_byte(u8 *to, const u8 *from)
{
	__get_kernel_nofault(to, from, u8, fault);
	return true;
fault:
	return false;
}

static bool peek_word(u64 *to, const u64 *from)
{
	__get_kernel_nofault(to, from, u64, fault);
	return true;
fault:
	return false;
}

static size_t peek_copy(u8 *to, unsigned long from, size_t length)
{
	size_t done = 0;

	pagefault_disable();
	while (done < length) {
		if (length - done >= sizeof(u64) && IS_ALIGNED(from + done, sizeof(u64)) && IS_ALIGNED(done, sizeof(u64))) {
			if (!peek_word((u64 *)(to + done), (const u64 *)(from + done)))
				break;
			done += sizeof(u64);
		} else {
			if (!peek_byte(to + done, (const u8 *)(from + done)))
				break;
			done++;
		}
	}
	pagefault_enable();
	return done;
}

struct peek_work {
	struct kthread_work work;
	struct mm_struct *mm;
	void *to;
	unsigned long from;
	size_t length;
	long error;
};

/* Only a kernel thread may take on the address space of another process. */
static void peek_in_process(struct kthread_work *work)
{
	struct peek_work *peek = container_of(work, struct peek_work, work);

	kthread_use_mm(peek->mm);
	peek->error = copy_from_user_nofault(peek->to, (const void __user *)peek->from, peek->length);
	kthread_unuse_mm(peek->mm);
}

static struct mm_struct *peek_mm(pid_t number)
{
	struct pid *pid = find_get_pid(number);
	struct task_struct *task = get_pid_task(pid, PIDTYPE_PID);
	struct mm_struct *mm = NULL;

	put_pid(pid);
	if (task) {
		mm = get_task_mm(task);
		put_task_struct(task);
	}
	return mm;
}

static long peek_user(const struct peek_read_user __user *argument)
{
	struct peek_read_user asked;
	struct peek_work peek;

	if (copy_from_user(&asked, argument, sizeof(asked)))
		return -EFAULT;
	if (!asked.read.length || asked.read.length > PAGE_SIZE || asked.read.address >= TASK_SIZE_MAX || asked.pid > INT_MAX)
		return -EINVAL;
	peek.length = asked.read.length;
	peek.from = asked.read.address;
	peek.to = kmalloc(peek.length, GFP_KERNEL);
	if (!peek.to)
		return -ENOMEM;
	peek.mm = peek_mm(asked.pid);
	if (!peek.mm) {
		kfree(peek.to);
		return -ESRCH;
	}
	kthread_init_work(&peek.work, peek_in_process);
	kthread_queue_work(peek_worker, &peek.work);
	kthread_flush_work(&peek.work);
	mmput(peek.mm);
	if (!peek.error && copy_to_user((void __user *)asked.read.to, peek.to, peek.length))
		peek.error = -EFAULT;
	kfree_sensitive(peek.to);
	return peek.error;
}

static long peek_said(struct peek_read __user *asked, struct peek_read *peek, size_t done)
{
	peek->length = done;
	return copy_to_user(asked, peek, sizeof(*peek)) ? -EFAULT : 0;
}

static long peek_ioctl(struct file *file, unsigned int command, unsigned long argument)
{
	struct peek_read __user *asked = (struct peek_read __user *)argument;
	struct peek_read peek;
	size_t wanted, done = 0;
	long error;
	u8 *buffer;

	if (command == PEEK_READ_USER)
		return peek_user((const struct peek_read_user __user *)argument);
	if (command != PEEK_READ)
		return -ENOTTY;
	if (copy_from_user(&peek, asked, sizeof(peek)))
		return -EFAULT;
	if (!peek.length || peek.length > PEEK_MOST || peek.address < TASK_SIZE_MAX || peek.address + peek.length - 1 < peek.address)
		return -EINVAL;
	/* A load at an address that is not canonical is no page fault. */
	if (!__is_canonical_address(peek.address, boot_cpu_data.x86_virt_bits))
		return peek_said(asked, &peek, 0);
	wanted = peek.length;
	/*
	 * For those who read much: straight to the user. It is caught whichever side faults; so what
	 * it does not copy is tried again below, by loads alone.
	 */
	if (wanted >= PAGE_SIZE && access_ok((void __user *)peek.to, wanted))
		done = wanted - raw_copy_to_user((void __user *)peek.to, (const void *)peek.address, wanted);
	if (done == wanted)
		return peek_said(asked, &peek, done);
	buffer = kvmalloc(wanted, GFP_KERNEL);
	if (!buffer)
		return -ENOMEM;
	done = peek_copy(buffer, peek.address, wanted);
	error = copy_to_user((void __user *)peek.to, buffer, done) ? -EFAULT : peek_said(asked, &peek, done);
	kvfree_sensitive(buffer, wanted); /* no copy of what was read is left for the next one to find */
	return error;
}

static const struct file_operations peek_operations = {
	.owner = THIS_MODULE,
	.unlocked_ioctl = peek_ioctl,
};

static struct miscdevice peek_device = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = "offmap-peek",
	.fops = &peek_operations,
	.mode = 0600,
};

static int __init peek_init(void)
{
	int error;

	peek_worker = kthread_create_worker(0, "offmap-peek");
	if (IS_ERR(peek_worker))
		return PTR_ERR(peek_worker);
	error = misc_register(&peek_device);
	if (error)
		kthread_destroy_worker(peek_worker);
	return error;
}

static void __exit peek_exit(void)
{
	misc_deregister(&peek_device);
	kthread_destroy_worker(peek_worker);
}

module_init(peek_init);
module_exit(peek_exit);
MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("Reads of mapped kernel memory for tests of offmap's attack");
