"""The command lines of the VMMs that are compared: ``offmap run``, and QEMU, libvirt and Firecracker as they are."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from offmap.audit.guest_ram import RamRange
from offmap.audit.process import Process
from offmap.audit.result import Source
from offmap.compare.kinds import Kind, Vmm
from offmap.hidden_files import DEFAULT_POOL
from offmap.kvm import Kvm
from offmap.lab.qemu import NO_SELF_TESTS, find_qemu

MEMORY_SIZE = 256 << 20
"""Bytes of RAM of each guest that is compared. A Debian kernel wants 56 MiB in one piece; aliased pages leave few."""

REPORT = "report.json"
"""What ``offmap run`` writes at its end, in the folder of its guest."""

_QEMU_MEMFD = "/memfd:memory-backend-memfd"  # backends/hostmem-memfd.c


@dataclass(frozen=True, slots=True)
class GuestSetup:
    """One guest.

    Attributes:
        kind: its RAM, and what runs it.
        memory: bytes of RAM, a multiple of 1 MiB.
        words: for its kernel's command line.
        kvm_clock: on, off, or auto. Firecracker offers it always, and `offmap wrap` never.
        disk: a raw image for its /dev/vda.
        taps: its network interfaces, each by the name of its tap and whether it has vhost: on or off. Firecracker has
            no vhost: it gets those without.
        vsock: the host's socket, of ``offmap run --vsock`` and Firecracker; QEMU's is the host kernel's.
        cid: its context id there.
        balloon: bytes; None: no such device.
        firecracker: the program.
        vmlinux: the kernel as Firecracker wants it, an ELF file.
    """

    kind: Kind
    kernel: Path
    initrd: Path
    memory: int = MEMORY_SIZE
    words: str = ""
    vcpus: int = 1
    kvm_clock: str = "auto"
    disk: Path | None = None
    taps: Sequence[tuple[str, str]] = ()
    vsock: Path | None = None
    cid: int = 9
    balloon: int | None = None
    firecracker: Path | None = None
    vmlinux: Path | None = None

    @property
    def cards(self) -> list[tuple[str, str]]:
        """Those of the taps that its VMM has."""
        return [tap for tap in self.taps if self.kind.vmm is not Vmm.FIRECRACKER or tap[1] == "off"]


def vmm_command(setup: GuestSetup, folder: Path) -> list[str]:
    """What runs it.

    Args:
        folder: for the report of ``offmap run``, and the configuration of Firecracker and libvirt.

    Raises:
        OffmapError: there is no QEMU, or KVM does not say how fast its TSC is.
    """
    command_line = f"console=ttyS0 quiet {NO_SELF_TESTS} {setup.words}".strip()
    if setup.kind.vmm is Vmm.QEMU:
        return _qemu(setup, command_line)
    if setup.kind.vmm is Vmm.LIBVIRT:
        return _libvirt(setup, command_line, folder)
    if setup.kind.vmm is Vmm.FIRECRACKER:
        return _firecracker(setup, command_line, folder)
    argv = [sys.executable, "-m", "offmap", "run", "--kernel", str(setup.kernel), "--initrd", str(setup.initrd)]
    argv += ["--cmdline", command_line, "--memory", setup.kind.ram, "--memory-size", str(setup.memory)]
    argv += ["--vcpus", str(setup.vcpus), "--kvm-clock", setup.kvm_clock, "--report", str(folder / REPORT)]
    if setup.disk is not None:
        argv += ["--drive", str(setup.disk)]
    for number, (name, vhost) in enumerate(setup.taps):
        argv += ["--net", f"tap={name},vhost={vhost},mac={card_mac(number)}"]
    if setup.vsock is not None:
        argv += ["--vsock", f"cid={setup.cid},path={setup.vsock}"]
    if setup.balloon is not None:
        argv += ["--balloon", f"size={setup.balloon}"]
    return argv


def card_mac(number: int) -> str:
    """The address of a guest's n-th card, to be known by: in which order its kernel finds them is the VMM's affair."""
    return f"02:00:00:00:00:{number:02x}"


def _qemu(setup: GuestSetup, command_line: str) -> list[str]:
    """QEMU as docs/qemu.md has it: its RAM from the kind's file, and no kvm-clock unless it is asked for."""
    clock, words = _qemu_clock(setup.kvm_clock == "on")
    cpu = f"host,svm=off,vmx=off{clock}"
    command_line += f" pci=off{words}"
    file = setup.kind.backend.file
    kind = f"memory-backend-file,mem-path={file}" if file else "memory-backend-memfd"
    memory = f"{kind},id=ram,size={setup.memory},share=on"
    argv = [find_qemu(), "-accel", "kvm", "-cpu", cpu, "-M", "microvm,acpi=on,rtc=on,memory-backend=ram"]
    argv += ["-object", memory, "-m", f"{setup.memory >> 20}M", "-smp", str(setup.vcpus)]
    argv += ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio"]
    argv += ["-global", "virtio-mmio.force-legacy=false"]
    argv += ["-kernel", str(setup.kernel), "-initrd", str(setup.initrd), "-append", command_line]
    devices = []
    if setup.disk is not None:
        argv += ["-drive", f"id=disk,file={setup.disk},format=raw,if=none,cache=writeback"]
        devices += ["virtio-blk-device,drive=disk"]
    for number, (name, vhost) in enumerate(setup.taps):
        argv += ["-netdev", f"tap,id=net{number},ifname={name},script=no,downscript=no,vhost={vhost}"]
        devices += [f"virtio-net-device,netdev=net{number},mac={card_mac(number)}"]
    if setup.vsock is not None:
        devices += [f"vhost-vsock-device,guest-cid={setup.cid}"]
    for device in devices:
        argv += ["-device", device]
    return argv


