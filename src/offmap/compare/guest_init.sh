#!/bin/busybox sh
# Init of the small guest that offmap boots: plant canaries if asked to, say so, and give a shell.
# The kernel hands NAME=VALUE words of its command line that it does not know to init as environment variables:
#   OFFMAP_CANARIES=N       how many canaries to plant, one a page
#   OFFMAP_CANARY_FIRST=N   the number of the first (0 if it is not given)
#   OFFMAP_SECRET=1         plant a secret in the memory of a shell; print its SHA-256, and it in pieces
#   OFFMAP_CANARY_KEY=HEX   the key that their checksums are made with (offmap.audit.canary)
/bin/busybox mkdir -p /proc /sys /dev /tmp /canaries
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sysfs /sys
/bin/busybox mount -t devtmpfs devtmpfs /dev
/bin/busybox --install -s /bin
# busybox's own would only send a signal to this script. As functions, since its shell prefers applets to files.
for command in poweroff reboot halt; do
    echo "$command() { /bin/busybox $command -f \"\$@\"; }"
done >/shell-functions
export ENV=/shell-functions
export PATH=/bin:/sbin HOME=/ PS1='offmap-guest# '

plant() {
    mkdir -p /tmp/parts
    # 32 hex digits a line, and a file for each, from one process: on an emulated host every fork shows.
    head -c $((OFFMAP_CANARIES * 16)) /dev/urandom | hexdump -v -e '16/1 "%02x" "\n"' >/tmp/nonces
    awk -v key="$OFFMAP_CANARY_KEY" -v first="${OFFMAP_CANARY_FIRST:-0}" '{
        id = sprintf("%04x", first + NR - 1)
        part = "/tmp/parts/" id
        printf "%s:%s:%s", key, id, $0 >part
        close(part)
    }' /tmp/nonces
    cd /tmp/parts || return
    sha256sum * >/tmp/checks
    cd / || return
    # A file of less than a page in the root file system, which is in RAM, has a page of its own.
    while read -r check id && IFS= read -r nonce <&3; do
        echo -n "OFFMAPCANARY2: put here by offmap, to see where else it is seen:$id:$nonce:$check" >/canaries/$id
    done </tmp/checks 3</tmp/nonces
    rm -r /tmp/parts /tmp/checks /tmp/nonces
    set -- /canaries/*
    echo "offmap-guest: $# canaries planted"
}

if [ "${OFFMAP_CANARIES:-0}" -gt 0 ]; then
    plant
fi
if [ "${OFFMAP_SECRET:-0}" -gt 0 ]; then
    # The substitution ends when that shell has given its output away: then its secret stands in its memory.
    said=$(sh -c 'mark=OFFMAP-SECRET-
        word=$mark$(head -c 16 /dev/urandom | hexdump -v -e "16/1 \"%02x\"")
        # In pieces of eight bytes, in hexadecimal: the secret itself is never said.
        echo "offmap-guest: pieces $(echo -n "${word#$mark}" | hexdump -v -e "8/1 \"%02x\" \",\"")"
        echo "offmap-guest: secret $(echo -n "${word#$mark}" | sha256sum | cut -d " " -f 1)"
        exec >/dev/console
        while :; do sleep 1000; done' &)
    echo "$said"
fi
echo "offmap-guest: clocksource $(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)"
echo "offmap-guest: ready, Linux $(uname -r)"
while :; do
    setsid cttyhack sh
done
