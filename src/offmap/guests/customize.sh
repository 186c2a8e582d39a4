# Turns mmdebstrap's tar archive (standard input) into an ext4 image.
#   sh -c THIS sh IMAGE SIZE PACKAGE-LIST SCRATCH-FOLDER UUID HOSTNAME AUTOLOGIN(0|1)
# As root, or as what a user namespace takes for root: no file system is mounted, no device node made.
set -eu
image=$1 size=$2 packages=$3 root=$4/root uuid=$5 hostname=$6 autologin=$7
mkdir "$root"
# The kernel fills /dev itself (devtmpfs).
tar -C "$root" -x --numeric-owner --xattrs --xattrs-include='*' --exclude='./dev/*'
etc=$root/etc
sed -n 's/^Package: //p; s/^Version: //p' "$root/var/lib/dpkg/status" | paste -d' ' - - >"$packages"

# Empty, not "uninitialized": each guest has an id of its own, and none asks a first boot's questions (machine-id(5)).
: >"$etc/machine-id"
rm -f "$root/var/lib/dbus/machine-id"
echo "$hostname" >"$etc/hostname"
printf '127.0.0.1\tlocalhost\n127.0.1.1\t%s\n::1\tlocalhost\n' "$hostname" >"$etc/hosts"
# Root without a password: whoever has the console has the guest.
sed -i 's/^root:[^:]*:/root::/' "$etc/shadow"
: >"$etc/fstab"

mkdir -p "$etc/systemd/network" "$etc/systemd/system" "$etc/systemd/journald.conf.d" "$etc/tmpfiles.d"
# The first network device that there is, by DHCP; nobody waits for it at boot.
cat >"$etc/systemd/network/80-dhcp.network" <<'END'
[Match]
Type=ether

[Network]
DHCP=yes
IPv6AcceptRA=yes

[DHCPv4]
ClientIdentifier=mac
END
unit=$etc/systemd/system
enable() { # unit-file target
	mkdir -p "$unit/$2.wants"
	ln -sf "/lib/systemd/system/$1" "$unit/$2.wants/$1"
}
enable systemd-networkd.service multi-user.target
enable systemd-networkd.socket sockets.target
# There is no resolver daemon: networkd's leases are read by this.
cat >"$unit/resolv-conf.service" <<'END'
[Unit]
Description=/etc/resolv.conf from the DHCP leases
[Service]
Type=oneshot
ExecStart=/bin/sh -c 'sed -n "s/^DNS=//p" /run/systemd/netif/state | tr " " "\\n" | sed -n "s/^..*/nameserver &/p" >/etc/resolv.conf'
END
cat >"$unit/resolv-conf.path" <<'END'
[Unit]
Description=DHCP leases
[Path]
PathChanged=/run/systemd/netif/state
[Install]
WantedBy=multi-user.target
END
mkdir -p "$unit/multi-user.target.wants"
ln -sf ../resolv-conf.path "$unit/multi-user.target.wants/resolv-conf.path"
: >"$etc/resolv.conf"

ln -sf /lib/systemd/system/multi-user.target "$unit/default.target"
# What a guest of one console and one disk has no use for, and would wait for. (Modules that init.sh has not loaded are
# not there at all.)
for name in modprobe@.service sys-fs-fuse-connections.mount sys-kernel-config.mount systemd-modules-load.service \
	systemd-update-utmp-runlevel.service systemd-sysusers.service \
	getty@tty1.service getty-static.service systemd-logind.service apt-daily.timer apt-daily-upgrade.timer \
	dpkg-db-backup.timer e2scrub_all.timer e2scrub_reap.service fstrim.timer systemd-pstore.service \
	systemd-networkd-wait-online.service systemd-binfmt.service proc-sys-fs-binfmt_misc.automount \
	systemd-hwdb-update.service; do
	rm -f "$unit"/*.wants/"$name"
	ln -sf /dev/null "$unit/$name"
done
# The log is in memory: it goes with the guest.
printf '[Journal]\nStorage=volatile\nRuntimeMaxUse=8M\n' >"$etc/systemd/journald.conf.d/offmap.conf"
if [ "$autologin" = 1 ]; then
	for line in serial-getty@ttyS0 serial-getty@hvc0; do
		mkdir -p "$unit/$line.service.d"
		cat >"$unit/$line.service.d/autologin.conf" <<'END'
[Service]
ExecStart=
ExecStart=-/sbin/agetty --autologin root --noclear --keep-baud 115200,57600,38400,9600 %I $TERM
END
	done
fi

mke2fs -q -F -t ext4 -L root -U "$uuid" -m 0 -E lazy_itable_init=1,lazy_journal_init=1 -d "$root" "$image" "$size"
rm -rf "$root"
