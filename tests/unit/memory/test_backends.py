"""Backends: what may be asked for, and that nothing of them is left behind. Without /dev/kvm."""

import gc
import mmap
import os
import re
import resource
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from offmap.errors import BackendRefused, KernelError, OffmapError
from offmap.memory import backend as backend_module
from offmap.memory import reserved, secretmem
from offmap.memory.anon import Anon
from offmap.memory.backend import BACKENDS, check_host_has, parse_backend
from offmap.memory.backing import Backing
from offmap.memory.hugetlb import Hugetlb
from offmap.memory.iomem import PhysicalRange
from offmap.memory.memfd import Memfd, map_memfd
from offmap.memory.reserved import Reserved
from offmap.memory.secretmem import Secretmem, memfd_secret, raise_memlock

MIB = 1 << 20
VM: object = None  # no backend that is tested here looks at it


def footprint() -> set[str]:
    """Each open descriptor, mapping of a file of memory, and thread. A test may leave none that was not there before.

    What other tests left may go meanwhile: that is nothing of this one's.
    """
    maps = Path("/proc/self/maps").read_text().splitlines()
    found = {line for line in maps if "memfd:" in line or "secretmem" in line or "/dev/" in line}
    found |= {f"thread {thread.ident} {thread.name}" for thread in threading.enumerate()}
    for fd in os.listdir("/proc/self/fd"):  # noqa: PTH208 - not a folder to walk
        with suppress(FileNotFoundError):  # that of the listing itself
            found.add(f"fd {fd} {Path('/proc/self/fd', fd).readlink()}")
    return found


def mapped(address: int) -> bool:
    lines = (line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines())
    return any(int(start, 16) <= address < int(end, 16) for start, end in lines)


@pytest.mark.parametrize("name", BACKENDS)
def test_every_backend_is_found_by_its_name(name: str) -> None:
    backend = parse_backend(name)
    assert backend.name == name
    assert type(backend) is BACKENDS[name]


def having(fact: Callable[[type[backend_module.Backend]], object]) -> set[str]:
    return {name for name, backend in BACKENDS.items() if fact(backend)}


def test_what_each_backend_is() -> None:
    plain = {"anon", "memfd", "hugetlb", "guest_memfd"}
    assert having(lambda b: not b.hides) == plain
    assert having(lambda b: not b.may_be_aliased) == {"reserved", "unplugged", "pool"}
    assert having(lambda b: b.discards) == {*plain, "guest_memfd-unmapped"}
    assert having(lambda b: b.needs_module) == {"unplugged", "pool", "secretmem-bridge"}
    assert having(lambda b: b.since is None) == {"secretmem", "guest_memfd-unmapped"}
    assert having(lambda b: not b.linux_owned) == {"reserved", "pool"}
    assert having(lambda b: b.page_by_page) == {"secretmem", "secretmem-bridge", "guest_memfd-unmapped"}
    assert having(lambda b: b.file) == {"unplugged"}
    assert BACKENDS["guest_memfd"].in_release((7, 3))
    assert not BACKENDS["guest_memfd"].in_release((6, 12))
    assert not BACKENDS["secretmem"].in_release((7, 3))
    assert BACKENDS["anon"].in_release((6, 1))


def test_each_backend_has_its_row_in_the_documentation() -> None:
    page = (Path(__file__).parents[3] / "docs/backends.md").read_text()
    documented = dict(re.findall(r"^\| `([a-z_-]+).*?` \| (\w+)", page, re.MULTILINE))
    assert documented == {name: "yes" if backend.hides else "no" for name, backend in BACKENDS.items()}


@pytest.mark.parametrize("name", ["anon", "memfd", "secretmem"])
def test_what_is_said_of_giving_pages_back_is_so(name: str) -> None:
    try:
        backing = secretmem.secret_backing(MIB) if name == "secretmem" else BACKENDS[name]().allocate(VM, MIB)[0]  # type: ignore[arg-type]
    except BackendRefused as error:
        pytest.skip(f"{name} memory itself was not tested: {error}")
    with backing:
        if BACKENDS[name].discards:
            backing.view[0] = 1
            backing.discard(0, 4096)
            assert backing.view[0] == 0
        else:
            with pytest.raises(KernelError, match="Operation not supported"):
                backing.discard(0, 4096)


