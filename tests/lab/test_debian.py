"""Debian guests: to a login and a clean end on every kind of RAM and every kernel, several at once; one command."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from offmap.boot.packed import unpacked
from offmap.guests.build import build_image
from offmap.guests.image import Image
from offmap.guests.recipe import RootRecipe
from offmap.kmod.lab_build import lab_module
from offmap.lab.host import LabHost
from offmap.lab.kernel import HostKernel
from offmap.lab.provision import host_kernel
from offmap.patience import scaled

from . import prepared
from .conftest import soak
from .console import PATIENCE, Guest

pytestmark = [pytest.mark.lab, pytest.mark.slow]

KERNELS = ("6.1", "6.12", "7.3")
BOOT = 240.0  # seconds to a login, which takes 20 on an idle machine
ALARMS = "-e WARNING -e BUG: -e 'XSAVE consistency' -e I/O.error"
OFFMAP = (sys.executable, "-m", "offmap")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory, lab_kernel: HostKernel) -> dict[str, Image]:
    """Give an image for each kernel series, and one whose kernel is an ELF file."""
    if shutil.which("mmdebstrap") is None and not os.environ.get("OFFMAP_NO_SKIP"):
        pytest.skip("no mmdebstrap: no Debian guest was booted (install mmdebstrap)")
    folder = tmp_path_factory.mktemp("images")
    recipe = RootRecipe()
    images = {series: build_image(recipe, host_kernel(f"debian:{series}"), folder / series) for series in KERNELS}
    images["elf"] = build_image(recipe, lab_kernel, folder / "elf")
    images["elf"].kernel.write_bytes(unpacked(lab_kernel.vmlinuz))
    return images


@pytest.fixture(scope="module")
def host(
    images: dict[str, Image], lab_kernel: HostKernel, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LabHost]:
    """Give a host that has the images, the module, and reserved memory."""
    module = lab_module(lab_kernel)
    out = tmp_path_factory.mktemp("out")
    with LabHost.start(lab_kernel, memory="3G", cmdline="memmap=512M$0x60000000", out=out) as host:
        assert host.run(["insmod", str(module)]) == 0
        yield host
        log = host.output(["dmesg"]).stdout.decode()
        assert not [line for line in log.splitlines() if "WARNING" in line or "BUG" in line]


def log_in(guest: Guest) -> None:
    """Become root at the console."""
    guest.expect("login: ", BOOT)
    guest.keys("root\n")
    # The shell of a login reads what is typed with a line editor; without it, what is printed is what was written.
    guest.expect(r"root@debian:~# ")
    guest.keys("exec sh\n")
    guest.expect("# ")


def report(host: LabHost, name: str) -> tuple[list[str], Path]:
    assert host.options.out is not None
    path = host.options.out / f"{name}.json"
    return ["--report", str(path)], path


@pytest.mark.parametrize(
    ("backend", "vcpus"),
    [("reserved", 2), ("unplugged", 1), soak("reserved", 1), soak("unplugged", 2), soak("anon", 1), soak("anon", 2)],
)
def test_login_and_clean_end(host: LabHost, images: dict[str, Image], backend: str, vcpus: int) -> None:
    """The root file system is writable, so that its end can be seen to be clean."""
    root = f"/tmp/{backend}-{vcpus}"
    copy = f"mkdir {root} && cp --sparse=always {images['6.12'].folder}/* {root}/"
    assert host.run(["sh", "-c", copy]) == 0
    options, path = report(host, f"{backend}-{vcpus}")
    with Guest(
        host,
        None,
        *("--image", f"{root},rw=on", "--memory", backend, "--vcpus", str(vcpus), "--audit", *options),
    ) as guest:
        log_in(guest)
        guest.expect_error("^EXPOSED: " if backend == "anon" else "^HIDDEN: none of the 65536 guest pages")
        assert guest.shell("systemctl is-system-running --wait", BOOT) == "running"
        assert guest.shell("nproc") == str(vcpus)
        assert "/dev/vda on / type ext4 (rw" in guest.shell("mount")
        assert guest.shell(f"dmesg | grep {ALARMS}") == ""
        assert guest.shell("echo kept >/root/mark; stat -c %U /root/mark") == "root"
        guest.keys("systemctl poweroff\n")
        assert guest.end(BOOT) == (1 if backend == "anon" else 0), guest.errors
    assert json.loads(path.read_text())["outcome"] == "powered off"
    check = host.output(["e2fsck", "-fn", f"{root}/root.img"])
    assert check.status == 0, check.stdout
    kept = host.output(["debugfs", "-R", "cat /root/mark", f"{root}/root.img"])
    assert kept.stdout == b"kept\n"
    host.output(["rm", "-r", root])


@pytest.mark.parametrize("kernel", [soak("6.1"), "7.3", soak("elf")])
def test_kernels(host: LabHost, images: dict[str, Image], kernel: str) -> None:
    """On hidden RAM; the image is not written to."""
    image = images[kernel]
    with Guest(host, None, "--image", str(image.folder), "--memory", "unplugged", "--vcpus", "2", "--audit") as guest:
        log_in(guest)
        guest.expect_error("^HIDDEN: ")
        assert guest.shell("uname -r") == image.facts["kernel_release"]
        assert guest.shell("systemctl is-system-running --wait", BOOT) == "running"
        assert "overlay on / type overlay (rw" in guest.shell("mount")
        assert guest.shell(f"touch /usr/new; dmesg | grep {ALARMS}; ls /usr/new") == "/usr/new"
        guest.keys("systemctl poweroff\n")
        assert guest.end(BOOT) == 0, guest.errors
    check = host.output(["e2fsck", "-fn", str(image.root)])
    assert check.status == 0, check.stdout


def test_a_terminal_on_hvc0_and_its_size(host: LabHost, images: dict[str, Image]) -> None:
    """On hidden RAM. What the guest says early is seen on its serial port; what it says on hvc0 is seen once."""
    image = images["6.12"]
    target = Path(__file__).with_name("hvc_target.py")
    options = ["--image", str(image.folder), "--memory", "unplugged"]
    done = host.output([sys.executable, str(target), *options], timeout=2 * scaled(BOOT))
    assert done.status == 0, done.stderr
    seen = json.loads(done.stdout)
    assert "Ctrl-A x: quit" in seen.pop("errors")
    assert seen == {
        "banners": 1,
        "mounts": 1,
        "logins": 1,
        "tty": "/dev/hvc0",
        "release": image.facts["kernel_release"],
        "first": "33 101",
        "second": "50 132",
        "lines": 2000,
        "alarms": "",
        "power down": 1,
        "restored": True,
        "status": 0,
    }


def test_several_guests_at_once_each_audited_by_itself(host: LabHost, images: dict[str, Image]) -> None:
    job = ("--image", str(images["6.12"].folder), "--exec", "echo up; read word; echo $word; test $word = go")
    kinds = {"first": "unplugged", "second": "unplugged", "third": "reserved", "fourth": "anon"}
    guests = {name: Guest(host, None, "--memory", backend, *job) for name, backend in kinds.items()}
    try:
        for guest in guests.values():
            guest.expect("up\n", BOOT)
        for name, guest in guests.items():
            audit = prepared.run(host, "offmap", "audit", "--no-progress", str(guest.pid))
            said = audit.stdout
            if kinds[name] == "anon":
                assert audit.status == 1 and said.startswith("EXPOSED: "), said
            else:
                assert audit.status == 0 and said.startswith("HIDDEN: none of the 65536 guest pages"), said
        for name, guest in guests.items():
            guest.keys("go\n" if name != "second" else "stop\n")
        for name, guest in guests.items():
            assert guest.end() == (0 if name != "second" else 1), guest.errors
            assert guest.expect(r"(go|stop)\n") == ("go" if name != "second" else "stop")
    finally:
        for guest in guests.values():
            guest.__exit__(None, None, None)


def test_one_command(host: LabHost, images: dict[str, Image]) -> None:
    """Its streams and status are ours: nothing is added, lost or changed."""
    run = (*OFFMAP, "run", "--image", str(images["6.12"].folder), "--memory", "reserved")

    def job(command: str, stdin: bytes = b"") -> tuple[int, bytes, bytes]:
        done = host.output([*run, "--exec", command], stdin=stdin, timeout=scaled(PATIENCE))
        return done.status, done.stdout, done.stderr

    everything = bytes(range(256)) * 4096 + b"\r\n\x04\x00"
    assert job("cat; cat >&2 </etc/hostname; exit 42", everything) == (42, everything, b"debian\n")
    # Input that nobody reads, output by name, what is left running, and what the shell says of a signal.
    command = "echo a >/dev/stdout; echo b >/dev/stderr; sleep 1000 & kill -9 $$"
    assert job(command, everything) == (128 + 9, b"a\n", b"b\n")
    assert job("no-such-command")[0] == 127
    assert job("tty; pwd; test -w / && test -t 0; echo $? $HOME $PATH")[1].splitlines() == [
        b"not a tty",
        b"/root",
        b"1 /root /usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    ]
    # Failures of ours are none of the command's.
    status, out, errors = job("echo c >/proc/sysrq-trigger")
    assert (status, out) == (125, b""), errors
    assert errors.startswith(b"offmap run: the guest reset itself before the command did"), errors
    assert errors.count(b"\n") == 1
    dead = host.output(["sh", "-c", '"$@" --exec yes | head -n 1', "sh", *run], timeout=scaled(PATIENCE))
    assert dead.stdout == b"y\n"
    assert b"writing the command's stdout failed: Broken pipe" in dead.stderr


def test_a_job_whose_guest_is_not_hidden_fails_where_that_was_asked_for(
    host: LabHost, images: dict[str, Image]
) -> None:
    run = (*OFFMAP, "run", "--image", str(images["6.12"].folder), "--audit")
    done = host.output([*run, "--exec", "echo done"], timeout=scaled(PATIENCE))
    assert (done.status, done.stdout) == (125, b"done\n")
    assert b"EXPOSED: " in done.stderr
    assert b"the command ended with status 0, but its guest was not found hidden" in done.stderr
    done = host.output([*run, "--memory", "unplugged", "--exec", "exit 9"], timeout=scaled(PATIENCE))
    assert done.status == 9
    assert b"HIDDEN: " in done.stderr


def test_an_image_is_written_to_by_one_guest_at_a_time(host: LabHost, images: dict[str, Image]) -> None:
    root = "/tmp/shared"
    assert host.run(["sh", "-c", f"mkdir {root} && cp --sparse=always {images['6.12'].folder}/* {root}/"]) == 0
    run = (*OFFMAP, "run", "--image", f"{root},rw=on")
    with Guest(host, None, "--image", f"{root},rw=on", "--exec", "echo up; read x; echo mine >/root/mark") as first:
        first.expect("up\n", BOOT)
        second = host.output([*run, "--exec", "true"], timeout=scaled(PATIENCE))
        assert second.status == 125
        assert second.stderr.count(b"\n") == 1 and b"root.img" in second.stderr
        first.keys("go\n")
        assert first.end() == 0, first.errors
    check = host.output(["e2fsck", "-fn", f"{root}/root.img"])
    assert check.status == 0, check.stdout
    third = host.output([*run, "--exec", "cat /root/mark"], timeout=scaled(PATIENCE))
    assert third.stdout == b"mine\n", third.stderr


EVERY_DEVICE = """set -e
get() { exec 3<>/dev/tcp/198.18.7.1/8000; printf "GET /$1 HTTP/1.0\\r\\n\\r\\n" >&3; LC_ALL=C sed '1,/^\\r*$/d' <&3; }
get big | tee /tmp/big | sha256sum
sha256sum </dev/vdb
dd if=/tmp/big of=/dev/vdc bs=1M conv=fsync status=none
head -c 65536 /dev/hwrng | wc -c
get vsock_nc >/tmp/vsock_nc
chmod +x /tmp/vsock_nc
/tmp/vsock_nc connect 5000 </tmp/big
# So that there is traffic for as long as the audit takes.
while [ $SECONDS -lt 15 ]; do
    get big | cmp - /tmp/big
    dd if=/dev/vdc bs=1M iflag=direct status=none | cmp - /tmp/big
