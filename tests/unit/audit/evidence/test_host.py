"""What the kernel says of itself: build IDs, modules, IMA."""

import hashlib
import os
import subprocess
from pathlib import Path

import pytest

from offmap.audit.evidence.auditor import auditor, folder_digest
from offmap.audit.evidence.host import build_id, host, loaded_modules, moment
from offmap.errors import KernelError

BUILD = bytes(range(20))
GNU = bytes.fromhex("04000000 14000000 03000000") + b"GNU\0" + BUILD
XEN = bytes.fromhex("04000000 02000000 06000000") + b"Xen\0" + b"ab\0\0"


def write(path: Path, content: bytes | str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name, content in (("random/boot_id", "0e6d\n"), ("tainted", "4096\n")):
        write(tmp_path / "proc/sys/kernel" / name, content)
    write(tmp_path / "proc/cmdline", "quiet a=\x1b[2J\n")
    write(tmp_path / "proc/modules", "kvm 1388544 1 kvm_amd, Live 0x0000000000000000\nplain 1 0 - Live 0x0 (O)\n")
    write(tmp_path / "sys/kernel/notes", XEN + GNU)
    write(tmp_path / "sys/module/kvm/initstate", "live\n")
    write(tmp_path / "sys/module/kvm/notes/.note.gnu.build-id", GNU)
    write(tmp_path / "sys/module/shy/initstate", "live\n")  # /proc/modules does not have it
    write(tmp_path / "sys/module/printk/parameters/time", "Y")  # part of the kernel
    return tmp_path


def test_build_id() -> None:
    assert build_id(XEN + GNU) == BUILD.hex()
    assert build_id(XEN) is None and build_id(b"") is None and build_id(GNU[:-1]) is None


def test_modules_of_both_lists(tree: Path) -> None:
    found = loaded_modules(tree / "sys", tree / "proc")
    assert found == {"kvm": BUILD.hex(), "plain": None, "shy": None}


def test_host(tree: Path) -> None:
    found = host(tree / "sys", tree / "proc")
    assert (found.kernel_build_id, found.boot_id, found.taint) == (BUILD.hex(), "0e6d", 4096)
    assert (found.lockdown, found.ima, found.ima_measurements) == (None, "unknown", None)
    assert found.command_line == "quiet a=\\x1b[2J"


def test_ima_and_lockdown(tree: Path) -> None:
    security = tree / "sys/kernel/security"
    write(security / "lockdown", "none [integrity] confidentiality\n")
    found = host(tree / "sys", tree / "proc")
    assert (found.lockdown, found.ima) == ("integrity", "absent")
    for count, ima in ((1, "boot only"), (500, "measures")):
        write(security / "ima/runtime_measurements_count", f"{count}\n")
        found = host(tree / "sys", tree / "proc")
        assert (found.ima, found.ima_measurements) == (ima, count)


def test_without_procfs(tmp_path: Path) -> None:
    with pytest.raises(KernelError, match="boot_id"):
        host(tmp_path, tmp_path)


def test_this_host() -> None:
    found = host()
    assert found.kernel == os.uname().release
    assert moment().uptime_ms > 0


def test_auditor_digest_is_what_sha256sum_says(tmp_path: Path) -> None:
    write(tmp_path / "b.py", "b")
    write(tmp_path / "a/c.py", "c")
    write(tmp_path / "a/__pycache__/c.pyc", "no")
    files = subprocess.run(["sha256sum", "a/c.py", "b.py"], cwd=tmp_path, capture_output=True, check=True).stdout
    assert folder_digest(tmp_path) == hashlib.sha256(files).hexdigest()
    assert len(auditor().digest) == 64
