"""A released Firecracker, wrapped, with all its devices: its guests on hidden memory, on a stock kernel."""

import subprocess
import sys
from pathlib import Path

import pytest

from offmap.compare.guest import READY, guest_initramfs
from offmap.lab.cpio import directory, regular
from offmap.lab.host import LabHost
from offmap.lab.kernel import HostKernel
from offmap.lab.modules import ModuleIndex, load_module
from offmap.patience import scaled

from .wrapped import (
    HIDDEN,
    LOG,
    OFFMAP,
    PATIENCE,
    Started,
    audit,
    boot_source,
    call,
    config,
    failed_call,
    firecracker,
    host,
)

pytestmark = pytest.mark.lab

__all__ = ["boot_source", "firecracker", "host"]  # fixtures


def test_a_released_firecracker_is_hidden(host: LabHost, firecracker: Path, boot_source: dict[str, str]) -> None:
    assert host.options.out is not None
    settings = config(boot_source, host.options.out, "config.json")
    command = [str(firecracker), *LOG, "--no-api", "--config-file", settings]
    vmm = Started(host, [*OFFMAP, "wrap", "--", *command])
    try:
        vmm.await_(f"({READY})")
        pid = int(vmm.await_(HIDDEN))
        result = audit(host, pid)
        assert (result["verdict"], result["pages"]["mapped_pages"], result["aliases"]) == ("hidden", 0, [])
        assert result["pages"]["ram_pages"] == 32768
        vmm.command.write(b"cat /proc/cmdline\n")
        vmm.await_(r"^(tsc=reliable tsc_early_khz=\d{6,} console=ttyS0 )")
    finally:
        assert "refused" not in vmm.end()
    vmm = Started(host, ["sh", "-c", 'echo "pid $$"; exec "$@"', "sh", *command])
    try:
        pid = int(vmm.await_(r"^pid (\d+)"))
        vmm.await_(f"({READY})")
        result = audit(host, pid)
        assert (result["verdict"], result["vmm"]["vmm"]) == ("exposed", "Firecracker")
    finally:
        vmm.end()


FOLDER = "/run/devices"
MODULES = ("virtio_mmio", "virtio_blk", "virtio_net", "vmw_vsock_virtio_transport", "virtio_rng", "virtio_balloon")
HERE, THERE = "198.18.9.1/24", "198.18.9.2/24"
DRIVE_SIZE = 4 << 20
GUEST = f"""
for module in $(cat /modules/order); do insmod /modules/$module; done
ip addr add {THERE} dev eth0
ip link set eth0 up
ip route add 169.254.169.254 dev eth0
dd if=/dev/vda of=/dev/vdb bs=1M 2>/dev/null
sync
echo "devices: drive $(sha256sum </dev/vda)"
echo "devices: entropy $(head -c 32 /dev/hwrng | wc -c)"
echo "devices: ping $(ping -c 1 -W 60 {HERE.partition("/")[0]} | grep -c ' 0% packet loss')"
echo "devices: mmds $(wget -q -O - http://169.254.169.254/answer)"
echo "devices: vsock $(vsock_nc connect 52 </dev/null)"
echo "devices: cpus $(grep -c ^processor /proc/cpuinfo)"
"""
BALLOON = """
total() { awk '/MemTotal/ { print $2 }' /proc/meminfo; }
before=$(total)
echo "balloon: begins"
until [ $(total) -le $((before - 15 * 1024)) ]; do usleep 100000; done
echo "balloon: inflated"
"""
LISTEN = """
import socket, sys
with socket.socket(socket.AF_UNIX) as s:
    s.bind(sys.argv[1])
    s.listen()
    print("listening", flush=True)
    peer = s.accept()[0]
    peer.sendall(b"heard")
    if sys.argv[2:]:
        peer.recv(1)
    peer.shutdown(socket.SHUT_WR)
    peer.recv(1)
"""


def listener(host: LabHost, path: str, *more: str) -> Started:
    """A program that waits for one connection; with one more word, for what that sends too."""
    program = Started(host, [sys.executable, "-c", LISTEN, path, *more])
    program.await_("(listening)")
    return program


