// SPDX-License-Identifier: GPL-2.0
/*
 * offmapfs: a pool of memory that the kernel does not own, as a file system.
 *
 *	mount -t offmapfs -o size=64G,gid=108,mode=1770 offmap /run/hidden
 *
 * A file of it can be mapped, and nothing else: read(), write(), splice() and
 * O_DIRECT would need the kernel to map the memory, and would leave copies of it
 * in memory that the kernel does map.
 *
 * Only the administrator mounts one. Who may use it is a matter of ordinary
 * file permissions.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/types.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <linux/fs_context.h>
#include <linux/fs_parser.h>
#include <linux/memory.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/mount.h>
#include <linux/nodemask.h>
#include <linux/pagemap.h>
#include <linux/path.h>
#include <linux/seq_file.h>
#include <linux/slab.h>
#include <linux/statfs.h>

#include "offmap.h"
#include "pool.h"

#define OFFMAPFS_MAGIC 0x6f66666d	/* "offm" */

static const struct inode_operations poolfs_dir_operations;

/* --- files --------------------------------------------------------------- */

static unsigned long pages_of(loff_t size)
{
	return DIV_ROUND_UP_ULL(size, PAGE_SIZE);
}

static void set_size(struct inode *inode, loff_t size)
{
	struct pool_file *file = inode->i_private;

	i_size_write(inode, size);
	WRITE_ONCE(file->mem.size, (u64)pages_of(size) << PAGE_SHIFT);
}

/* With the inode locked. */
static int resize(struct inode *inode, loff_t size)
{
	unsigned long now = pages_of(i_size_read(inode)), then = pages_of(size);
	struct pool_file *file = inode->i_private;
	int ret = 0;

	if (then > now)
		ret = pool_file_fill(file, now, then - 1, false);
	if (ret)
		return ret;
	set_size(inode, size);
	if (then < now)
		pool_file_punch(file, then, now - 1);
	return 0;
}

static int poolfs_setattr(struct mnt_idmap *idmap, struct dentry *dentry, struct iattr *attr)
{
	struct inode *inode = d_inode(dentry);
	int ret = setattr_prepare(idmap, dentry, attr);

	if (!ret && attr->ia_valid & ATTR_SIZE)
		ret = resize(inode, attr->ia_size);
	if (ret)
		return ret;
	setattr_copy(idmap, inode, attr);
	if (attr->ia_valid & ATTR_UID)
		pool_file_set_owner(inode->i_private);
	return 0;
}

static long poolfs_fallocate(struct file *file, int mode, loff_t offset, loff_t length)
{
	struct inode *inode = file_inode(file);
	unsigned long first, last;
	loff_t end = offset + length;
	long ret = 0;

	if (mode & ~(FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE))
		return -EOPNOTSUPP;
	/* Part of a page could only be zeroed by mapping it. */
	if (mode & FALLOC_FL_PUNCH_HOLE && (!PAGE_ALIGNED(offset) || !PAGE_ALIGNED(length)))
		return -EINVAL;
	inode_lock(inode);
	if (mode & FALLOC_FL_PUNCH_HOLE) {
		pool_file_punch(inode->i_private, offset >> PAGE_SHIFT, (end >> PAGE_SHIFT) - 1);
		goto out;
	}
	/* Nothing can be had beyond the end of a file: it could not be mapped. */
	if (mode & FALLOC_FL_KEEP_SIZE)
		end = min(end, i_size_read(inode));
	first = offset >> PAGE_SHIFT;
	last = pages_of(end);
	if (end > i_size_read(inode)) {
		ret = inode_newsize_ok(inode, end);
		if (ret)
			goto out;
		/* With what is before it, at once: all or nothing. */
		first = min(first, pages_of(i_size_read(inode)));
	}
	if (first < last)
		ret = pool_file_fill(inode->i_private, first, last - 1, false);
	if (!ret && end > i_size_read(inode))
		ret = resize(inode, end);
out:
	inode_unlock(inode);
	return ret;
}

static int poolfs_mmap(struct file *file, struct vm_area_struct *vma)
{
	struct pool_file *pool_file = file_inode(file)->i_private;
	int ret = offmap_may_map(vma);

	return ret ? ret : offmap_map(&pool_file->mem, vma, READ_ONCE(file->private_data));
}

static long poolfs_ioctl(struct file *file, unsigned int cmd, unsigned long arg)
{
	if (cmd != OFFMAP_GUARD)
		return -ENOTTY;
	WRITE_ONCE(file->private_data, file);
	return 0;
}

static const struct file_operations poolfs_file_fops = {
	.mmap = poolfs_mmap,
	.fallocate = poolfs_fallocate,
	.unlocked_ioctl = poolfs_ioctl,
	.compat_ioctl = compat_ptr_ioctl,
	.get_unmapped_area = offmap_get_unmapped_area,
	.llseek = generic_file_llseek,
	.fsync = noop_fsync,
};

