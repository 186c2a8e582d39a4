#!/bin/sh
# In a disposable host: install libvirt into its own root, as Debian's packages set it up.
# libvirt.sh ROOT, where ROOT is the folder of the unpacked packages. Guests' RAM is to be in the pool at /run/hidden.
set -e
cp -rsn "$1/usr/lib" "$1/usr/sbin" "$1/usr/bin" /usr
cp -rsn "$1/lib/x86_64-linux-gnu" /usr/lib
cp -rsn "$1/usr/share/libvirt" /usr/share
# Of libvirt's drivers only that for QEMU: the others want a firewall, LVM and the like.
cd /usr/lib/x86_64-linux-gnu/libvirt/connection-driver
for driver in *; do
	[ "$driver" = libvirt_driver_qemu.so ] || rm "$driver"
done
# libvirt-daemon-system.postinst
grep -q '^kvm:' /etc/group || echo 'kvm:x:108:' >>/etc/group
if ! grep -q '^libvirt-qemu:' /etc/passwd; then
	sed -i 's/^\(kvm:.*:\)\(.*\)/\1libvirt-qemu,\2/; s/,$//' /etc/group
	echo 'libvirt-qemu:x:64055:' >>/etc/group
	echo "libvirt-qemu:x:64055:$(sed -n 's/^kvm:x:\([0-9]*\).*/\1/p' /etc/group)::/var/lib/libvirt:/bin/false" >>/etc/passwd
fi
mkdir -p /etc/libvirt /var/lib/libvirt/qemu /var/cache/libvirt/qemu /var/log/libvirt/qemu
chown libvirt-qemu:libvirt-qemu /var/lib/libvirt/qemu /var/cache/libvirt/qemu
# udev's rules do this
chgrp kvm /dev/kvm
chmod 660 /dev/kvm
# Without virtlogd, libvirtd's guests write their logs themselves.
printf 'memory_backing_dir = "%s"\nstdio_handler = "file"\n' /run/hidden >/etc/libvirt/qemu.conf