@pytest.fixture(scope="module")
def initrd(host: LabHost, lab_kernel: HostKernel, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Give a guest that has the modules of Firecracker's devices, and tries them."""
    program = tmp_path_factory.mktemp("guest") / "vsock_nc"
    source = Path(__file__).parents[1] / "payloads" / "vsock_nc.c"
    subprocess.run(["gcc", "-O1", "-static", "-o", str(program), str(source)], check=True)
    order = ModuleIndex.of(lab_kernel.modules).load_order(MODULES)
    modules = {f"{number}.ko": load_module(lab_kernel.modules / path) for number, path in enumerate(order)}
    guest = guest_initramfs(
        [
            directory("modules"),
            *(regular(f"modules/{name}", data) for name, data in modules.items()),
            regular("modules/order", "\n".join(modules).encode()),
            regular("bin/vsock_nc", program.read_bytes(), 0o755),
            regular("devices", GUEST.encode()),
            regular("balloon", BALLOON.encode()),
        ]
    )
    assert host.options.out is not None
    (host.options.out / "devices.initramfs").write_bytes(guest)
    assert host.run(["cp", str(host.options.out / "devices.initramfs"), "/run"]) == 0
    return "/run/devices.initramfs"


@pytest.fixture(scope="module")
def devices(host: LabHost) -> list[tuple[str, str, object]]:
    """Give the calls that add two drives, a tap with MMDS, vsock, entropy and a balloon, and have the host ready."""
    made = f"mkdir {FOLDER} && cd {FOLDER} && head -c {DRIVE_SIZE} /dev/urandom >one && truncate -s {DRIVE_SIZE} two"
    tap = f"modprobe tun && ip tuntap add ofw0 mode tap && ip addr add {HERE} dev ofw0 && ip link set ofw0 up"
    done = host.output(["sh", "-c", f"{made} && {tap}"], timeout=scaled(PATIENCE))
    assert done.status == 0, done.stderr.decode()
    found: list[tuple[str, str, object]] = []
    for name, root in (("one", True), ("two", False)):
        drive = {"drive_id": name, "path_on_host": f"{FOLDER}/{name}", "is_root_device": root, "is_read_only": False}
        found.append(("PUT", f"/drives/{name}", drive))
    net = {"iface_id": "eth0", "host_dev_name": "ofw0", "guest_mac": "02:00:00:00:00:02"}
    return [
        *found,
        ("PUT", "/network-interfaces/eth0", net),
        ("PUT", "/mmds/config", {"version": "V1", "network_interfaces": ["eth0"]}),
        ("PUT", "/mmds", {"answer": "42"}),
        ("PUT", "/vsock", {"guest_cid": 3, "uds_path": f"{FOLDER}/vsock"}),
        ("PUT", "/entropy", {}),
        ("PUT", "/balloon", {"amount_mib": 0, "deflate_on_oom": False}),
    ]


def inflate(host: LabHost, vmm: Started, path: str, mib: int) -> None:
    """Have the guest give memory back, and wait until it has."""
    vmm.command.write(b". /balloon\n")
    vmm.await_("(balloon: begins)")
    call(host, path, ("PATCH", "/balloon", {"amount_mib": mib}))
    vmm.await_("(balloon: inflated)")


def is_hidden(host: LabHost, pid: int) -> bool:
    """Whether an audit finds all of the guest's RAM, and hidden."""
    result = audit(host, pid)
    return (result["verdict"], result["pages"]["ram_pages"]) == ("hidden", 32768)


def test_all_its_devices_before_and_after_a_snapshot(
    host: LabHost,
    firecracker: Path,
    boot_source: dict[str, str],
    initrd: str,
    devices: list[tuple[str, str, object]],
) -> None:
    files = {"snapshot_path": f"{FOLDER}/state", "mem_file_path": f"{FOLDER}/memory"}
    checksum = host.output(["sha256sum", f"{FOLDER}/one"]).stdout.decode().split()[0]
    first = Started(host, [*OFFMAP, "wrap", "--", str(firecracker), *LOG, "--api-sock", f"{FOLDER}/first"])
    peer = listener(host, f"{FOLDER}/vsock_52")
    try:
        call(
            host,
            f"{FOLDER}/first",
            ("PUT", "/machine-config", {"vcpu_count": 4, "mem_size_mib": 128}),
            ("PUT", "/boot-source", {**boot_source, "initrd_path": initrd}),
            *devices,
            ("PUT", "/actions", {"action_type": "InstanceStart"}),
        )
        first.await_(f"({READY})")
        pid = int(first.await_(HIDDEN))
        first.command.write(b". /devices\n")
        found = {"drive": checksum, "entropy": "32", "ping": "1", "mmds": "42", "vsock": "heard", "cpus": "4"}
        assert {name: first.await_(rf"^devices: {name} (\w*)[^\w]*\r?\n") for name in found} == found
        assert host.output(["sha256sum", f"{FOLDER}/two"]).stdout.decode().split()[0] == checksum
        inflate(host, first, f"{FOLDER}/first", 16)
        assert is_hidden(host, pid)
        call(
            host,
            f"{FOLDER}/first",
            ("PATCH", "/vm", {"state": "Paused"}),
            ("PATCH", "/vm", {"state": "Resumed"}),
            ("PATCH", "/vm", {"state": "Paused"}),
            ("PUT", "/snapshot/create", {"snapshot_type": "Full", **files}),
        )
    finally:
        heard = first.end()
        peer.end()
    assert "refused" not in heard
    assert host.run(["rm", f"{FOLDER}/vsock", f"{FOLDER}/vsock_52"]) == 0

    second = Started(host, [*OFFMAP, "wrap", "--", str(firecracker), *LOG, "--api-sock", f"{FOLDER}/second"])
    try:
        memory = {"backend_type": "File", "backend_path": files["mem_file_path"]}
        load = {"snapshot_path": files["snapshot_path"], "mem_backend": memory, "resume_vm": True}
        call(host, f"{FOLDER}/second", ("PUT", "/snapshot/load", load))
        pid = int(second.await_(HIDDEN))
        # It now maps plain memory over what a balloon gives back: that fails, as what was placed guards itself.
        inflate(host, second, f"{FOLDER}/second", 32)
        assert is_hidden(host, pid)
        second.command.write(b'echo 3 >/proc/sys/vm/drop_caches; echo "again: $(sha256sum </dev/vda)"\n')
        assert second.await_(r"^again: (\w+) *-\r?\n") == checksum
    finally:
        heard = second.end()
    assert "refused" not in heard
    assert host.run(["rm", f"{FOLDER}/vsock"]) == 0

    third = Started(host, [*OFFMAP, "wrap", "--", str(firecracker), *LOG, "--api-sock", f"{FOLDER}/third"])
    handler = listener(host, f"{FOLDER}/handler", "and hears what it is sent")
    try:
        load["mem_backend"] = {"backend_type": "Uffd", "backend_path": f"{FOLDER}/handler"}
        answer = failed_call(host, f"{FOLDER}/third", "PUT", "/snapshot/load", load)
        assert "400" in answer
        third.await_(r"(refused: .* registered with userfaultfd, .*; restore the snapshot from a file)")
    finally:
        third.end()
        handler.end()


def test_under_its_jailer_it_is_hidden(host: LabHost, firecracker: Path, boot_source: dict[str, str]) -> None:
    out, root = host.options.out, f"/run/jail/{firecracker.name}/one/root"
    assert out is not None
    inside = {**boot_source, "kernel_image_path": "vmlinux", "initrd_path": "guest.initramfs"}
    config(inside, out, "jailed.json")
    files = f"/run/guest.initramfs {out}/jailed.json"
    kernel = f"cp /run/vmlinux-64 {root}/vmlinux"
    made = f"mkdir -p {root} && cp {files} {root} && {kernel} && chmod -R a+rX /run/jail"
    assert host.run(["sh", "-c", f"{made} && touch {root}/log && chmod a+w {root}/log"]) == 0
    jailer = [str(firecracker.with_name("jailer")), "--id", "one", "--exec-file", str(firecracker)]
    inside_jail = ["--log-path", "log", "--no-api", "--config-file", "jailed.json"]
    jailer += ["--uid", "12345", "--gid", "12345", "--chroot-base-dir", "/run/jail"]
    vmm = Started(host, [*OFFMAP, "wrap", "--", *jailer, "--", *inside_jail])
    try:
        vmm.await_(f"({READY})")
        pid = int(vmm.await_(HIDDEN))
        seen = host.output(["sh", "-c", f"grep ^Uid: /proc/{pid}/status; ls /proc/{pid}/root"]).stdout.decode()
        assert "12345" in seen
        vmm.command.write(b"cat /proc/cmdline\n")
        vmm.await_(r"^(tsc=reliable tsc_early_khz=\d{6,} console=ttyS0 )")
        assert "jailed.json" in seen
    finally:
        assert "refused" not in vmm.end()
