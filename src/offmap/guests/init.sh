#!/bin/busybox sh
# First process of a guest that offmap made the image of: find the root file system, load what the devices need, and
# start its init, or run one command in it.
# On the kernel's command line: root=DEVICE, rw, init=PROGRAM, and offmap.overlay=tmpfs: changes go to RAM, not to DEVICE.
# For a command also ip=ADDRESS::GATEWAY:NETMASK (as nfsroot.rst has it), for the network card; else it asks by DHCP.
# /exec, from the outside (guests/job.py), holds the command, if there is one.
b=/bin/busybox
fail() {
	echo "offmap-guest: $*"
	[ ! -e /exec ] && [ -t 0 ] && $b sh # for whoever is at the console
	$b poweroff -f
}
$b mount -t proc proc /proc
$b mount -t sysfs sysfs /sys
$b mount -t devtmpfs devtmpfs /dev

root=/dev/vda overlay= init=/sbin/init mode=ro ip= hvc0=
set -f
for word in $($b cat /proc/cmdline); do
	case $word in
	root=*) root=${word#root=} ;;
	offmap.overlay=*) overlay=${word#*=} ;;
	init=*) init=${word#init=} ;;
	ip=*) ip=${word#ip=} ;;
	console=hvc0*) hvc0=1 ;;
	ro | rw) mode=$word ;;
	esac
done
set +f

load() {
	[ -e "/modules/$1" ] || return 0
	while read -r module; do
		# Two devices may need the same one.
		[ -e "/loaded/$module" ] && continue
		$b insmod "/modules/$module" || echo "offmap-guest: cannot load $module"
		: >"/loaded/$module"
	done <"/modules/$1"
}
load base
for device in /sys/bus/virtio/devices/*; do
	# virtio 1.2, chapter 5: the device's number, which initrd.py names the lists by
	[ -e "$device/device" ] && read -r number <"$device/device" && load "virtio-$number"
done
if [ "$hvc0" ] && [ ! -e /exec ] && [ -e /sys/module/virtio_console ]; then
	# It comes some time after its driver; systemd starts a login only where it is a console by then.
	try=0
	until $b grep -qs hvc0 /sys/class/tty/console/active || [ $try -ge 300 ]; do
		try=$((try + 1))
		$b usleep 10000
	done
fi
# The console may be another by now.
(: </dev/console) 2>/dev/null && exec </dev/console >/dev/console 2>&1

try=0
until [ -b "$root" ]; do
	try=$((try + 1))
	[ $try -lt 300 ] || fail "no root device $root"
	$b usleep 10000
done
case $overlay in
'')
	$b mount -t ext4 -o "$mode" "$root" /newroot || fail "cannot mount $root"
	;;
tmpfs)
	$b mount -t ext4 -o ro "$root" /lower || fail "cannot mount $root"
	$b mount -t tmpfs -o size=75%,mode=755 tmpfs /upper
	$b mkdir /upper/data /upper/work
	$b mount -t overlay -o lowerdir=/lower,upperdir=/upper/data,workdir=/upper/work overlay /newroot ||
		fail "cannot mount the overlay"
	;;
*) fail "offmap.overlay=$overlay is unknown" ;;
esac

if [ ! -e /exec ]; then
	$b mount --move /dev /newroot/dev
	$b mount --move /sys /newroot/sys
	$b mount --move /proc /newroot/proc
	exec $b switch_root /newroot "$init" </newroot/dev/console >/newroot/dev/console 2>&1
	fail "cannot start $init"
fi

# One command.

port() { # name -> device, if it is there
	for entry in /sys/class/virtio-ports/*; do
		if [ -e "$entry/name" ] && read -r name <"$entry/name" && [ "$name" = "$1" ]; then
			echo "/dev/${entry##*/}"
		fi
	done
}
try=0
while stdin=$(port stdin) stdout=$(port stdout) stderr=$(port stderr) status=$(port status) &&
	[ -z "$stdin" -o -z "$stdout" -o -z "$stderr" -o -z "$status" ]; do
	try=$((try + 1))
	[ $try -lt 300 ] || fail "no ports for the command's input and output"
	$b usleep 10000
done
exec 3<>"$status"

$b mount -t proc proc /newroot/proc
$b mount -t sysfs sysfs /newroot/sys
$b mount --bind /dev /newroot/dev
$b mkdir -p /newroot/dev/pts /newroot/dev/shm
$b mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts /newroot/dev/pts
$b mount -t tmpfs -o mode=1777 tmpfs /newroot/dev/shm
$b ln -sf /proc/self/fd /dev/fd
$b ln -sf fd/0 /dev/stdin
$b ln -sf fd/1 /dev/stdout
$b ln -sf fd/2 /dev/stderr
$b mount -t tmpfs -o mode=755 tmpfs /newroot/run
$b mount -t tmpfs -o mode=1777 tmpfs /newroot/tmp
[ -e /newroot/etc/hostname ] && $b hostname "$($b cat /newroot/etc/hostname)"
$b ifconfig lo 127.0.0.1 up
if [ -e /sys/class/net/eth0 ] && [ "$ip" ]; then
	address=${ip%%:*} rest=${ip#*:} rest=${rest#*:}
	gateway=${rest%%:*} rest=${rest#*:}
	$b ifconfig eth0 "$address" netmask "${rest%%:*}" up || echo "offmap-guest: cannot give eth0 the address $address"
	[ -z "$gateway" ] || $b route add default gw "$gateway"
elif [ -e /sys/class/net/eth0 ]; then
	$b udhcpc -i eth0 -n -q -t 5 -T 1 -s /udhcpc >/dev/null 2>&1 || echo "offmap-guest: no answer to DHCP on eth0"
fi

# Pipes between the ports and the command, as it may open its /dev/stdout again, which a port does not allow.
$b mkfifo /stdin /stdout /stderr
$b cat "$stdin" >/stdin 3>&- &
feeder=$!
$b cat /stdout >"$stdout" 3>&- &
first=$!
$b cat /stderr >"$stderr" 3>&- &
second=$!
# In a subshell: this shell itself would write what it has to say of a signal to where its command writes.
(exec $b env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 \
	$b chroot /newroot /bin/sh -c 'cd && eval "$1"' sh "$($b cat /exec)") </stdin >/stdout 2>/stderr 3>&-
result=$?
# What it has left running ends with it, as nobody could hear it any more.
for entry in /proc/[0-9]*; do
	pid=${entry#/proc/}
	case $pid in 1 | $$ | $first | $second) ;; *) kill -9 "$pid" 2>/dev/null ;; esac
done
wait $first $second
if [ "$mode" = rw ] && [ -z "$overlay" ]; then
	for place in tmp run dev/shm dev/pts dev sys proc ''; do
		$b umount "/newroot/$place" || echo "offmap-guest: cannot unmount /$place"
	done
fi
echo "exit $result" >&3
# Whoever asked for the status ends this guest, once all output has arrived.
$b cat <&3 >/dev/null
$b poweroff -f
