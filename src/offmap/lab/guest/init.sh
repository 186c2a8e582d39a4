#!/bin/busybox sh
# First process of a disposable host: loads the modules that every host needs and becomes the agent's Python program.
# It touches nothing that differs from host to host: what follows is kept in a snapshot.
b=/bin/busybox
fail() {
	echo "offmap-lab: $*"
	$b poweroff -f
}
$b mount -t proc proc /proc
$b mount -t sysfs sysfs /sys
$b mount -t devtmpfs devtmpfs /dev

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
$b rm -r /modules

# The file system that is /run later holds what commands may want of the initramfs, which they do not see.
$b mount -t tmpfs -o mode=755 tmpfs /run
$b mkdir /run/offmap-lab
$b mv /bin/busybox /run/offmap-lab/
b=/run/offmap-lab/busybox
$b ifconfig lo 127.0.0.1 up

# lab.conf: PYTHON, the interpreter, and AGENT, the folder of our modules (initramfs.py).
. /lab.conf
exec "$PYTHON" -I -S -c 'import sys; sys.path.insert(0, sys.argv[1]); from offmap.lab.guest.first import main; main(sys.argv[2])' \
	"$AGENT" /dev/vport0p1
