"""What is concluded from an access log, on logs written as the plugin writes them; and where the plugin comes from."""

import hashlib
import io
import tarfile
import tomllib
from pathlib import Path

import numpy as np
import pytest

import offmap
from offmap.lab import access_log, access_plugin, qemu_header
from offmap.lab.access_log import AccessLog, EarlySite, Symbols
from offmap.lab.errors import LabError
from offmap.lab.host import LabHost
from offmap.lab.kernel import HostKernel

ROOT = Path(offmap.__file__).parents[2]
KALLSYMS = """ffffffff81000000 T _text
ffffffff81000100 t clear_page_rep
ffffffff81000200 D jiffies
ffffffffc0000000 t alias_read\t[offmap_alias]
"""
ALIAS_READ = 0xFFFFFFFFC0000010
CLEAR_PAGE = 0xFFFFFFFF8100010B


class Written:
    """A log of `frames` frames, with four sites, that a test fills in."""

    def __init__(self, path: Path, frames: int = 64) -> None:
        path.write_bytes(bytes(4096 + 4 * 64 + frames * 64))
        data = np.memmap(path, mode="r+")
        self.header = data[: access_log._HEADER.itemsize].view(access_log._HEADER)
        self.sites = data[4096 : 4096 + 256].view(access_log._SITE)
        self.frames = data[4096 + 256 :].view(access_log._FRAME)
        self.say(magic=b"offmapal", format=1, frames=frames, sites=4, generation=1, vmruns=9, vmexits=9, host=1000)

    def say(self, **values: int | bytes) -> None:
        for name, value in values.items():
            self.header[name] = value

    def frame(self, number: int, **values: int) -> None:
        for name, value in {"generation": 1, **values}.items():
            self.frames[number][name] = value


@pytest.fixture
def written(tmp_path: Path) -> Written:
    """Give a log that is sound and holds nothing."""
    return Written(tmp_path / "log")


@pytest.fixture
def log(written: Written, tmp_path: Path) -> AccessLog:
    """Give the same, opened."""
    return AccessLog(tmp_path / "log")


def test_accesses_before_after_and_between(written: Written, log: AccessLog) -> None:
    written.frame(3, guest=5, during=2, tail=1, tail_vmrun=8, rip=ALIAS_READ, vaddr=0x10)  # all before the last entry
    written.frame(4, guest=5, during=2, tail=7, tail_vmrun=9)  # seven after it
    written.frame(5, guest=5, early=512, early_rip=CLEAR_PAGE)
    written.frame(6, during=4, tail=1, tail_vmrun=9, rip=CLEAR_PAGE)  # no guest's
    report = log.report(Symbols(KALLSYMS))
    assert (report.during, report.during_frames, report.after) == (5, 2, 7)
    assert (report.early, report.early_frames, report.guest_frames) == (512, 1, 3)
    assert report.early_sites == (EarlySite(CLEAR_PAGE, "clear_page_rep+0xb", 1, 512, 5 << 12),)
    assert list(log.guest_pfns()) == [3, 4, 5]


def test_a_frame_that_somebody_names_counts_untouched(written: Written, log: AccessLog) -> None:
    written.frame(6, during=4, tail=1, tail_vmrun=9, rip=CLEAR_PAGE)
    report = log.report(Symbols(KALLSYMS), pfns=[6, 7, 1 << 40])
    assert (report.early, report.early_frames, report.during, report.after) == (4, 1, 0, 1)
    assert [site.symbol for site in report.early_sites] == ["clear_page_rep+0xb"]
    assert log.report().early == 0


def test_sites_are_told_with_their_place(written: Written, log: AccessLog) -> None:
    for name, value in {"rip": ALIAS_READ, "during": 3, "tail": 2, "tail_vmrun": 9, "stores": 1}.items():
        written.sites[2][name] = value
    written.sites[2]["frame"], written.sites[2]["vaddr"] = 7, 0xFFFF888000001234
    (site,) = log.report(Symbols(KALLSYMS)).sites
    assert (site.symbol, site.during, site.after, site.stores) == ("alias_read+0x10 [offmap_alias]", 3, 2, 1)
    assert (site.pa, site.va) == (0x7234, 0xFFFF888000001234)


def test_begin_forgets(written: Written, log: AccessLog) -> None:
    written.frame(3, guest=5, during=2)
    log.begin()
    assert written.header["generation"] == 2
    written.say(vmruns=12, vmexits=12)
    report = log.report()
    assert (report.during, report.guest_frames, report.entries) == (0, 0, 3)
    written.frame(4, generation=2, guest=1, during=1)
    assert log.report().during == 1


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"mismatches": 2}, "taken for each other"),
        ({"lost": 1}, "not known"),
        ({"vmexits": 7}, "do not match"),
        ({"vmexits": 10}, "do not match"),
        ({"host": 0}, "no access of the host's kernel"),
    ],
)
def test_unsound(written: Written, log: AccessLog, values: dict[str, int], why: str) -> None:
    assert log.report().unsound == ""
    written.say(**values)
    report = log.report()
    assert why in report.unsound and report.headline() == f"the access log shows nothing: {report.unsound}"


