"""Other people's VMMs, wrapped: their guests on hidden memory, on a stock kernel."""

import json
import sys
from pathlib import Path

import pytest

from offmap.compare.guest import READY
from offmap.lab.host import LabHost
from offmap.lab.provision import host_kernel
from offmap.patience import scaled

from .conftest import soak
from .console import CMDLINE
from .wrapped import OFFMAP, PATIENCE, Started, audit, host, module_host

pytestmark = pytest.mark.lab

__all__ = ["host"]  # a fixture

VMM = [sys.executable, "-m", "tests.lab.wrap_vmm"]
HERE = "/dev/offmap"


def qemu(host: LabHost, memory: str = "-m 256M -M q35") -> list[str]:
    assert host.options.out is not None
    command = f"qemu-system-x86_64 -nodefaults -no-user-config -display none -accel kvm {memory} -cpu host"
    guest = ["-kernel", str(host.kernel.vmlinuz), "-initrd", str(host.options.out / "guest.initramfs")]
    words = f"{CMDLINE} reboot=t"
    return [*command.split(), *guest, "-append", words, "-serial", "mon:stdio"]


def test_an_unmodified_qemu_with_ordinary_memory_is_hidden(host: LabHost) -> None:
    vmm = Started(host, [*OFFMAP, "wrap", "--", *qemu(host)])
    try:
        vmm.await_(f"({READY})")
        pid = int(vmm.await_(r"offmap wrap: process (\d+): HIDDEN: none of the \d+ guest pages of qemu-system-x86"))
        result = audit(host, pid)
        assert (result["verdict"], result["pages"]["direct_map_pages"], result["aliases"]) == ("hidden", 0, [])
        assert result["pages"]["ram_pages"] >= 65536
    finally:
        said = vmm.end()
    assert "refused" not in said


def test_the_same_qemu_without_the_wrapper_is_exposed(host: LabHost) -> None:
    vmm = Started(host, ["sh", "-c", 'echo "pid $$"; exec "$@"', "sh", *qemu(host)])
    try:
        pid = int(vmm.await_(r"^pid (\d+)"))
        vmm.await_(f"({READY})")
        assert audit(host, pid)["verdict"] == "exposed"
    finally:
        vmm.end()


def test_a_shared_file_that_is_vouched_for_and_memory_that_is_plugged_later(host: LabHost) -> None:
    memory = "-object memory-backend-memfd,id=m,size=128M,share=on -M q35,memory-backend=m -m 128M,slots=1,maxmem=512M"
    vmm = Started(host, [*OFFMAP, "wrap", "--", *qemu(host, memory)])
    said = vmm.await_(r"(refused: .* is a shared file, .*--trust-shared)")
    vmm.end()
    vmm = Started(host, [*OFFMAP, "wrap", "--trust-shared", "--", *qemu(host, memory)])
    try:
        vmm.await_(r"HIDDEN: none of the (3\d{4}) guest pages")
        vmm.command.write(b"\x01c")  # to the monitor
        vmm.await_(r"(\(qemu\))")
        vmm.command.write(b"object_add memory-backend-ram,id=more,size=128M\ndevice_add pc-dimm,id=d,memdev=more\n")
        pid = int(vmm.await_(r"process (\d+): HIDDEN: none of the 6\d{4} guest pages"))
        result = audit(host, pid)
        assert (result["verdict"], result["pages"]["ram_pages"] > 64000) == ("hidden", True)
    finally:
        said = vmm.end()
    assert "refused" not in said


def test_a_link_with_the_vmms_name_wraps_it_and_keeps_kvm_clock(host: LabHost) -> None:
    wrap = Path(sys.executable).with_name("offmap-wrap")
    told = '[qemu-system-x86_64]\\nvmm = "/usr/bin/qemu-system-x86_64"\\noptions = ["--kvm-clock=keep"]\\n'
    links = " && ".join(f"ln -s {wrap} /run/bin/{name}" for name in ("qemu-system-x86_64", "vmm"))
    made = f"mkdir -p /etc/offmap /run/bin && printf '{told}' >/etc/offmap/wrap.toml && {links}"
    assert host.run(["sh", "-c", made]) == 0
    done = host.output(["/run/bin/vmm"], timeout=scaled(PATIENCE))
    assert (done.status, "add the table [vmm]" in done.stderr.decode()) == (2, True)
    vmm = Started(host, ["/run/bin/qemu-system-x86_64", *qemu(host)[1:]])
    try:
        assert vmm.await_(r"^offmap-guest: clocksource ([\w-]+)\r?\n") == "kvm-clock"
        vmm.await_(f"({READY})")
        page = vmm.await_(r"EXPOSED: 1 of \d+ .* mapped: the guest's page at (0x\w+), which holds kvm-clock")
        assert int(page, 16) % 4096 == 0
        vmm.command.write(b"echo still $((6 * 7))\n")
        vmm.await_("(still 42)")
    finally:
        assert "it is ended" not in vmm.end()


@pytest.mark.slow
@pytest.mark.parametrize("series", [soak("6.1"), "7.3"])
def test_on_other_kernels(series: str, tmp_path: Path) -> None:
    with module_host(host_kernel(f"debian:{series}"), tmp_path) as host:
        vmm = Started(host, [*OFFMAP, "wrap", "--", *qemu(host)])
        try:
            vmm.await_(r"offmap wrap: process (\d+): HIDDEN: none of the \d+ guest pages of qemu-system-x86")
        finally:
            assert "refused" not in vmm.end()


