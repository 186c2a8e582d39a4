// SPDX-License-Identifier: GPL-2.0
/*
 * /dev/offmap-peek: reads of kernel memory at an address of the caller's choice, as a leak in the kernel would give them.
 *
 * PEEK_READ copies by plain loads at the kernel address. Where the page tables do not map it, the load faults, the fault
 * is caught, and the copy ends there. What comes back is how many bytes were copied: fewer than asked for means that the
 * next one is not mapped. Addresses of user space are refused. Nothing else of the kernel is asked.
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
#include <asm/page.h>
#include <asm/processor.h>

struct peek_read {
	__u64 address;
	__u64 to; /* user address */
	__u64 length; /* in: bytes wanted, at most PEEK_MOST; out: bytes read */
};

#define PEEK_MOST (1UL << 20)
#define PEEK_READ _IOWR('P', 1, struct peek_read)

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

static long peek_ioctl(struct file *file, unsigned int command, unsigned long argument)
{
	struct peek_read __user *asked = (struct peek_read __user *)argument;
	struct peek_read peek;
	size_t wanted;
	long error = 0;
	u8 *buffer;

	if (command != PEEK_READ)
		return -ENOTTY;
	if (copy_from_user(&peek, asked, sizeof(peek)))
		return -EFAULT;
	if (!peek.length || peek.length > PEEK_MOST || peek.address < TASK_SIZE_MAX || peek.address + peek.length - 1 < peek.address)
		return -EINVAL;
	wanted = peek.length;
	buffer = kvmalloc(wanted, GFP_KERNEL);
	if (!buffer)
		return -ENOMEM;
	/* A load at an address that is not canonical is no page fault. */
	if (__is_canonical_address(peek.address, boot_cpu_data.x86_virt_bits))
		peek.length = peek_copy(buffer, peek.address, wanted);
	else
		peek.length = 0;
	if (copy_to_user((void __user *)peek.to, buffer, peek.length) || copy_to_user(asked, &peek, sizeof(peek)))
		error = -EFAULT;
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

module_misc_device(peek_device);
MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("Reads of mapped kernel memory for tests of offmap's attack");
