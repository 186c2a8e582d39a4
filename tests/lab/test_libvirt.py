"""A guest of libvirt on a pool, by what docs/libvirt.md tells the administrator to write, and nothing else."""

import json
import re
import shutil
import sys
from pathlib import Path

import msgspec
import pytest

from offmap.compare.cell_result import CellOutcome
from offmap.compare.guest import guest_initramfs
from offmap.compare.job import Job, Preset
from offmap.compare.libvirt_host import libvirt_packages
from offmap.compare.spec import CellSpec
from offmap.compare.transcript import Transcript
from offmap.lab.host import LabHost
from offmap.lab.kernel import HostKernel
from offmap.patience import scaled

from .test_pool import BLOCK, MIB, start
from .wrapped import Started

pytestmark = [pytest.mark.lab, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "src/offmap/compare/libvirt_host.sh"
PATIENCE = 120.0  # seconds on an idle machine
OFFMAP = [sys.executable, "-m", "offmap"]
VIRSH = ["virsh", "--quiet", "--connect", "qemu:///system"]
SIZE = 2 * BLOCK
DOMAIN = """
<domain type='kvm'>
  <name>guest</name>
  {hidden}
  <vcpu>1</vcpu>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <kernel>/run/vmlinuz</kernel>
    <initrd>/run/guest.initramfs</initrd>
    <cmdline>console=ttyS0 quiet</cmdline>
  </os>
  <features><acpi/></features>
  <devices>
    <emulator>/usr/local/bin/qemu-2m</emulator>
    <serial type='pty'/>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
  </devices>
</domain>
"""
CONSOLE = """
exec 3<>"$(virsh --quiet --connect qemu:///system ttyconsole guest)"
cat <&3 &
while read -r line; do echo "$line" >&3; done
"""
RIGHTS = {
    "Uid": ["64055"] * 4,
    **{name: ["0" * 16] for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")},
    "NoNewPrivs": ["1"],
    "Seccomp": ["2"],
}


def documented() -> str:
    """The elements that docs/libvirt.md has for a guest on a pool, with another size."""
    found = re.search(r"```xml\n( *<memory .*?)```", (ROOT / "docs" / "libvirt.md").read_text(), re.DOTALL)
    assert found
    return found[1].replace("<memory unit='GiB'>2<", f"<memory unit='MiB'>{SIZE // MIB}<")


def output(host: LabHost, *argv: str) -> str:
    done = host.output(argv, timeout=scaled(PATIENCE))
    assert done.status == 0, done.stderr.decode()
    return done.stdout.decode()


def virsh(host: LabHost, *words: str) -> str:
    return output(host, *VIRSH, *words)


def await_free_pool(host: LabHost) -> None:
    """Wait until all of the pool is free: what a guest gave back is zeroed in the background first."""
    wait = f"until grep -q ' {SIZE} {SIZE} ' /sys/class/misc/offmap/pools; do sleep 0.1; done"
    output(host, "sh", "-c", wait)


def check_guest(host: LabHost, number: int) -> None:
    """The guest answers; its QEMU has no right; its RAM is a file of the pool, and hidden."""
    console = Started(host, ["sh", "-c", CONSOLE])
    try:
        console.command.write(b"\n")  # for a prompt; its first one comes in any case
        console.await_("(offmap-guest# )")
        console.command.write(b"echo answer $((6 * 7))\n")
        console.await_("(answer 42)")
    finally:
        console.end()
    pid = output(host, "cat", "/run/libvirt/qemu/guest.pid").strip()
    status = dict(line.split(":", 1) for line in output(host, "cat", f"/proc/{pid}/status").splitlines())
    assert {name: status[name].split() for name in RIGHTS} == RIGHTS
    (line,) = (line for line in output(host, "cat", f"/proc/{pid}/maps").splitlines() if "/run/hidden" in line)
    assert line.endswith(f"/run/hidden/libvirt/qemu/{number}-guest/pc.ram")
    low, high = (int(part, 16) for part in line.split()[0].split("-"))
    assert (high - low, low % (2 * MIB)) == (SIZE, 0)
    (pool,) = json.loads(output(host, *OFFMAP, "pool", "status", "--json"))
    (process,) = pool["processes"]
    assert (process["pid"], process["mapped"]) == (int(pid), SIZE)
    assert process["kvm_pages"]["2M"] > 0
    audit = json.loads(output(host, *OFFMAP, "audit", pid, "--json", "--range", f"{low:#x}:{SIZE:#x}"))
    assert (audit["verdict"], audit["pages"]["pages_populated"]) == ("hidden", SIZE // 4096)


def check_cell(host: LabHost, packages: Path, folder: Path) -> None:
    """What `offmap compare` says of such a guest; libvirt and its pool are there, so that it takes them as they are."""
    job = Job(
        CellSpec("libvirt-pool"),
        str(host.kernel.vmlinuz),
        str(folder / "guest.initramfs"),
        str(folder),
        preset=Preset(("works.boot",), canaries=8),
        libvirt=str(packages),
    )
    transcript = Transcript(lambda _: None)
    measure = [sys.executable, "-m", "offmap.compare.measure", msgspec.json.encode(job).decode()]
    transcript.feed(output(host, *measure).encode())
    said = transcript.said()
    assert (said.outcome, said.reason) == (CellOutcome.BOOTED, "")
    values = {id: answer.value for id, answer in said.answers.items()}
    assert (values["hidden.before_io"], values["hidden.populated_pages"]) == (True, SIZE // 4096)
    assert (values["hidden.canaries_planted"], values["hidden.canaries_found"]) == (8, 0)


def test_a_guest_of_libvirt_on_a_pool_is_hidden(lab_kernel: HostKernel, tmp_path: Path) -> None:
    packages = libvirt_packages()
    with start(lab_kernel, tmp_path) as host:
        shutil.copy(host.kernel.vmlinuz, tmp_path / "vmlinuz")
        (tmp_path / "guest.initramfs").write_bytes(guest_initramfs())
        (tmp_path / "guest.xml").write_text(DOMAIN.format(hidden=documented()))
        output(host, "sh", "-c", f"cp {tmp_path}/vmlinuz {tmp_path}/guest.initramfs /run")
        output(host, "cp", str(ROOT / "contrib/pool/qemu-2m"), "/usr/local/bin")
        output(host, "sh", str(SCRIPT), str(packages))
        output(host, *OFFMAP, "pool", "create", f"{SIZE // MIB}M", "--group", "libvirt-qemu", "--allow-nested")
        output(host, "libvirtd", "--daemon")  # after the pool is there: it makes a folder there for its guests
        virsh(host, "define", f"{tmp_path}/guest.xml")
        virsh(host, "start", "guest")
        check_guest(host, 1)
        virsh(host, "save", "guest", "/run/saved")
        await_free_pool(host)
        virsh(host, "restore", "/run/saved")
        check_guest(host, 2)
        virsh(host, "destroy", "guest")
        await_free_pool(host)
        check_cell(host, packages, tmp_path)
        await_free_pool(host)
        output(host, *OFFMAP, "pool", "destroy")