def test_a_vmm_that_would_get_around_it(host: LabHost) -> None:
    assert host.run([*OFFMAP, "pool", "create", "64M", "--path", "/run/own", "--allow-nested"]) == 0
    vmm = Started(host, [*OFFMAP, "wrap", "--", *VMM])
    try:
        found = json.loads(vmm.await_(r"^(\{.*\})$"))
        pid = found.pop("pid")
        assert found.pop("cpuid").pop("leaves") > 10
        assert found.pop("refused") == dict.fromkeys(
            (
                "userfaultfd",
                "no access",
                "executable",
                "shared memfd",
                "shared anonymous",
                "hole",
                "of the kernel",
                "pinned",
                "a child's",
                "Xen",
                "guest_memfd",
                "KVM_SET_CPUID",
                "int 0x80",
            ),
            "EPERM",
        )
        assert found.pop("kept") == {
            "unmap a part": "EPERM",
            "map over": "EPERM",
            "protect": "EPERM",
            "move": "EPERM",
            "give back": "EINVAL",
            "page out": "EINVAL",
            "punch": "ENODEV",
            "move and leave": "EPERM",
            "exchange": "EPERM",
            "key": "EPERM",
            "pin": "EFAULT",
            "whole": True,
        }
        slots = [
            "anonymous",
            "read-only slot",
            "private file",
            "part of a mapping",
            "two mappings",
            "newer call",
            "dirty log",
        ]
        assert found == {
            "clock": dict.fromkeys(("usual", "behind others", "no CPUID"), "refused"),
            "placed": {**{slot: ["", HERE, True] for slot in slots}, "around it": ["", ""]},
            "zeroed": [True, False],
            "brought": {
                **{file: ["", "EPERM", True, True, "", ""] for file in ("open", "closed")},
                "device": ["EPERM", ""],
            },
            "forked": 1,
            "shared with KVM": [
                *("steal time", "page faults", "end of interrupt"),
                *(f"Hyper-V {what}" for what in ("guest", "hypercalls", "clock", "processor")),
            ],
            "flipped": [""],
        }
        vmm.await_(rf"^(offmap wrap: process {pid}: HIDDEN)")
        # What changes afterwards is audited as well: now the kernel maps a page of it.
        vmm.command.write(b"\n")
        vmm.await_(rf"^(offmap wrap: process {pid}: EXPOSED: 1 of .*; it is ended)")
        assert vmm.command.wait(scaled(PATIENCE)) in {-9, 137}
    finally:
        said = vmm.end()
    for why in (
        "registered with userfaultfd",
        "has pinned memory",
        "a child's, or merged",
        "is a shared file",
        "nothing is mapped",
        "guest_memfd",
        "another ABI",
    ):
        assert why in said


def test_a_vmm_that_closes_its_vm_and_makes_another(host: LabHost) -> None:
    vmm = Started(host, [*OFFMAP, "wrap", "--on-undetermined=kill", "--", *VMM, "again"])
    try:
        found = json.loads(vmm.await_(r"^(\{.*\})$"))
        assert len(set(found.pop("numbers"))) == 1
        assert found == {"told": [False, True], "whole": [True, True], "threads": ["iou", "python\n"]}
        vmm.await_(r"(process \d+: it has no VM any more)$")
    finally:
        assert "it is ended" not in vmm.end()


def test_a_guest_that_runs_without_kvm_is_not_passed_over(host: LabHost) -> None:
    vmm = Started(
        host, [*OFFMAP, "wrap", "--", *(word for word in qemu(host) if word not in {"-cpu", "host", "-accel", "kvm"})]
    )
    try:
        vmm.await_(r"^(offmap wrap: nothing is hidden yet: a guest that runs without KVM)")
    finally:
        vmm.end()


def test_the_same_vmm_without_the_wrapper_is_exposed(host: LabHost) -> None:
    vmm = Started(host, [*VMM, "plain"])
    try:
        found = json.loads(vmm.await_(r"^(\{.*\})$"))
        assert found["placed"] == ["", "", True]
        assert audit(host, found["pid"])["verdict"] == "exposed"
    finally:
        vmm.end()


def test_the_vmm_ends_as_without_a_wrapper(host: LabHost) -> None:
    def ends(*words: str) -> tuple[int, str]:
        done = host.output([*OFFMAP, "wrap", *words], stdin=b"typed", timeout=scaled(PATIENCE))
        return done.status, (done.stdout + done.stderr).decode()

    assert ends("--", "sh", "-c", "cat; exit 37") == (37, "typed")
    assert ends("--", "sh", "-c", "kill -TERM $$")[0] in {-15, 143}
    status, said = ends("--", "no-such-vmm")
    assert (status, "there is no program no-such-vmm" in said) == (2, True)
    status, said = ends("--", *OFFMAP, "wrap", "--", "true")
    assert (status, "start it outside what has the one listener" in said) == (2, True)
    status, said = ends("--memory", "pool", "--", "true")
    assert (status, "make a pool" in said) == (2, True)
    # None of the supervisors stays.
    left = 'cat /proc/[0-9]*/cmdline | tr "\\0" " " | grep -q "[o]ffmap wrap"'
    assert host.run(["sh", "-c", f"while {left}; do sleep 0.1; done"], timeout=scaled(PATIENCE)) == 0