done
"""
QUOTED = EVERY_DEVICE.replace("'", "'\\''")
VSOCK_SINK = """
import hashlib, socket, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1] + "_5000")
listener.listen()
print("listening", flush=True)
peer, _ = listener.accept()
digest = hashlib.sha256()
while piece := peer.recv(1 << 16):
    digest.update(piece)
print(digest.hexdigest())
"""


@pytest.mark.parametrize("backend", [soak("reserved"), "unplugged"])
def test_every_device_of_a_hidden_guest_at_once(host: LabHost, images: dict[str, Image], backend: str) -> None:
    """The same bytes by network, drives and vsock, by their checksums, audited meanwhile."""
    assert host.options.out is not None
    folder = host.options.out / f"devices-{backend}"
    folder.mkdir()
    source = Path(__file__).parents[1] / "payloads" / "vsock_nc.c"
    subprocess.run(["gcc", "-O1", "-static", "-o", str(folder / "vsock_nc"), str(source)], check=True)
    prepare = f"modprobe tun; mkdir -p /tmp/www && cd /tmp/www && cp {folder}/vsock_nc . && truncate -s 8M /tmp/written"
    prepare += " && head -c 8388608 /dev/urandom >big && cp big /tmp/read && sha256sum <big"
    checksum = host.output(["sh", "-c", f"PATH=$PATH:/usr/sbin:/sbin; {prepare}"]).stdout.decode().split()[0]
    heard: list[bytes] = []
    socket_path = f"/run/{backend}.sock"
    sink = host.popen([sys.executable, "-I", "-S", "-c", VSOCK_SINK, socket_path], stdout=heard.append)
    server = host.popen(["/run/offmap-lab/busybox", "httpd", "-f", "-p", "8000", "-h", "/tmp/www"])
    try:
        options = ["--image", str(images["6.12"].folder), "--memory", backend, "--audit", "--rng"]
        options += ["--drive", "/tmp/read,readonly=on", "--drive", "/tmp/written"]
        options += ["--net", "tap=ofdev0,address=198.18.7.1/24", "--vsock", f"cid=7,path={socket_path}"]
        options += ["--cmdline", "console=ttyS0 quiet ip=198.18.7.2::198.18.7.1:255.255.255.0"]
        done = host.output([*OFFMAP, "run", *options, "--exec", f"bash -c '{QUOTED}'"], timeout=scaled(PATIENCE))
    finally:
        server.kill()
    errors = done.stderr.decode()
    assert done.status == 0, errors
    assert done.stdout.decode().split() == [checksum, "-", checksum, "-", "65536"], errors
    assert "HIDDEN: " in errors and "EXPOSED" not in errors and "UNKNOWN" not in errors
    assert sink.wait(scaled(30)) == 0
    assert b"".join(heard).decode().split() == ["listening", checksum]
    assert host.output(["sh", "-c", "sha256sum </tmp/written"]).stdout.decode().split()[0] == checksum
