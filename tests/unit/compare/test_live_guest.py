"""The guest's program, run here instead of in a guest: what is commanded over its console is done and told."""

import json
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from offmap.compare import vmm_command as commands
from offmap.compare.guest import READY
from offmap.compare.kinds import Kind, Vmm, kind_of
from offmap.compare.probes import live_guest, network
from offmap.compare.probes.guest_program import ProbeError, guest_program
from offmap.compare.probes.live_guest import LiveGuest
from offmap.compare.vmm_command import GuestSetup, vmm_command
from offmap.errors import BackendRefused, OffmapError

QEMU, FOLDER = kind_of("qemu-unplugged"), Path("/folder")
SETUP = GuestSetup(kind_of("memfd"), Path("/kernel"), Path("/initrd"))


@pytest.fixture
def guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LiveGuest]:
    """Give one whose console is the program's, with what a boot says before it."""
    program = tmp_path / "guest_program"
    program.write_bytes(guest_program())
    program.chmod(0o755)
    script = f'echo "{READY}, Linux 6.12.0"; read -r line; exec {program}'
    monkeypatch.setattr(live_guest, "vmm_command", lambda _setup, _folder: ["sh", "-c", script])
    with LiveGuest(SETUP, tmp_path / "vmm") as live:
        live.boot()
        live.begin()
        yield live


def test_it_boots_and_answers(guest: LiveGuest) -> None:
    assert guest.facts.kernel == "6.12.0"
    assert guest.boot_seconds > 0
    assert guest.is_alive()
    assert [int(cpu) for cpu in guest.command("cpus")[0]] == sorted(os.sched_getaffinity(0))
    assert guest.value("chase 65536 1000") > 0
    assert guest.value("copy 65536 3") >= 0


def test_memory_is_compared_with_what_it_was(guest: LiveGuest) -> None:
    guest.command("fill 65536")
    assert guest.command("check") == [["0", "8192"]]


def test_a_command_that_fails_says_why_and_the_next_is_answered(guest: LiveGuest, tmp_path: Path) -> None:
    with pytest.raises(ProbeError, match="'read' failed: No such file or directory"):
        guest.command(f"read {tmp_path}/nothing 4096")
    with pytest.raises(ProbeError, match="Function not implemented"):
        guest.command("nonsense")
    assert guest.shell("echo one; echo two") == "one\ntwo"
    with pytest.raises(ProbeError):
        guest.shell("exit 3")
    assert guest.is_alive()


def test_a_disk_is_copied_within_itself(guest: LiveGuest, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    data = os.urandom(1 << 20)
    disk.write_bytes(data + bytes(1 << 20))
    try:
        guest.command(f"disk {disk} {1 << 20}")
    except ProbeError as error:
        pytest.skip(f"no direct I/O in {tmp_path}: {error}")
    assert disk.read_bytes() == data + data


def test_bytes_come_back_and_are_taken(guest: LiveGuest) -> None:
    for peer, line in ((network.echo_peer, "echo tcp"), (network.sink_peer, "send")):
        listener = socket.create_server(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        with listener, network.attempt(peer, listener, 300_000) as done:
            guest.command(f"{line} 127.0.0.1 {port}" + (" 300000" if line == "send" else ""))
            assert done.result()


def test_a_guest_that_does_not_call_keeps_nobody_waiting(guest: LiveGuest) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    with listener, pytest.raises(ProbeError), network.attempt(network.echo_peer, listener, 10):
        guest.command("nonsense")


@pytest.mark.parametrize("answer", [lambda _: b"something else", lambda data: data + b"more", lambda data: data[:-1]])
def test_an_echo_that_is_not_the_same_is_seen(answer: Callable[[bytes], bytes]) -> None:
    listener = socket.create_server(("127.0.0.1", 0))

    def liar() -> None:
        with socket.create_connection(listener.getsockname()) as call:
            call.sendall(answer(call.recv(1000, socket.MSG_WAITALL)))

    thread = threading.Thread(target=liar)
    thread.start()
    with listener:
        assert not network.echo_peer(listener, 1000)
    thread.join()


def test_a_vmm_that_ends_ends_all_questions(guest: LiveGuest) -> None:
    with pytest.raises(ProbeError, match="the VMM has ended"):
        guest.command("sh kill $PPID")
    with pytest.raises(ProbeError, match="the VMM has ended"):
        guest.command("clock")
    assert not guest.is_alive()


@pytest.mark.parametrize(
    ("complaint", "error"), [("refused: no such RAM; get some", BackendRefused), ("it broke", OffmapError)]
)
def test_a_vmm_that_does_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, complaint: str, error: type[OffmapError]
) -> None:
    script = f"echo 'offmap run: {complaint}' >&2; exit 2"
    monkeypatch.setattr(live_guest, "vmm_command", lambda _setup, _folder: ["sh", "-c", script])
    with LiveGuest(SETUP, tmp_path) as live, pytest.raises(error, match=complaint.removeprefix("refused: ")) as caught:
        live.boot()
    assert type(caught.value) is error


def test_commands_name_what_the_guest_has() -> None:
    words = vmm_command(
        GuestSetup(
            kind_of("reserved"),
            Path("/kernel"),
            Path("/initrd"),
            disk=Path("/disk"),
            taps=[("of0", "on")],
            vsock=Path("/vsock"),
            balloon=4096,
        ),
        FOLDER,
    )
    text = " ".join(words)
    assert words[:4] == [sys.executable, "-m", "offmap", "run"]
    for part in ("--drive /disk", "--net tap=of0,vhost=on", "--vsock cid=9,path=/vsock", "--balloon size=4096"):
        assert part in text


def test_qemu_maps_the_device_and_has_no_clock_of_kvms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "find_qemu", lambda: "qemu")
    monkeypatch.setattr(commands, "guest_tsc_khz", lambda: 2000000)
    without = " ".join(vmm_command(GuestSetup(QEMU, Path("/kernel"), Path("/initrd")), FOLDER))
    assert "mem-path=/dev/offmap" in without and "share=on" in without
    assert "kvmclock=off" in without and "tsc_early_khz=2000000" in without
    with_it = " ".join(vmm_command(GuestSetup(QEMU, Path("/kernel"), Path("/initrd"), kvm_clock="on"), FOLDER))
    assert "kvmclock=off" not in with_it and "tsc_early_khz" not in with_it


