"""Honest VMs on hidden memory are hidden, each time, while others begin and end beside them.

``python -m tests.lab.honest [COUNT] [--firecracker PATH]`` boots one disposable host with a wrapped QEMU, a wrapped
Firecracker and a guest of ``offmap run``, lets small VMs come and go there, and audits all until COUNT verdicts of the
three were given (50 unless told). It prints how often each was given, and ends with status 1 if any is not ``hidden``.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

from offmap.compare.guest import READY
from offmap.lab.firecracker import released_firecracker
from offmap.lab.provision import host_kernel
from offmap.lab.vmlinux import vmlinux_of
from offmap.patience import scaled

from .kvm_attack_target import MIB, Vm, plain
from .test_wrap import qemu
from .wrapped import HIDDEN, LOG, OFFMAP, PATIENCE, ROOT, Started, config, module_host

_WORDS = "console=ttyS0 quiet reboot=k panic=1 pci=off i8042.noaux i8042.nomux i8042.dumbkbd"


def come_and_go() -> None:
    """Run in the host: VMs of ordinary memory begin and end."""
    memory = plain(MIB)
    while True:
        vm = Vm()
        vm.slot(0, memory)
        for fd in (vm.vcpu(), vm.fd, vm.kvm):
            os.close(fd)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("count", type=int, nargs="?", default=50)
    parser.add_argument("--firecracker", type=Path)
    parser.add_argument("--come-and-go", action="store_true")
    args = parser.parse_args()
    if args.come_and_go:
        come_and_go()
    firecracker = args.firecracker or released_firecracker()
    kernel = host_kernel()
    found: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder, module_host(kernel, out := Path(folder)) as host:
        vmlinux = out / "vmlinux"
        shutil.copy(vmlinux_of(kernel.vmlinuz), vmlinux)
        # The output folder is uncached 9p, which cannot read into hidden memory.
        assert host.run(["cp", str(vmlinux), str(out / "guest.initramfs"), "/run"]) == 0
        boot = {"kernel_image_path": "/run/vmlinux", "initrd_path": "/run/guest.initramfs", "boot_args": _WORDS}
        settings = [*LOG, "--no-api", "--config-file", config(boot, out, "config.json")]
        ours = ["--kernel", str(kernel.vmlinuz), "--initrd", "/run/guest.initramfs", "--memory-size", "128M"]
        started = [
            Started(host, [*OFFMAP, "wrap", "--", *qemu(host)]),
            Started(host, [*OFFMAP, "wrap", "--", str(firecracker), *settings]),
            Started(host, [*OFFMAP, "run", "--memory", "unplugged", *ours]),
        ]
        try:
            pids = {int(started[0].await_(r"process (\d+): HIDDEN")), int(started[1].await_(HIDDEN))}
            started[2].await_(f"({READY})")
            started.append(Started(host, [sys.executable, "-m", "tests.lab.honest", "--come-and-go"]))
            while found.total() < args.count:
                done = host.output([*OFFMAP, "audit", "--all", "--json"], timeout=scaled(PATIENCE), cwd=ROOT)
                result = json.loads(done.stdout)
                pids |= {vm["pid"] for vm in result["vms"] if vm["vmm"]["vmm"] == "offmap"}
                honest = [vm for vm in result["vms"] if vm["pid"] in pids]
                found.update(vm["verdict"] for vm in honest)
                found.update("not audited" for vm in result["not_audited"] if vm["pid"] in pids)
                wrong = [(vm["pid"], vm["notes"]) for vm in honest if vm["verdict"] != "hidden"]
                print(dict(found), len(pids), done.status, result["notes"], wrong, file=sys.stderr, flush=True)
        finally:
            for command in started:
                command.end()
    print(json.dumps(found))
    return 0 if set(found) == {"hidden"} else 1


if __name__ == "__main__":
    sys.exit(main())