static const struct inode_operations poolfs_file_operations = {
	.setattr = poolfs_setattr,
};

/* --- folders ------------------------------------------------------------- */

static struct inode *new_file(struct super_block *sb, const struct inode *dir, umode_t mode)
{
	struct pool *pool = sb->s_fs_info;
	struct inode *inode;
	int ret;

	/* Each takes memory of the kernel's, until somebody removes it. */
	if (!atomic_add_unless(&pool->nr_inodes, 1, POOL_MAX_INODES))
		return ERR_PTR(-ENOSPC);
	inode = new_inode(sb);
	if (!inode) {
		atomic_dec(&pool->nr_inodes);
		return ERR_PTR(-ENOMEM);
	}
	inode->i_ino = get_next_ino();
	inode_init_owner(&nop_mnt_idmap, inode, dir, mode);
	offmap_init_times(inode);
	if (S_ISDIR(mode)) {
		inode->i_op = &poolfs_dir_operations;
		inode->i_fop = &simple_dir_operations;
		inc_nlink(inode);
		return inode;
	}
	inode->i_op = &poolfs_file_operations;
	inode->i_fop = &poolfs_file_fops;
	ret = pool_file_init(pool, inode);
	if (!ret)
		return inode;
	iput(inode);
	return ERR_PTR(ret);
}

static int make(struct inode *dir, struct dentry *dentry, umode_t mode)
{
	struct inode *inode = new_file(dir->i_sb, dir, mode);

	if (IS_ERR(inode))
		return PTR_ERR(inode);
	offmap_make_persistent(dentry, inode);
	if (S_ISDIR(mode))
		inc_nlink(dir);
	offmap_touch(dir);
	return 0;
}

static int poolfs_create(struct mnt_idmap *idmap, struct inode *dir, struct dentry *dentry,
			 OFFMAP_CREATE_MODE)
{
	return make(dir, dentry, mode | S_IFREG);
}

#ifdef OFFMAP_HAVE_MKDIR_DENTRY
static struct dentry *poolfs_mkdir(struct mnt_idmap *idmap, struct inode *dir,
				   struct dentry *dentry, umode_t mode)
{
	return ERR_PTR(make(dir, dentry, mode | S_IFDIR));
}
#else
static int poolfs_mkdir(struct mnt_idmap *idmap, struct inode *dir, struct dentry *dentry,
			umode_t mode)
{
	return make(dir, dentry, mode | S_IFDIR);
}
#endif

static int poolfs_tmpfile(struct mnt_idmap *idmap, struct inode *dir, struct file *file,
			  umode_t mode)
{
	struct inode *inode = new_file(dir->i_sb, dir, mode);

	if (!IS_ERR(inode))
		d_tmpfile(file, inode);
	return finish_open_simple(file, PTR_ERR_OR_ZERO(inode));
}

/* No links: what a file has goes when its name goes, and who opened it. */
static const struct inode_operations poolfs_dir_operations = {
	.create = poolfs_create,
	.lookup = simple_lookup,
	.unlink = simple_unlink,
	.mkdir = poolfs_mkdir,
	.rmdir = simple_rmdir,
	.rename = simple_rename,
	.tmpfile = poolfs_tmpfile,
};

/* --- the file system ----------------------------------------------------- */

static void poolfs_evict_inode(struct inode *inode)
{
	struct pool *pool = inode->i_sb->s_fs_info;

	truncate_inode_pages_final(&inode->i_data);
	clear_inode(inode);
	if (inode->i_private)
		pool_file_free(inode->i_private);
	atomic_dec(&pool->nr_inodes);
}

static int poolfs_statfs(struct dentry *dentry, struct kstatfs *buf)
{
	struct pool *pool = dentry->d_sb->s_fs_info;

	buf->f_type = OFFMAPFS_MAGIC;
	buf->f_bsize = PAGE_SIZE;
	buf->f_namelen = NAME_MAX;
	mutex_lock(&pool->lock);
	buf->f_blocks = pool->nr_pages;
	buf->f_bfree = pool->nr_free;
	buf->f_bavail = pool->nr_free;
	mutex_unlock(&pool->lock);
	buf->f_files = POOL_MAX_INODES;
	buf->f_ffree = POOL_MAX_INODES - atomic_read(&pool->nr_inodes);
	return 0;
}