def test_a_running_guest_is_sound(written: Written, log: AccessLog) -> None:
    written.say(vmexits=8)
    assert log.report().unsound == ""


def test_no_guest_is_said(written: Written, log: AccessLog) -> None:
    written.say(vmruns=0, vmexits=0)
    assert log.report().headline() == "the access log shows no guest"


def test_frames_above_the_gap(tmp_path: Path) -> None:
    # 3 GiB on q35: the third one starts at 4 GiB.
    written = Written(tmp_path / "log", frames=3 << 18)
    written.frame(0x7FFFF, guest=1)
    written.frame(0x80000, guest=1)
    log = AccessLog(tmp_path / "log")
    assert list(log.guest_pfns()) == [0x7FFFF, 0x100000]
    written.frame(0x80001, during=3, rip=1)
    assert log.report(pfns=[0x100001]).early == 3
    assert log.report(pfns=[0x80001]).early == 0, "a page of the gap"


@pytest.mark.parametrize("content", [b"", b"x" * 8192, b"offmapal" + bytes(8192)])
def test_no_log(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "log").write_bytes(content)
    with pytest.raises(LabError):
        AccessLog(tmp_path / "log")


def test_symbols() -> None:
    symbols = Symbols(KALLSYMS)
    assert symbols.name(0xFFFFFFFF81000000) == "_text+0x0"
    assert symbols.name(0xFFFFFFFF81000250) == "clear_page_rep+0x150", "data is no code"
    assert symbols.name(0x1000) == ""


def tarball(path: Path, **members: str) -> Path:
    with tarfile.open(path, "w:xz") as archive:
        for name, text in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text.encode()))
    return path


def test_the_header_comes_out_of_the_source_package(tmp_path: Path) -> None:
    tars = [
        tarball(tmp_path / "d.tar.xz", **{"debian/patches/a": "+++ b/include/qemu/plugin.h\n"}),
        tarball(tmp_path / "o.tar.xz", **{"qemu-7.2/README": "x", "qemu-7.2/include/qemu/qemu-plugin.h": "HEADER"}),
    ]
    assert qemu_header._find_header(tars) == b"HEADER"
    with pytest.raises(LabError, match="holds no"):
        qemu_header._find_header(tars[:1])


def test_a_header_that_the_distribution_patches_is_refused(tmp_path: Path) -> None:
    tars = [
        tarball(tmp_path / "d.tar.xz", **{"debian/patches/a": "+++ b/include/qemu/qemu-plugin.h\n"}),
        tarball(tmp_path / "o.tar.xz", **{"qemu-7.2/include/qemu/qemu-plugin.h": "HEADER"}),
    ]
    with pytest.raises(LabError, match="changed by a"):
        qemu_header._find_header(tars)


def test_a_cut_tarball_is_an_error_of_one_line(tmp_path: Path) -> None:
    path = tarball(tmp_path / "o.tar.xz", **{"qemu-7.2/include/qemu/qemu-plugin.h": "HEADER"})
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(LabError, match=r"cannot read o\.tar\.xz"):
        qemu_header._find_header([path])


def test_a_damaged_header_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "qemu-plugin.h").write_text("HEADER")
    assert not qemu_header._intact(tmp_path)
    digest = hashlib.sha256(b"HEADER").hexdigest()
    (tmp_path / "record.json").write_text(f'{{"sha256": "{digest}"}}')
    assert qemu_header._intact(tmp_path)
    (tmp_path / "qemu-plugin.h").write_text("other")
    assert not qemu_header._intact(tmp_path)


def test_wheels_hold_the_plugin() -> None:
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    packaged = {Path(path).name for path in wheel["force-include"] if path.startswith("qemu/")}
    assert packaged == {path.name for path in access_plugin.plugin_source().parent.iterdir()}


def test_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access_plugin, "access_plugin", lambda: Path("/a,b.so"))
    log = tmp_path / "log"
    assert access_plugin.plugin_argument(log, 2 << 30) == f"/a,,b.so,log={log},frames={2 << 18}"
    assert log.read_bytes() == b""
    with pytest.raises(LabError, match="cannot write"):
        access_plugin.plugin_argument(tmp_path / "none/log", 2 << 30)


@pytest.mark.parametrize("options", [{"accel": "kvm"}, {"accel": "icount"}, {"nodes": 2}])
def test_only_an_emulated_host_of_one_node_is_logged(tmp_path: Path, options: dict[str, str | int]) -> None:
    kernel = HostKernel("test", "6.12.1", Path("/k"), Path("/m"))
    with pytest.raises(LabError, match="one NUMA node"):
        LabHost.start(kernel, access_log=tmp_path / "log", **options)  # type: ignore[arg-type]
