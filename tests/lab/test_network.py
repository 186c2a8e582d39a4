"""Guests that talk, hidden ones too: HTTP over tap, vhost and passt, vsock with the host's programs; a balloon."""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from offmap.compare.guest import READY, guest_initramfs
from offmap.lab.cpio import directory, regular
from offmap.lab.host import LabHost
from offmap.lab.kernel import HostKernel
from offmap.lab.modules import ModuleIndex, load_module
from offmap.patience import scaled

from .conftest import soak
from .console import CMDLINE, Guest

pytestmark = pytest.mark.lab

MIB = 1 << 20
MODULES = ("virtio_mmio", "virtio_net", "vmw_vsock_virtio_transport", "virtio_balloon")
BUSYBOX = "/run/offmap-lab/busybox"
PAYLOADS = Path(__file__).parents[1] / "payloads"
TAP = "tap=oft0,address=198.18.0.1/24,mac=02:00:00:00:00:02"
CONFIGURE = "ifconfig eth0 198.18.0.2 netmask 255.255.255.0 up"

# A program of the host. It calls the guest's port 52, which sends everything back, and waits for the guest at 5000.
VSOCK_PEER = """
import hashlib, os, socket, sys, threading, time
path, size = sys.argv[1], int(sys.argv[2])
listener = socket.socket(socket.AF_UNIX)
listener.bind(path + "_5000")
listener.listen()
def call(port):
    client = socket.socket(socket.AF_UNIX)
    client.connect(path)
    client.sendall(b"CONNECT %d\\n" % port)
    line = b""
    while not line.endswith(b"\\n") and (byte := client.recv(1)):
        line += byte
    return client, line
assert call(77)[1] == b"", "nobody listens there"
while not (found := call(52))[1]:
    time.sleep(0.1)  # the guest's program is not there yet
stalled, line = found
assert line.startswith(b"OK "), line
client, line = call(52)
data = os.urandom(size)
def send():
    client.sendall(data)
    client.shutdown(socket.SHUT_WR)
threading.Thread(target=send).start()
def read(peer):
    got = []
    while piece := peer.recv(1 << 16):
        got.append(piece)
    return b"".join(got)
print("echo", read(client) == data, flush=True)
stalled.close()
peer, _ = listener.accept()
print("md5", hashlib.md5(read(peer)).hexdigest(), flush=True)
peer.sendall(b"thank you")
peer.close()
"""


