"""A cached kernel is checked, never trusted; a kernel file is looked at before it is booted."""

import hashlib
import json
import struct
from pathlib import Path

import pytest

from offmap.lab import apt, kernel_tree, provision
from offmap.lab.cache import replace_folder
from offmap.lab.errors import LabError
from offmap.lab.kernel import image_release

RELEASE = "6.12.9-amd64"


def image(release: str = RELEASE, length: int = 4096) -> bytes:
    """The smallest thing that has the boot header of a bzImage."""
    head = bytearray(1024)
    head[0x1F1] = 1
    struct.pack_into("<I", head, 0x1F4, (length - 1024) // 16)
    head[0x1FE:0x200] = b"\x55\xaa"
    head[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", head, 0x20E, 0x100)
    head[0x300 : 0x300 + len(release) + 6] = f"{release} (x) \0".encode()[: len(release) + 6]
    return bytes(head) + bytes(length - 1024)


def tree(root: Path) -> Path:
    """An unpacked kernel with its manifest."""
    modules = root / "lib/modules" / RELEASE
    modules.mkdir(parents=True)
    (root / "boot").mkdir()
    (root / "boot" / f"vmlinuz-{RELEASE}").write_bytes(image())
    (root / "boot" / f"config-{RELEASE}").write_text("CONFIG_KVM=m\n")
    (modules / "modules.dep").write_text("")
    (modules / "kvm.ko").write_bytes(b"module")
    kernel_tree.write_manifest(root, kernel_tree.used_files(root, RELEASE))
    return root


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OFFMAP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_whole_tree_is_accepted(tmp_path: Path) -> None:
    assert kernel_tree.damaged(tree(tmp_path / "t")) == ""


@pytest.mark.parametrize("name", [f"boot/vmlinuz-{RELEASE}", f"lib/modules/{RELEASE}/kvm.ko"])
def test_changed_file_is_noticed(tmp_path: Path, name: str) -> None:
    root = tree(tmp_path / "t")
    data = (root / name).read_bytes()
    (root / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert name in kernel_tree.damaged(root)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"sha256": {}}', '{"sha256": 3}'])
def test_bad_manifest_is_damage(tmp_path: Path, content: str) -> None:
    root = tree(tmp_path / "t")
    (root / kernel_tree.MANIFEST).write_text(content)
    assert kernel_tree.damaged(root)


def test_warm_cache_needs_no_apt(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(cache / "kernels/debian-6.12/tree")
    monkeypatch.setattr(apt, "have_apt", lambda: False)
    kernel = provision.host_kernel("debian:6.12")
    assert (kernel.release, kernel.vmlinuz.name) == (RELEASE, f"vmlinuz-{RELEASE}")


def test_tampered_cache_is_not_used(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tree(cache / "kernels/debian-6.12/tree")
    (root / f"boot/vmlinuz-{RELEASE}").write_bytes(b"evil")
    monkeypatch.setattr(apt, "have_apt", lambda: False)
    with pytest.raises(LabError, match=r"no apt-get.*--host-kernel"):
        provision.host_kernel("debian:6.12")


def test_tampered_package_is_downloaded_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, name = cache / "kernels/debian-6.12", f"linux-image-{RELEASE}_6.12.9-1_amd64.deb"
    debs = store / "packages"
    debs.mkdir(parents=True)
    (debs / name).write_bytes(b"evil")
    (debs / provision.RECORD).write_text(json.dumps({name: "0" * 64}))
    good = b"good package"
    calls: list[str] = []
    told: list[str] = []

    def download(_view: apt.AptView, package: apt.Package, folder: Path) -> Path:
        calls.append(package.name)
        (folder / name).write_bytes(good)
        return folder / name

    def unpack(files: list[Path], folder: Path) -> None:
        assert [deb.read_bytes() for deb in files] == [good]
        replace_folder(tree(store / "new"), folder)

    package = apt.Package(f"linux-image-{RELEASE}", "6.12.9-1", hashlib.sha256(good).hexdigest())
    monkeypatch.setattr(apt, "views", lambda _series, _folder: [apt.AptView("test", ())])
    monkeypatch.setattr(apt, "find_kernel", lambda _view, _series: (package,))
    monkeypatch.setattr(apt, "download", download)
    monkeypatch.setattr(apt, "have_apt", lambda: True)
    monkeypatch.setattr(provision, "_unpack", unpack)
    provision.host_kernel("debian:6.12", downloaded=told.append)
    provision.host_kernel("debian:6.12", downloaded=told.append)
    assert (calls, told) == ([package.name], [RELEASE])
    # The leftover of an interrupted run does not stay, and a good package is not downloaded again.
    (store / "tree" / kernel_tree.MANIFEST).write_text("")
    (store / ".tree.leftover").mkdir()
    provision.host_kernel("debian:6.12")
    assert calls == [package.name]
    assert not list(store.glob(".tree.*"))


def test_download_that_is_not_what_was_promised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(_self: apt.AptView, *_command: str, cwd: Path) -> str:
        (cwd / "x.deb").write_bytes(b"evil")
        return ""

    monkeypatch.setattr(apt.AptView, "run", run)
    with pytest.raises(LabError, match="not what apt's index promised"):
        apt.download(apt.AptView("test", ()), apt.Package("linux-image", "1", "0" * 64), tmp_path)


SEARCH = """\
linux-image-6.12.101+deb12-amd64 - Linux 6.12 for 64-bit PCs (signed)
linux-image-6.12.117+deb12-amd64 - Linux 6.12 for 64-bit PCs (signed)
linux-image-6.12.118+deb12-cloud-amd64 - Linux 6.12 for x86-64 cloud (signed)
linux-image-6.12.118+deb12-rt-amd64 - Linux 6.12 for 64-bit PCs (signed), PREEMPT_RT
"""


def test_newest_generic_kernel_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(_self: apt.AptView, *command: str, cwd: Path | None = None) -> str:
        if command[1] == "search":
            return SEARCH
        stanzas = [
            f"Package: {name}\nVersion: {name[12:19]}-1\nDescription: x\n more: y\nSHA256: aa\n" for name in command[3:]
        ]
        return "\n".join(stanzas)

    monkeypatch.setattr(apt.AptView, "run", run)
    monkeypatch.setattr(apt, "_is_newer", lambda one, other: one > other)
    found = apt.find_kernel(apt.AptView("test", ()), "6.12")
    assert [package.name for package in found] == ["linux-image-6.12.117+deb12-amd64"]


def test_image_and_modules_in_packages_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    release, version = "7.3.4+deb13-amd64", "7.3.4-1~bpo13+1"
    parts = [f"linux-{part}-{release}" for part in ("base", "binary", "modules")]
    depends = ", ".join(["linux-initramfs-tool", *(f"{part} (= {version})" for part in parts)])

    def run(_self: apt.AptView, *command: str, cwd: Path | None = None) -> str:
        if command[1] == "search":
            return f"linux-image-{release} - Linux\n"
        names = [word.split("=")[0] for word in command[2:] if not word.startswith("--")]
        stanza = "Package: {}\nVersion: {}\nSHA256: aa\nDepends: {}\n"
        return "\n".join(stanza.format(name, version, depends) for name in names)

    monkeypatch.setattr(apt.AptView, "run", run)
    found = apt.find_kernel(apt.AptView("test", ()), "7.3")
    assert [package.name for package in found] == [f"linux-image-{release}", *parts]


def test_stanza_without_a_digest_is_left_out() -> None:
    assert apt.parse_packages("Package: a\nVersion: 1\n") == []


@pytest.mark.parametrize("spec", ["debian:", "debian:6", "debian:../x", "debian:6.12-rt"])
def test_bad_series(cache: Path, spec: str) -> None:
    with pytest.raises(LabError, match="names no kernel series"):
        provision.host_kernel(spec)


def test_release_of_an_image(tmp_path: Path) -> None:
    path = tmp_path / "bzImage"
    path.write_bytes(image())
    assert image_release(path) == RELEASE
    (tmp_path / "lib/modules" / RELEASE).mkdir(parents=True)
    kernel = provision.host_kernel(str(path))
    assert kernel.modules == tmp_path / "lib/modules" / RELEASE


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no x86 Linux kernel"),
        (bytes(4096), "no x86 Linux kernel"),
        (image()[:-1], "cut short"),
        (None, "cannot read"),
    ],
)
def test_what_is_no_kernel(tmp_path: Path, content: bytes | None, reason: str) -> None:
    path = tmp_path / "bzImage"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(LabError, match=reason):
        provision.host_kernel(str(path))
