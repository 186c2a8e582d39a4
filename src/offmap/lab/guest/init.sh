#!/bin/busybox sh
# First process of a disposable host: this machine's files, read-only over 9p, below a writable overlay in memory.
# /lab.conf (from the outside, see initramfs.py) says where the agent, its interpreter and the output folder are.
b=/bin/busybox
fail() {
	echo "offmap-lab: $*"
	$b poweroff -f
}
$b mount -t proc proc /proc
$b mount -t sysfs sysfs /sys
$b mount -t devtmpfs devtmpfs /dev
. /lab.conf

while read -r module; do
	$b insmod "/modules/$module" || fail "cannot load $module"
done </modules/needed
# KVM is wanted, but a host without it is still a host.
for vendor in amd intel; do
	flag=svm
	[ $vendor = intel ] && flag=vmx
	$b grep -qw $flag /proc/cpuinfo || continue
	while read -r module; do
		$b insmod "/modules/$module" 2>/dev/null
	done <"/modules/kvm_$vendor"
done

share="trans=virtio,version=9p2000.L,msize=512000"
# Nothing changes below a lab host's feet, so what was read once is kept (cache=loose).
$b mount -t 9p -o "$share,cache=loose,ro" offmap-root /lower || fail "cannot mount the machine's files over 9p"
$b mount -t tmpfs -o size=75% tmpfs /upper
$b mkdir /upper/data /upper/work
$b mount -t overlay -o lowerdir=/lower,upperdir=/upper/data,workdir=/upper/work overlay /newroot ||
	fail "cannot mount the overlay"

cd /newroot || fail "no root"
$b mkdir -p proc sys dev run tmp
$b mount -t proc proc proc
$b mount -t sysfs sysfs sys
$b mount -t debugfs debugfs sys/kernel/debug 2>/dev/null
$b mount -t tracefs tracefs sys/kernel/tracing 2>/dev/null
$b mount -t cgroup2 cgroup2 sys/fs/cgroup 2>/dev/null
$b mount -t devtmpfs devtmpfs dev
$b mkdir -p dev/pts dev/shm
$b mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts dev/pts
$b mount -t tmpfs -o mode=1777 tmpfs dev/shm
$b ln -sf /proc/self/fd dev/fd
$b ln -sf fd/0 dev/stdin
$b ln -sf fd/1 dev/stdout
$b ln -sf fd/2 dev/stderr
$b mount -t tmpfs -o mode=755 tmpfs run
if [ -n "$MODULES" ] && [ -d "/newroot$MODULES" ]; then
	release=$($b uname -r)
	$b mkdir -p "lib/modules/$release"
	$b mount -o bind "/newroot$MODULES" "lib/modules/$release"
fi
if [ -n "$OUT" ]; then
	# Not cached: what a command has written has left the host, whatever becomes of it, and a full disk is its ENOSPC.
	$b mkdir -p "/newroot$OUT"
	$b mount -t 9p -o "$share,cache=none" offmap-out "/newroot$OUT" || fail "cannot mount the output folder"
fi
$b ifconfig lo 127.0.0.1 up
$b hostname offmap-lab

# The initramfs goes away with switch_root; what is needed after it lies in /run.
$b mkdir run/offmap-lab
$b cp /bin/busybox /lab.conf run/offmap-lab/
$b cat >run/offmap-lab/serve <<'END'
b=/run/offmap-lab/busybox
. /run/offmap-lab/lab.conf
"$PYTHON" -I -S -c 'import sys; sys.path.insert(0, sys.argv[1]); from offmap.lab.guest.agent import main; main(sys.argv[2])' \
	"$SOURCE" /dev/vport0p1 </dev/null || echo "offmap-lab: the agent ended with status $?"
$b poweroff -f
END
exec $b switch_root /newroot /run/offmap-lab/busybox sh /run/offmap-lab/serve
