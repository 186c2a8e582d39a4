/* SPDX-License-Identifier: GPL-2.0 WITH Linux-syscall-note */
/*
 * /dev/offmap: guest memory that the kernel has no mapping of.
 *
 * Open it, map N bytes of it shared, and run a guest from that. All calls need
 * CAP_SYS_ADMIN. To map a file that has its memory needs nothing but the file.
 */
#ifndef _UAPI_OFFMAP_H
#define _UAPI_OFFMAP_H

#include <linux/ioctl.h>
#include <linux/types.h>

#define OFFMAP_ANY_NODE (-1)

/*
 * Take memory blocks away from the kernel, for this open file. A mapping of a
 * file that has none yet does the same by itself, on any node.
 *
 * @size: in: bytes wanted, out: bytes taken, a whole number of memory blocks.
 *        On -ENOMEM and -ETIMEDOUT: how many the kernel could have spared, as
 *        far as that is known.
 * @node: NUMA node to take from, or OFFMAP_ANY_NODE.
 *
 * -EBUSY: the file has memory already, or somebody is getting it; or the host is
 * about to hibernate. -EINVAL: no size, or no such node. -EINTR: a signal came;
 * nothing was taken. -ETIMEDOUT: the blocks that were tried did not get free in
 * the time that the module's parameters allow.
 */
struct offmap_unplug {
	__u64 size;
	__s32 node;
	__u32 flags;	/* must be 0 */
};

/*
 * Where a mapping of /dev/offmap, or of a pool's file, is in physical memory, for auditors: no page
 * table dump of the process shows it.
 *
 * @pid:    process, in the caller's PID namespace.
 * @addr:   in: address in that process.
 * @phys:   out: its physical address.
 * @length: out: how many bytes from there are contiguous in both.
 *
 * -ESRCH: no such process. -ENXIO: @addr is in no mapping of /dev/offmap or of
 * a pool's file. -ENODATA: that file has a hole there.
 */
struct offmap_translate {
	__s32 pid;
	__u32 flags;	/* must be 0 */
	__u64 addr;
	__u64 phys;
	__u64 length;
};

/*
 * Offer the pages of a memfd_secret file for mapping, in the order they have
 * there. The file may be closed and unmapped afterwards.
 *
 * @fd:   the file.
 * @size: out: bytes, which is its size.
 *
 * -EINVAL: not a memfd_secret, or no whole number of pages. -ENODATA: a page of
 * it was never touched. -EBUSY: it is bound, or this open file has memory, or
 * somebody is getting it.
 */
struct offmap_secretmem {
	__s32 fd;
	__u32 flags;	/* must be 0 */
	__u64 size;
};

/*
 * Mappings that are made of this open file from now on stay as they are, for as
 * long as their process lives: they cannot be moved, split, unmapped in part,
 * made inaccessible, or mapped over in part. From Linux 6.10 on they cannot be
 * unmapped or mapped over at all, as by mseal(). Before, a process that does so
 * is killed before its system call returns.
 *
 * For /dev/offmap, and, without any capability, for a file of a pool.
 */
#define OFFMAP_GUARD		_IO(0xb7, 0x83)

#define OFFMAP_UNPLUG		_IOWR(0xb7, 0x80, struct offmap_unplug)
#define OFFMAP_TRANSLATE	_IOWR(0xb7, 0x81, struct offmap_translate)
#define OFFMAP_BIND_SECRETMEM	_IOWR(0xb7, 0x82, struct offmap_secretmem)

#endif /* _UAPI_OFFMAP_H */