static int poolfs_show_options(struct seq_file *seq, struct dentry *root)
{
	struct pool *pool = root->d_sb->s_fs_info;

	seq_printf(seq, ",size=%lluk", (u64)pool->nr_pages << (PAGE_SHIFT - 10));
	if (pool->set.nid != OFFMAP_ANY_NODE)
		seq_printf(seq, ",node=%d", pool->set.nid);
	seq_printf(seq, ",mode=%o,uid=%u,gid=%u", pool->set.mode,
		   from_kuid_munged(&init_user_ns, pool->set.uid),
		   from_kgid_munged(&init_user_ns, pool->set.gid));
	if (pool->set.quota)
		seq_printf(seq, ",quota=%lluk", (u64)pool->set.quota << (PAGE_SHIFT - 10));
	if (pool->set.allow_nested)
		seq_puts(seq, ",allow_nested");
	if (pool->set.allow_vfio)
		seq_puts(seq, ",allow_vfio");
	return 0;
}

static const struct super_operations poolfs_super_operations = {
	.statfs = poolfs_statfs,
	.evict_inode = poolfs_evict_inode,
	.show_options = poolfs_show_options,
};

struct poolfs_options {
	u64 size;
	struct pool_settings set;
};

enum {
	OPT_SIZE,
	OPT_QUOTA,
	OPT_NODE,
	OPT_MODE,
	OPT_UID,
	OPT_GID,
	OPT_ALLOW_NESTED,
	OPT_ALLOW_VFIO,
};

static const struct fs_parameter_spec poolfs_parameters[] = {
	fsparam_string("size", OPT_SIZE),
	fsparam_string("quota", OPT_QUOTA),
	fsparam_u32("node", OPT_NODE),
	fsparam_u32oct("mode", OPT_MODE),
	fsparam_u32("uid", OPT_UID),
	fsparam_u32("gid", OPT_GID),
	fsparam_flag("allow_nested", OPT_ALLOW_NESTED),
	fsparam_flag("allow_vfio", OPT_ALLOW_VFIO),
	{}
};

static int poolfs_parse_param(struct fs_context *fc, struct fs_parameter *param)
{
	struct poolfs_options *opts = fc->fs_private;
	struct fs_parse_result result;
	int opt = fs_parse(fc, poolfs_parameters, param, &result);
	char *rest;

	if (opt < 0)
		return opt;
	switch (opt) {
	case OPT_SIZE:
		opts->size = memparse(param->string, &rest);
		if (*rest || !opts->size)
			return invalfc(fc, "size=%s is no number of bytes", param->string);
		break;
	case OPT_QUOTA:
		/* Part of a page is a page: 0 would be any number of them. */
		opts->set.quota = DIV_ROUND_UP_ULL(min_t(u64, memparse(param->string, &rest),
							 MAX_LFS_FILESIZE), PAGE_SIZE);
		if (*rest || !*param->string)
			return invalfc(fc, "quota=%s is no number of bytes", param->string);
		break;
	case OPT_NODE:
		if (result.uint_32 >= MAX_NUMNODES || !node_online(result.uint_32))
			return invalfc(fc, "there is no NUMA node %u", result.uint_32);
		opts->set.nid = result.uint_32;
		break;
	case OPT_MODE:
		opts->set.mode = result.uint_32 & 07777;
		break;
	case OPT_UID:
		opts->set.uid = make_kuid(current_user_ns(), result.uint_32);
		if (!uid_valid(opts->set.uid))
			return invalfc(fc, "there is no user %u", result.uint_32);
		break;
	case OPT_GID:
		opts->set.gid = make_kgid(current_user_ns(), result.uint_32);
		if (!gid_valid(opts->set.gid))
			return invalfc(fc, "there is no group %u", result.uint_32);
		break;
	case OPT_ALLOW_NESTED:
		opts->set.allow_nested = true;
		break;
	case OPT_ALLOW_VFIO:
		opts->set.allow_vfio = true;
		break;
	}
	return 0;
}

#ifdef OFFMAP_NESTED_SAFE
static bool nested_is_safe(void)
{
	return true;
}
#else
/* Whether a parameter of a KVM module is there, and whether it is off. */
static void look_at_nested(const char *file, bool *there, bool *off)
{
	char value;

	if (offmap_read_sysfs(file, &value, 1) != 1)
		return;
	*there = true;
	*off &= value == '0' || value == 'N';
}

/*
 * VMRUN with an address that has no struct page is the end of a host before
 * Linux 6.13. The parameters cannot change while the KVM modules stay loaded.
 */
static bool nested_is_safe(void)
{
	bool there = false, off = true;

	look_at_nested("module/kvm_amd/parameters/nested", &there, &off);
	look_at_nested("module/kvm_intel/parameters/nested", &there, &off);
	return there && off;
}
#endif