@pytest.fixture(scope="module")
def initrd(lab_host: LabHost, lab_kernel: HostKernel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the small guest with the modules of its devices and vsock_nc, where the shared host can see it."""
    assert lab_host.options.out is not None
    program = tmp_path_factory.mktemp("vsock") / "vsock_nc"
    command = ["gcc", "-O1", "-static", "-o", str(program), str(PAYLOADS / "vsock_nc.c")]
    subprocess.run(command, check=True)
    names = ModuleIndex.of(lab_kernel.modules).load_order(MODULES)
    extra = [directory("modules"), regular("bin/vsock_nc", program.read_bytes(), 0o755)]
    extra += [regular(f"modules/{n:02}.ko", load_module(lab_kernel.modules / name)) for n, name in enumerate(names)]
    path = lab_host.options.out / "network.initramfs"
    path.write_bytes(guest_initramfs(extra))
    return path


@pytest.fixture(scope="module")
def host(lab_host: LabHost) -> LabHost:
    """Give the shared host, able to make taps."""
    done = lab_host.output(["sh", "-c", "PATH=$PATH:/usr/sbin:/sbin modprobe -a tun vhost_net"])
    assert done.status == 0, done.stderr
    return lab_host


@contextmanager
def web(host: LabHost, size: int) -> Iterator[str]:
    """A web server in the host, with a file `big` of random bytes: its checksum."""
    script = f"mkdir /tmp/www && head -c {size} /dev/urandom >/tmp/www/big && sha256sum </tmp/www/big"
    checksum = host.output(["sh", "-c", script]).stdout.decode().split()[0]
    server = host.popen([BUSYBOX, "httpd", "-f", "-p", "8000", "-h", "/tmp/www"])
    try:
        yield checksum
    finally:
        server.kill()
        host.output(["rm", "-r", "/tmp/www"])


@contextmanager
def running(host: LabHost, kernel: HostKernel, initrd: Path, *options: str) -> Iterator[Guest]:
    """A guest with its modules loaded, which is powered off at the end."""
    with Guest(host, kernel.vmlinuz, "--initrd", str(initrd), "--cmdline", CMDLINE, *options) as guest:
        guest.expect(READY)
        assert guest.shell("for m in /modules/*.ko; do insmod $m || echo no $m; done") == ""
        yield guest
        guest.keys("poweroff -f\n")
        assert guest.end() == 0, guest.errors


def fetch(guest: Guest, address: str = "198.18.0.1") -> str:
    """What the guest says the checksum of `big` is."""
    return guest.shell(f"wget -q -O - http://{address}:8000/big | sha256sum").split()[0]


def talk(host: LabHost, guest: Guest, path: str, size: int) -> None:
    """Both directions of vsock, each with `size` bytes."""
    guest.keys("vsock_nc echo 52 2 >/dev/null &\n")
    heard: list[bytes] = []
    script = [sys.executable, "-I", "-S", "-c", VSOCK_PEER, path, str(size)]
    peer = host.popen(script, stdout=heard.append)
    blocks = size >> 10
    done = guest.shell(
        f"dd if=/dev/urandom of=/tmp/v bs=1024 count={blocks} 2>/dev/null; md5sum </tmp/v; "
        "until vsock_nc connect 5000 </tmp/v >/tmp/answer 2>/dev/null; do sleep 0.3; done; cat /tmp/answer"
    )
    checksum, answer = done.split("  -\n")
    assert answer == "thank you"
    assert peer.wait(scaled(60)) == 0
    assert b"".join(heard).decode().split() == ["echo", "True", "md5", checksum]


def test_a_hidden_guest_talks(host: LabHost, lab_kernel: HostKernel, initrd: Path) -> None:
    """Over a tap that offmap makes and removes, and over vsock, and is hidden meanwhile."""
    options = ["--memory", "reserved", "--net", TAP, "--vsock", "cid=9,path=/run/guest.sock", "--audit"]
    with web(host, 8 * MIB) as checksum, running(host, lab_kernel, initrd, *options) as guest:
        guest.shell(CONFIGURE)
        assert guest.shell("cat /sys/class/net/eth0/address").strip() == "02:00:00:00:00:02"
        assert fetch(guest) == checksum
        guest.expect_error("^HIDDEN: ")
        talk(host, guest, "/run/guest.sock", MIB)
    left = host.output(["sh", "-c", "ls -d /run/guest.sock /sys/class/net/oft0; rm -f /run/guest.sock_5000"])
    assert left.stdout == b""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("memory", "vhost"), [("reserved", "on"), ("anon", "off"), soak("reserved", "off"), soak("anon", "on")]
)
def test_100_mib_over_http(host: LabHost, lab_kernel: HostKernel, initrd: Path, memory: str, vhost: str) -> None:
    options = ["--memory", memory, "--net", f"{TAP},vhost={vhost}", "--vcpus", "2"]
    with web(host, 100 * MIB) as checksum, running(host, lab_kernel, initrd, *options) as guest:
        guest.shell(CONFIGURE)
        assert fetch(guest) == checksum
        # And back: what the guest sends is what arrives.
        sink = host.popen([BUSYBOX, "nc", "-l", "-p", "8001", "-e", "/usr/bin/md5sum"])
        sent = guest.shell("head -c 20000000 /dev/urandom >/tmp/up; md5sum </tmp/up").split()[0]
        assert guest.shell("nc 198.18.0.1 8001 </tmp/up").split()[0] == sent
        assert sink.wait(scaled(30)) == 0


@pytest.mark.slow
@pytest.mark.parametrize("vhost", ["off", "on"])
def test_a_tap_that_goes_down_and_away_under_traffic(
    host: LabHost, lab_kernel: HostKernel, initrd: Path, vhost: str
) -> None:
    with running(host, lab_kernel, initrd, "--net", f"{TAP},vhost={vhost}") as guest:
        guest.shell(CONFIGURE)
        guest.keys("(while :; do ping -c 1 -W 1 198.18.0.1 >/dev/null 2>&1; done) &\n")
        carrier = "cat /sys/class/net/eth0/carrier"
        assert guest.shell(carrier) == "1"
        host.output([BUSYBOX, "ifconfig", "oft0", "down"])
        guest.expect_error("the link is down: somebody has set the interface oft0 down\n")
        assert guest.shell(f"until [ $({carrier}) = 0 ]; do sleep 0.2; done; {carrier}") == "0"
        host.output([BUSYBOX, "ifconfig", "oft0", "198.18.0.1", "netmask", "255.255.255.0", "up"])
        assert guest.shell(f"until [ $({carrier}) = 1 ]; do sleep 0.2; done; {carrier}") == "1"
        assert "1 packets received" in guest.shell("ping -c 1 198.18.0.1")
        # Only whoever holds the fd can delete it: or the end of its network namespace, or a link of another kind.
        assert guest.errors.count("\n") == 2, guest.errors


@pytest.mark.slow
def test_user_networking(host: LabHost, lab_kernel: HostKernel, initrd: Path) -> None:
    if shutil.which("passt") is None:
        pytest.skip("no passt: user networking was tried on a fake only (install passt)")
    # passt copies the addresses of an interface with a default route, which this host has none of.
    host.output(["sh", "-c", f"modprobe dummy; {BUSYBOX} ip link add dummy0 type dummy"])
    for words in ("addr add 203.0.113.5/24 dev dummy0", "link set dummy0 up", "route add default via 203.0.113.1"):
        host.output([BUSYBOX, "ip", *words.split()])
    try:
        with (
            web(host, 20 * MIB) as checksum,
            running(host, lab_kernel, initrd, "--memory", "reserved", "--net", "passt,tcp=8080:80") as guest,
        ):
            guest.shell("ifconfig eth0 203.0.113.5 netmask 255.255.255.0 mtu 1500; route add default gw 203.0.113.1")
            # The gateway's address is the host's own loopback, by passt's default.
            assert fetch(guest, "203.0.113.1") == checksum
            guest.shell("mkdir /tmp/www; echo from the guest >/tmp/www/x; httpd -p 80 -h /tmp/www")
            got = host.output([BUSYBOX, "wget", "-q", "-O", "-", "http://127.0.0.1:8080/x"])
            assert got.stdout == b"from the guest\n", got.stderr
    finally:
        host.output([BUSYBOX, "ip", "link", "del", "dummy0"])
    assert host.output([BUSYBOX, "pidof", "passt"]).stdout == b""


@pytest.mark.slow
def test_a_balloon_gives_memory_back_to_the_host(host: LabHost, lab_kernel: HostKernel, initrd: Path) -> None:
    def shared_memory(guest: Guest) -> int:
        status = host.output(["cat", f"/proc/{guest.pid}/status"]).stdout.decode()
        match = re.search(r"RssShmem:\s*(\d+) kB", status)
        assert match
        return int(match[1]) >> 10

    options = ["--initrd", str(initrd), "--cmdline", CMDLINE, "--memory", "memfd", "--balloon", "size=64M"]
    with Guest(host, lab_kernel.vmlinuz, *options) as guest:
        guest.expect(READY)
        guest.shell("head -c 100000000 /dev/urandom >/tmp/x; rm /tmp/x")
        before = shared_memory(guest)
        assert before > 100
        guest.shell("for m in /modules/*.ko; do insmod $m; done")
        free = "$(grep MemFree /proc/meminfo | tr -dc 0-9)"
        # What the guest was told to give up, and most of the rest, which it reports two seconds after it was freed.
        guest.shell(f"until [ {free} -lt 150000 ]; do sleep 0.2; done; sleep 3")
        after = shared_memory(guest)
        assert after < before - 50, (before, after)
        # And it comes back, empty and usable.
        guest.shell("head -c 60000000 /dev/zero >/tmp/y; tr -d '\\0' </tmp/y | wc -c >/tmp/n")
        assert guest.shell("cat /tmp/n") == "0"
        assert shared_memory(guest) > after + 20
        guest.keys("poweroff -f\n")
        assert guest.end() == 0, guest.errors
    text = refused(host, "--kernel", str(lab_kernel.vmlinuz), "--memory", "reserved", "--balloon", "size=64M")
    assert "cannot go back to the host page by page" in text


def refused(host: LabHost, *options: str) -> str:
    done = host.output([sys.executable, "-m", "offmap", "run", *options])
    text = done.stderr.decode()
    assert (done.status, done.stdout) == (2, b""), text
    assert text.count("\n") == 1, text
    return text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--net", "tap=lo"), "it is not a tap"),
        (("--vsock", "cid=3,path=/proc/version"), "remove the file"),
    ],
)
def test_what_is_refused(host: LabHost, lab_kernel: HostKernel, options: Sequence[str], message: str) -> None:
    assert message in refused(host, "--kernel", str(lab_kernel.vmlinuz), *options)