def test_options() -> None:
    huge, fixed = parse_backend("hugetlb,size=1G"), parse_backend("reserved,base=0x60000000")
    assert isinstance(huge, Hugetlb)
    assert huge.page_size == 1 << 30
    assert isinstance(fixed, Reserved)
    assert fixed.base == 0x60000000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no memory backend ''"),
        ("ram", "no memory backend 'ram'; choose one of anon, memfd"),
        ("ANON", "no memory backend"),
        ("anon,", "there is no option ''"),
        ("anon,size", "there is no option 'size'; write anon alone"),
        ("anon,=1", "there is no option '=1'"),
        ("anon,size=1", "--memory anon cannot be 'anon,size=1': there is no option 'size=1'"),
        ("memfd,seal=1", "--memory memfd cannot be"),
        ("secretmem,x=1", "there is no option 'x=1'"),
        ("guest_memfd,x=1", "there is no option 'x=1'"),
        ("hugetlb,size=4K", "hugetlb pages of 4 KiB do not exist"),
        ("hugetlb,size=big", "'big' is not a size"),
        ("hugetlb,pages=3", "its option is size=2M|1G"),
        ("reserved,base=1", "not the address of a page"),
        ("reserved,base=here", "'here' is not a size"),
        ("reserved,start=0x1000", "its option is base=ADDRESS"),
        ("../anon", "no memory backend"),
    ],
)
def test_what_is_asked_for_wrongly_is_one_line(text: str, message: str) -> None:
    with pytest.raises(OffmapError) as caught:
        parse_backend(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_more_than_the_host_has_is_refused_before_it_is_mapped() -> None:
    check_host_has(4096)
    with pytest.raises(BackendRefused, match=r"cannot give 1 TiB of RAM: it has .*--memory-size"):
        check_host_has(1 << 40)
    for backend in (Anon(), Memfd()):
        with pytest.raises(BackendRefused, match="this host cannot give"):
            backend.allocate(VM, 1 << 40)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", [Anon(), Memfd()], ids=["anon", "memfd"])
def test_memory_is_zeroed_writable_and_given_back(backend: backend_module.Backend) -> None:
    before = footprint()
    for _ in range(20):
        (backing,) = backend.allocate(VM, 4 * MIB)  # type: ignore[arg-type]
        address = backing.address
        assert (backing.size, len(backing.view)) == (4 * MIB, 4 * MIB)
        assert bytes(backing.view[:4096]) == bytes(4096)
        backing.view[-5:] = b"guest"
        assert mapped(address)
        assert mapped(address + 4 * MIB - 1)
        backing.close()
        assert not mapped(address)
        backing.close()
    assert footprint() <= before


def test_zero_wipes_all_of_it() -> None:
    with map_memfd("test", 3 * MIB + 4096, os.MFD_CLOEXEC) as backing:
        backing.view[:] = b"\xff" * backing.size
        backing.zero()
        assert bytes(backing.view) == bytes(backing.size)


def test_what_runs_at_the_end_sees_the_memory_and_runs_once() -> None:
    seen: list[bytes] = []

    def on_close(backing: Backing) -> None:
        seen.append(bytes(backing.view[:4]))

    backing = Backing("test", -1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, on_close=on_close)
    backing.view[:4] = b"left"
    backing.close()
    backing.close()
    assert seen == [b"left"]


def test_what_fails_at_the_end_still_unmaps() -> None:
    def on_close(_: Backing) -> None:
        raise KernelError("populating guest RAM", 14)

    before = footprint()
    memfd = os.memfd_create("offmap-test")
    os.ftruncate(memfd, 4096)
    backing = Backing("test", memfd, 4096, guest_memfd=memfd, on_close=on_close)
    address = backing.address
    with pytest.raises(KernelError):
        backing.close()
    assert not mapped(address)
    assert footprint() <= before


def test_a_view_that_is_still_held_keeps_the_mapping_only_as_long() -> None:
    backing = Backing("test", -1, 16 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address, view = backing.address, backing.view[:10]
    backing.close()
    assert bytes(view) == bytes(10)
    view.release()
    del backing, view
    gc.collect()
    assert not mapped(address)


def test_what_cannot_be_mapped_is_one_line_and_leaves_nothing() -> None:
    before = footprint()
    with pytest.raises(KernelError, match=r"mmap of \d+ MiB of test failed: .*; buy more"):
        Backing("test", -1, 1 << 55, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, remedy="buy more")
    with pytest.raises(KernelError, match="ftruncate of test"):
        map_memfd("test", -1, os.MFD_CLOEXEC)
    assert footprint() <= before


def test_hugetlb_refuses_what_is_not_whole_pages_or_not_there() -> None:
    with pytest.raises(BackendRefused, match="not a whole number of huge pages of 2 MiB"):
        Hugetlb().allocate(VM, 3 * MIB)  # type: ignore[arg-type]
    with pytest.raises(BackendRefused, match=r"huge pages"):
        Hugetlb().allocate(VM, 1 << 40)  # type: ignore[arg-type]


# Reserved memory, with a file in the place of /dev/mem.


@pytest.fixture
def memory_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give a file that stands for physical memory, of which 1 to 5 MiB are reserved."""
    device = tmp_path / "mem"
    device.write_bytes(b"\xaa" * (6 * MIB))
    monkeypatch.setattr(reserved, "_DEV_MEM", str(device))
    monkeypatch.setattr(reserved, "reserved_ranges", lambda: [PhysicalRange(MIB, 5 * MIB)])
    return device


def test_reserved_memory_is_zeroed_before_and_after(memory_device: Path) -> None:
    before = footprint()
    (backing,) = Reserved().allocate(VM, 2 * MIB)  # type: ignore[arg-type]
    assert bytes(backing.view) == bytes(2 * MIB)
    backing.view[:] = b"\x55" * (2 * MIB)
    assert memory_device.read_bytes()[2 * MIB : 4 * MIB] == b"\x55" * (2 * MIB), "from the first 2 MiB border on"
    backing.close()
    content = memory_device.read_bytes()
    assert content[2 * MIB : 4 * MIB] == bytes(2 * MIB)
    assert content[: 2 * MIB] + content[4 * MIB :] == b"\xaa" * (4 * MIB), "and not a byte more"
    assert footprint() <= before


def test_reserved_memory_is_shared_out_and_refused_with_the_figures(memory_device: Path) -> None:
    before = footprint()
    (first,) = Reserved().allocate(VM, 2 * MIB)  # type: ignore[arg-type]
    (second,) = Reserved(MIB).allocate(VM, MIB)  # type: ignore[arg-type]
    with pytest.raises(
        BackendRefused, match=r"no 2 MiB .* are free: 4 MiB reserved, 3 MiB of it in use, largest free run 1 MiB"
    ):
        Reserved().allocate(VM, 2 * MIB)  # type: ignore[arg-type]
    with pytest.raises(BackendRefused, match=r"free at 0x100000"):
        Reserved(MIB).allocate(VM, MIB)  # type: ignore[arg-type]
    with pytest.raises(BackendRefused, match=r"free at 0x0"):
        Reserved(0).allocate(VM, MIB)  # type: ignore[arg-type]
    first.close()
    (third,) = Reserved().allocate(VM, 3 * MIB)  # type: ignore[arg-type]
    second.close()
    third.close()
    assert footprint() <= before


def test_reserved_memory_takes_an_unaligned_run_if_there_is_no_other(memory_device: Path) -> None:
    (backing,) = Reserved().allocate(VM, 4 * MIB)  # type: ignore[arg-type]
    backing.view[0] = 0x77
    assert memory_device.read_bytes()[MIB] == 0x77
    backing.close()


def test_a_failed_mapping_gives_the_range_up(memory_device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = footprint()
    monkeypatch.setattr(reserved, "_DEV_MEM", str(memory_device.with_name("none")))
    with pytest.raises(BackendRefused, match=r"open of .*none failed: No such file.*CONFIG_DEVMEM"):
        Reserved().allocate(VM, 4 * MIB)  # type: ignore[arg-type]
    monkeypatch.setattr(reserved, "_DEV_MEM", str(memory_device))
    Reserved().allocate(VM, 4 * MIB)[0].close()  # type: ignore[arg-type]
    assert footprint() <= before


def test_nothing_reserved_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reserved, "reserved_ranges", list)
    with pytest.raises(BackendRefused, match=r"no physical memory reserved for guests; boot it with memmap=\w+\$\w+ "):
        Reserved().allocate(VM, 256 * MIB)  # type: ignore[arg-type]


# memfd_secret.


class Limits:
    """RLIMIT_MEMLOCK of a process that may, or may not, raise its hard limit."""

    def __init__(self, soft: int, hard: int, may_raise: bool) -> None:
        self.now = (soft, hard)
        self.may_raise = may_raise

    def get(self, _: int) -> tuple[int, int]:
        return self.now

    def set(self, _: int, limits: tuple[int, int]) -> None:
        hard = self.now[1]
        soft_wanted, hard_wanted = (1 << 64 if value == resource.RLIM_INFINITY else value for value in limits)
        if soft_wanted > hard_wanted:
            raise ValueError("current limit exceeds maximum limit")
        if hard != resource.RLIM_INFINITY and hard_wanted > hard and not self.may_raise:
            raise ValueError("not allowed to raise maximum limit")
        self.now = limits


INF = resource.RLIM_INFINITY


@pytest.mark.parametrize(
    ("soft", "hard", "may_raise", "size", "enough"),
    [
        (INF, INF, False, 64 * MIB, True),
        (8 * MIB, INF, False, 64 * MIB, True),
        (8 * MIB, 8 * MIB, True, 64 * MIB, True),
        (8 * MIB, 128 * MIB, False, 64 * MIB, True),
        (0, 0, True, MIB, True),
        (8 * MIB, 8 * MIB, False, 8 * MIB, True),
        (8 * MIB, 8 * MIB, False, 8 * MIB + 4096, False),
        (8 * MIB, 8 * MIB, False, 64 * MIB, False),
        (0, 0, False, 4096, False),
    ],
)
def test_memlock_is_raised_or_refused(
    soft: int, hard: int, may_raise: bool, size: int, enough: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = Limits(soft, hard, may_raise)
    monkeypatch.setattr(resource, "getrlimit", limits.get)
    monkeypatch.setattr(resource, "setrlimit", limits.set)
    monkeypatch.setattr(secretmem, "_locked_bytes", lambda: 0)
    if enough:
        raise_memlock(size)
        assert limits.now[0] == INF or limits.now[0] >= size
    else:
        with pytest.raises(BackendRefused, match=r"RLIMIT_MEMLOCK allows .*ulimit -l \d+"):
            raise_memlock(size)
        assert limits.now == (soft, hard)


def test_what_is_locked_already_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = Limits(8 * MIB, 8 * MIB, may_raise=False)
    monkeypatch.setattr(resource, "getrlimit", limits.get)
    monkeypatch.setattr(resource, "setrlimit", limits.set)
    monkeypatch.setattr(secretmem, "_locked_bytes", lambda: 5 * MIB)
    raise_memlock(3 * MIB)
    with pytest.raises(BackendRefused, match="ulimit -l 9216"):
        raise_memlock(4 * MIB)


@pytest.fixture
def has_memfd_secret() -> None:
    """Skip where there is no memfd_secret."""
    try:
        os.close(memfd_secret())
    except BackendRefused as error:
        pytest.skip(f"memfd_secret memory itself was not tested: {error}")


SECRET = """
import resource, sys
from offmap.errors import BackendRefused
from offmap.memory.secretmem import secret_backing
hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
resource.setrlimit(resource.RLIMIT_MEMLOCK, (4096, hard if sys.argv[1] == "soft" else 4096))
try:
    with secret_backing(1 << 20) as backing:
        backing.zero()
        backing.view[-1] = 1
except BackendRefused as error:
    print("refused:", error)
else:
    print("got it")
"""


@pytest.mark.usefixtures("has_memfd_secret")
@pytest.mark.parametrize("limited", ["soft", "hard"])
def test_secret_memory_above_the_limit_is_got_or_refused_but_kills_nobody(limited: str) -> None:
    # In a process of its own, as a limit that was lowered may not be raised again.
    done = subprocess.run([sys.executable, "-c", SECRET, limited], capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.returncode, done.stderr)
    hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
    if limited == "soft" and (hard == INF or hard > 2 * MIB):
        assert done.stdout == "got it\n"
    else:
        assert done.stdout == "got it\n" or "RLIMIT_MEMLOCK" in done.stdout


def test_no_memfd_secret_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secretmem, "SYS_memfd_secret", 100000)  # ENOSYS
    monkeypatch.setattr(secretmem, "raise_memlock", lambda _: None)
    with pytest.raises(BackendRefused, match=r"memfd_secret failed: .*secretmem.enable=1"):
        Secretmem().allocate(VM, 4096)  # type: ignore[arg-type]