static int poolfs_fill_super(struct super_block *sb, struct fs_context *fc)
{
	struct poolfs_options *opts = fc->fs_private;
	struct inode *inode;
	struct pool *pool;
	int ret;

	if (!opts->size)
		return invalfc(fc, "the pool needs a size=");
	if (!opts->set.allow_nested && !nested_is_safe()) {
		errorfc(fc, "nested guests could crash this kernel: load KVM with nested=0");
		return -EOPNOTSUPP;
	}
	pool = kzalloc(sizeof(*pool), GFP_KERNEL);
	if (!pool)
		return -ENOMEM;
	pool->dev = sb->s_dev;
	pool->set = opts->set;
	pool_init(pool);
	sb->s_fs_info = pool;
	sb->s_maxbytes = MAX_LFS_FILESIZE;
	sb->s_blocksize = PAGE_SIZE;
	sb->s_blocksize_bits = PAGE_SHIFT;
	sb->s_magic = OFFMAPFS_MAGIC;
	sb->s_op = &poolfs_super_operations;
	sb->s_time_gran = 1;
	sb->s_iflags |= SB_I_NOEXEC | SB_I_NODEV;
	ret = pool_grow(pool, opts->size);
	if (ret) {
		errorfc(fc, "the kernel could not spare %llu MiB: %d", opts->size >> 20, ret);
		return ret;
	}
	inode = new_file(sb, NULL, S_IFDIR | opts->set.mode);
	if (IS_ERR(inode))
		return PTR_ERR(inode);
	inode->i_uid = opts->set.uid;
	inode->i_gid = opts->set.gid;
	sb->s_root = d_make_root(inode);
	return sb->s_root ? 0 : -ENOMEM;
}

static int poolfs_get_tree(struct fs_context *fc)
{
	return get_tree_nodev(fc, poolfs_fill_super);
}

static bool same_but_quota(const struct pool_settings *a, const struct pool_settings *b)
{
	return a->nid == b->nid && uid_eq(a->uid, b->uid) && gid_eq(a->gid, b->gid) &&
	       a->mode == b->mode && a->allow_nested == b->allow_nested &&
	       a->allow_vfio == b->allow_vfio;
}

/* Size and quota can change. What cannot go back stays, and is said. */
static int poolfs_reconfigure(struct fs_context *fc)
{
	struct pool *pool = fc->root->d_sb->s_fs_info;
	struct poolfs_options *opts = fc->fs_private;
	u64 now = (u64)pool->nr_pages << PAGE_SHIFT, left;
	int ret;

	if (!same_but_quota(&opts->set, &pool->set))
		return invalfc(fc, "only the size and the quota of a pool can change");
	WRITE_ONCE(pool->set.quota, opts->set.quota);
	if (!opts->size)
		return 0;
	if (opts->size > now) {
		ret = pool_grow(pool, opts->size - now);
		if (ret)
			errorfc(fc, "the kernel could not spare %llu MiB more: %d",
				(opts->size - now) >> 20, ret);
		return ret;
	}
	left = pool_shrink(pool, opts->size);
	if (left < opts->size + memory_block_size_bytes())
		return 0;
	errorfc(fc, "%llu MiB stay: their memory blocks are in use, or being zeroed", left >> 20);
	return -EBUSY;
}

static void poolfs_free_fc(struct fs_context *fc)
{
	kfree(fc->fs_private);
}

static const struct fs_context_operations poolfs_context_operations = {
	.free = poolfs_free_fc,
	.parse_param = poolfs_parse_param,
	.get_tree = poolfs_get_tree,
	.reconfigure = poolfs_reconfigure,
};

static int poolfs_init_fs_context(struct fs_context *fc)
{
	struct poolfs_options *opts = kzalloc(sizeof(*opts), GFP_KERNEL);
	struct pool *pool;

	if (!opts)
		return -ENOMEM;
	if (fc->purpose == FS_CONTEXT_FOR_RECONFIGURE) {
		/* mount(8) gives all options again, and may give none. */
		pool = fc->root->d_sb->s_fs_info;
		opts->set = pool->set;
	} else {
		opts->set.nid = OFFMAP_ANY_NODE;
		opts->set.uid = current_fsuid();
		opts->set.gid = current_fsgid();
		opts->set.mode = 0700;
	}
	fc->fs_private = opts;
	fc->ops = &poolfs_context_operations;
	return 0;
}

static void poolfs_kill_sb(struct super_block *sb)
{
	struct pool *pool = sb->s_fs_info;

	offmap_kill_super(sb);
	if (pool)
		pool_destroy(pool);
}

static struct file_system_type poolfs_type = {
	.owner = THIS_MODULE,
	.name = "offmapfs",
	.init_fs_context = poolfs_init_fs_context,
	.parameters = poolfs_parameters,
	.kill_sb = poolfs_kill_sb,
};
MODULE_ALIAS_FS("offmapfs");

int offmap_poolfs_init(void)
{
	return register_filesystem(&poolfs_type);
}

void offmap_poolfs_exit(void)
{
	unregister_filesystem(&poolfs_type);
}