_DOMAIN = """<domain type='kvm'>
  <name>{name}</name>
  <memory unit='b'>{memory}</memory>
  <memoryBacking><source type={source}/><access mode='shared'/></memoryBacking>
  <vcpu>{vcpus}</vcpu>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <kernel>{kernel}</kernel>
    <initrd>{initrd}</initrd>
    <cmdline>{command_line}</cmdline>
  </os>
  <features><acpi/></features>
  <cpu mode='host-passthrough'><feature policy='disable' name='svm'/><feature policy='disable' name='vmx'/></cpu>
  <clock offset='utc'><timer name='kvmclock' present={clock}/></clock>
  <on_reboot>destroy</on_reboot>
  <devices>
    <serial type='unix'><source mode='bind' path={console}/></serial>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
    {devices}
  </devices>
</domain>
"""


def _libvirt(setup: GuestSetup, command_line: str, folder: Path) -> list[str]:
    """A guest of libvirt as docs/libvirt.md has it: its RAM a file of the pool, and no kvm-clock unless asked for."""
    from xml.sax.saxutils import escape, quoteattr  # takes an emulated host longer than all else that is imported here

    devices = []
    if setup.disk is not None:
        driver = "<driver name='qemu' type='raw' cache='writeback'/>"
        target = "<target dev='vda' bus='virtio'/>"
        devices += [f"<disk type='file'>{driver}<source file={quoteattr(str(setup.disk))}/>{target}</disk>"]
    for number, (name, vhost) in enumerate(setup.taps):
        driver = f"<driver name='{'vhost' if vhost == 'on' else 'qemu'}'/>"
        card = f"<mac address='{card_mac(number)}'/><model type='virtio'/>{driver}<rom enabled='no'/>"
        devices += [f"<interface type='ethernet'><target dev={quoteattr(name)} managed='no'/>{card}</interface>"]
    if setup.vsock is not None:
        devices += [f"<vsock model='virtio'><cid auto='no' address='{setup.cid}'/></vsock>"]
    folder.chmod(0o711)  # QEMU runs as another user
    domain, console = folder / "domain.xml", folder / "console"
    domain.write_text(
        _DOMAIN.format(
            name=escape(folder.name),
            memory=setup.memory,
            source=quoteattr("file" if setup.kind.ram == "pool" else setup.kind.ram),
            vcpus=setup.vcpus,
            kernel=escape(str(setup.kernel)),
            initrd=escape(str(setup.initrd)),
            command_line=escape(command_line),
            clock=quoteattr("yes" if setup.kvm_clock == "on" else "no"),
            console=quoteattr(str(console)),
            devices="\n    ".join(devices),
        )
    )
    return [sys.executable, "-m", "offmap.compare.libvirt_guest", str(domain), folder.name, str(console)]


