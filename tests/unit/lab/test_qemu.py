"""QEMU's arguments, sizes, and the choice between KVM and emulation."""

import json
from pathlib import Path

import pytest

from offmap.errors import OffmapError
from offmap.lab import accel
from offmap.lab.errors import LabError
from offmap.lab.kernel import HostKernel
from offmap.lab.qemu import HostOptions, Ram, command_line, parse_size

KERNEL = HostKernel("test", "6.12.1", Path("/k"), Path("/m"))


@pytest.mark.parametrize(
    ("text", "size"),
    [("2G", 2 << 30), ("512M", 512 << 20), ("300", 300 << 20), ("1g", 1 << 30), ("2GiB", 2 << 30)],
)
def test_size(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "1", "64M", "x", "-1G", "65T", "99999999999999G"])
def test_bad_size(text: str) -> None:
    with pytest.raises(OffmapError):
        parse_size(text)


def test_command_line_is_verbatim() -> None:
    options = HostOptions(2 << 30, "memmap=256M$0x60000000", Path("/a,b"))
    argv = command_line("qemu", "/k", "/i", 7, options)
    assert argv[argv.index("-append") + 1].endswith(" memmap=256M$0x60000000")
    assert argv[argv.index("-m") + 1] == f"{2 << 20}k"
    assert "socket,id=agent,fd=7" in argv
    assert "-no-reboot" in argv
    assert "-nodefaults" in argv
    shares = [argv[at + 1] for at, word in enumerate(argv) if word == "-fsdev"]
    assert "path=/," in shares[0]
    assert "readonly=on" in shares[0]
    assert "path=/a,,b," in shares[1]
    assert "-plugin" not in argv
    argv = command_line("qemu", "/k", "/i", 7, HostOptions(2 << 30, plugin="/p.so,x=1"))
    assert argv[argv.index("-plugin") + 1] == "/p.so,x=1"
    argv = command_line("qemu", "/k", "/i", 7, HostOptions(2 << 30, devices=("-device", "pc-dimm,memdev=dimm")))
    assert argv[argv.index("pc-dimm,memdev=dimm") - 1] == "-device"


def test_without_an_output_folder_nothing_can_be_written() -> None:
    argv = command_line("qemu", "/k", "/i", 7, HostOptions(1 << 30))
    shares = [argv[at + 1] for at, word in enumerate(argv) if word == "-fsdev"]
    assert len(shares) == 2
    assert all("readonly=on" in share for share in shares)


@pytest.mark.parametrize(("shared", "word"), [(True, "share=on"), (False, "share=off")])
def test_ram_in_files(shared: bool, word: str) -> None:
    argv = command_line("qemu", "/k", "/i", 7, HostOptions(1 << 30, nodes=2), Ram((11, 12), shared), 13)
    backends = [item for item in argv if item.startswith("memory-backend-file")]
    assert [f"/proc/self/fd/{fd}" in item and word in item for fd, item in zip((11, 12), backends, strict=True)] == [
        True,
        True,
    ]
    assert ("-incoming" in argv) == (not shared)
    assert "socket,id=qmp,fd=13" in argv


def test_nodes_share_all_of_the_memory_in_whole_blocks() -> None:
    argv = command_line("qemu", "/k", "/i", 7, HostOptions(2000 << 20, nodes=3))
    sizes = [int(word.rpartition("=")[2].removesuffix("k")) for word in argv if word.startswith("memory-backend-ram")]
    assert sum(sizes) == 2000 << 10
    assert sizes[1:] == [640 << 10] * 2
    assert [word for word in argv if word.startswith("node,")] == [
        "node,nodeid=0,memdev=node0,cpus=0",
        "node,nodeid=1,memdev=node1",
        "node,nodeid=2,memdev=node2",
    ]
    assert "-numa" not in command_line("qemu", "/k", "/i", 7, HostOptions(1 << 30))


@pytest.mark.parametrize("nodes", [0, -1, 9, 1 << 40])
def test_bad_number_of_nodes(nodes: int) -> None:
    with pytest.raises(LabError):
        HostOptions(64 << 30, nodes=nodes)


def test_too_little_memory_for_its_nodes() -> None:
    with pytest.raises(LabError, match="128M for each"):
        HostOptions(512 << 20, nodes=5)


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with QEMU and something at /dev/kvm."""
    monkeypatch.setenv("OFFMAP_CACHE", str(tmp_path))
    path = tmp_path / "kvm"
    path.touch()
    monkeypatch.setattr(accel, "_DEVICE", path)
    monkeypatch.setattr(accel, "find_qemu", lambda: "/bin/true")
    return path


def test_no_device_means_emulation(device: Path) -> None:
    device.unlink()
    assert accel.choose(KERNEL, lambda: True) == "tcg"


@pytest.mark.parametrize(("works", "choice"), [(True, "kvm"), (False, "tcg")])
def test_probe_is_asked_once(device: Path, works: bool, choice: str) -> None:
    calls: list[int] = []

    def probe() -> bool:
        calls.append(1)
        return works

    assert [accel.choose(KERNEL, probe) for _ in range(3)] == [choice] * 3
    assert len(calls) == 1
    other = HostKernel("test", "6.13.0", Path("/k"), Path("/m"))
    assert [accel.choose(kernel, probe) for kernel in (other, KERNEL)] == [choice] * 2
    assert len(calls) == 2


@pytest.mark.parametrize("content", ["", "{}", "[1]", json.dumps({"boot": "x", "kvm": {"6.12.1 ": True}})])
def test_unreadable_memory_is_asked_again(device: Path, content: str) -> None:
    (device.parent / "accel.json").write_text(content)
    assert accel.choose(KERNEL, lambda: False) == "tcg"