@pytest.mark.parametrize(("kvm_clock", "offered"), [("auto", False), ("off", False), ("on", True)])
def test_qemu_has_the_clock_that_its_row_names(kvm_clock: str, offered: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "guest_tsc_khz", lambda: 2000000)
    monkeypatch.setattr(commands, "find_qemu", lambda: "qemu")
    words = vmm_command(GuestSetup(QEMU, Path("/kernel"), Path("/initrd"), kvm_clock=kvm_clock), FOLDER)
    cpu, command_line = (words[words.index(option) + 1] for option in ("-cpu", "-append"))
    # No more is taken away than offmap's own guests go without (offmap.vmm.cpuid): steal time and the others stay.
    assert cpu == "host,svm=off,vmx=off" + ("" if offered else ",kvmclock=off,kvmclock-stable-bit=off")
    told = "" if offered else " tsc_early_khz=2000000 tsc=reliable"
    assert command_line == f"console=ttyS0 quiet cryptomgr.notests initcall_blacklist=jent_mod_init pci=off{told}"


@pytest.mark.parametrize(("ram", "source"), [("pool", "file"), ("memfd", "memfd")])
def test_libvirt_gets_a_domain_as_documented(ram: str, source: str, tmp_path: Path) -> None:
    setup = GuestSetup(
        Kind(ram, Vmm.LIBVIRT),
        Path("/kernel"),
        Path("/initrd"),
        words="a<b",
        disk=Path("/disk"),
        taps=[("card", "off"), ("fast", "on")],
        vsock=Path("/socket"),
    )
    folder = tmp_path / "guest"
    folder.mkdir()
    argv = vmm_command(setup, folder)
    assert argv[2:] == ["offmap.compare.libvirt_guest", f"{folder}/domain.xml", "guest", f"{folder}/console"]
    domain = ElementTree.parse(folder / "domain.xml").getroot()

    def has(path: str, attribute: str) -> list[str | None]:
        return [element.get(attribute) for element in domain.findall(path)]

    assert has("memoryBacking/source", "type") == [source]
    assert has("clock/timer", "present") == ["no"]
    assert domain.findtext("os/cmdline") == "console=ttyS0 quiet cryptomgr.notests initcall_blacklist=jent_mod_init a<b"
    assert has("devices/disk/source", "file") == ["/disk"]
    assert has("devices/interface/target", "dev") == ["card", "fast"]
    assert has("devices/interface/driver", "name") == ["qemu", "vhost"]
    assert has("devices/vsock/cid", "address") == ["9"]
    vmm_command(replace(setup, kvm_clock="on"), folder)
    assert "present='yes'" in (folder / "domain.xml").read_text().replace('"', "'")


@pytest.mark.parametrize("kind", ["firecracker-anon", "firecracker-unplugged"])
def test_firecracker_runs_by_itself_or_wrapped(kind: str, tmp_path: Path) -> None:
    setup = GuestSetup(
        kind_of(kind),
        Path("/kernel"),
        Path("/initrd"),
        disk=Path("/disk"),
        taps=[("card", "off"), ("fast", "on")],
        vsock=Path("/socket"),
        firecracker=Path("/firecracker"),
        vmlinux=Path("/vmlinux"),
    )
    argv = vmm_command(setup, tmp_path)
    own = argv.index("/firecracker")
    log = ["--log-path", str(tmp_path / "firecracker.log")]
    assert argv[own + 1 :] == [*log, "--no-api", "--config-file", str(tmp_path / "firecracker.json")]
    wrapped = kind == "firecracker-unplugged"
    assert argv[1:own] == (["-m", "offmap", "wrap", "--memory", "unplugged", "--"] if wrapped else [])
    config = json.loads((tmp_path / "firecracker.json").read_text())
    boot = config["boot-source"]
    assert boot["kernel_image_path"] == "/vmlinux"
    assert "tsc" not in boot["boot_args"]  # the wrapper tells a guest without kvm-clock how fast its TSC is
    assert [card["host_dev_name"] for card in config["network-interfaces"]] == ["card"]
    assert config["drives"][0]["path_on_host"] == "/disk"
    assert config["vsock"]["uds_path"] == "/socket"
    choices = {clock: bool(kind_of(kind).clock_refusal(clock)) for clock in ("auto", "on", "off")}
    assert choices == {"auto": False, "on": wrapped, "off": not wrapped}