def _firecracker(setup: GuestSetup, command_line: str, folder: Path) -> list[str]:
    """Firecracker by a configuration file; under ``offmap wrap`` if its RAM is to be hidden."""
    assert setup.firecracker is not None and setup.vmlinux is not None
    # It logs each access to a port that it does not have, and ends when its guest resets.
    command_line += " reboot=k panic=1 pci=off i8042.noaux i8042.nomux i8042.dumbkbd"
    boot = {"kernel_image_path": str(setup.vmlinux), "initrd_path": str(setup.initrd), "boot_args": command_line}
    config: dict[str, object] = {
        "boot-source": boot,
        "machine-config": {"vcpu_count": setup.vcpus, "mem_size_mib": setup.memory >> 20},
        "drives": [],
        "network-interfaces": [
            {"iface_id": name, "host_dev_name": name, "guest_mac": card_mac(number)}
            for number, (name, _) in enumerate(setup.cards)
        ],
    }
    if setup.disk is not None:
        disk = {"drive_id": "disk", "path_on_host": str(setup.disk), "is_root_device": False, "is_read_only": False}
        config["drives"] = [{**disk, "cache_type": "Writeback"}]
    if setup.vsock is not None:
        config["vsock"] = {"guest_cid": setup.cid, "uds_path": str(setup.vsock)}
    file = folder / "firecracker.json"
    file.write_text(json.dumps(config))
    # By default its log comes in the middle of its guest's lines. It does not make the file.
    (log := folder / "firecracker.log").touch()
    argv = [str(setup.firecracker), "--log-path", str(log), "--no-api", "--config-file", str(file)]
    if setup.kind.is_wrapped:
        argv = [sys.executable, "-m", "offmap", "wrap", "--memory", setup.kind.ram, "--", *argv]
    return argv


def _qemu_clock(offered: bool) -> tuple[str, str]:
    """What makes QEMU offer kvm-clock, or not, exactly as ``offmap run --kvm-clock`` does (offmap.vmm.cpuid).

    Returns:
        To append to its ``-cpu``, and to the guest kernel's command line: without kvm-clock a microvm has no clock that
        its guest could know the frequency of the TSC from.

    Raises:
        OffmapError: KVM does not say how fast its TSC is.
    """
    if offered:
        return "", ""
    # Bits 0, 3 (both kvmclock) and 24 of leaf 0x40000001 (feature_word_info in QEMU's target/i386/cpu.c), no others.
    return ",kvmclock=off,kvmclock-stable-bit=off", f" tsc_early_khz={guest_tsc_khz()} tsc=reliable"


def guest_tsc_khz() -> int:
    """The frequency of a guest's TSC in kHz, which it cannot find out by itself without kvm-clock.

    Raises:
        OffmapError: KVM does not say.
    """
    with Kvm() as kvm, kvm.create_vm() as vm, vm.create_vcpu(0) as vcpu:
        return vcpu.tsc_khz()


def qemu_ranges(pid: int, kind: Kind) -> list[RamRange]:
    """Where a QEMU that `vmm_command` or libvirt started has its guest's RAM."""
    file = f"{DEFAULT_POOL}/" if kind.ram == "pool" else kind.backend.file or _QEMU_MEMFD
    with Process(pid) as process:
        return [
            RamRange(mapping.start, mapping.end - mapping.start, Source.REQUESTED)
            for mapping in process.maps()
            if mapping.path.startswith(file)
        ]
