#!/bin/busybox sh
# What busybox's udhcpc runs when it has a lease: one address, its routes, its name servers.
b=/bin/busybox
case $1 in
deconfig)
	$b ip link set "$interface" up
	;;
bound | renew)
	$b ip address flush dev "$interface"
	$b ip address add "$ip/${mask:-24}" dev "$interface"
	for gateway in $router; do
		$b ip route add default via "$gateway" dev "$interface" 2>/dev/null ||
			$b ip route add default via "$gateway" dev "$interface" onlink
	done
	for server in $dns; do
		echo "nameserver $server"
	done >/newroot/etc/resolv.conf
	;;
esac
