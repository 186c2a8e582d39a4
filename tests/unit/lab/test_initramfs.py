"""What goes into the initramfs, and what is said when something is missing."""

import marshal
import os
import stat
import subprocess
from pathlib import Path

import pytest

from offmap.lab import initramfs
from offmap.lab.errors import LabError
from offmap.lab.guest_python import AGENT_FOLDER, GuestPython, guest_python
from offmap.lab.initramfs import Initramfs
from offmap.lab.kernel import HostKernel


def test_entries(tmp_path: Path) -> None:
    module = tmp_path / "kvm-amd.ko"
    module.write_bytes(b"module")
    source = tmp_path / "agent.py"
    source.write_text("answer = 42\n")
    python = GuestPython(Path("/opt/a b/python3"), {"opt/a b/python3": module}, {"agent/x/agent.py": source})
    archive = Initramfs(b"init", b"shell", {"needed": [module], "kvm_amd": []}, python)
    entries = {entry.path: entry for entry in archive.entries()}
    assert entries["init"].mode == 0o100755
    assert entries["dev/console"].rdev == (5, 1)
    assert entries["modules/needed"].data == b"kvm-amd.ko\n"
    assert entries["modules/kvm-amd.ko"].data == b"module"
    assert entries["lab.conf"].data == b"PYTHON='/opt/a b/python3'\nAGENT=/agent\n"
    assert entries["opt/a b/python3"].mode == 0o100755
    code = marshal.loads(entries["agent/x/agent.pyc"].data[16:])
    assert "answer" in code.co_names
    names = list(entries)
    assert all(names.index(str(Path(name).parent)) < names.index(name) for name in names if "/" in name)


def test_digest_follows_what_goes_in(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"one")

    def digest(shell: bytes = b"shell", place: str = "python") -> bytes:
        return Initramfs(b"init", shell, {"needed": [file]}, GuestPython(file, {place: file}, {})).digest()

    first = digest()
    assert digest() == first
    assert len({first, digest(b"other"), digest(place="elsewhere")}) == 3
    file.write_bytes(b"two")
    assert digest() != first


def test_the_agent_runs_from_what_is_listed(tmp_path: Path) -> None:
    """The interpreter finds all that the agent imports among the files of the initramfs, and nowhere else."""
    python = guest_python()
    archive = Initramfs(b"", b"", {}, python)
    for entry in archive.entries():
        path = tmp_path / entry.path
        if stat.S_ISDIR(entry.mode):
            path.mkdir(exist_ok=True)
        elif stat.S_ISREG(entry.mode):
            path.write_bytes(entry.data)
            path.chmod(0o755)
    program = f"import sys; sys.path.insert(0, '/{AGENT_FOLDER}'); import offmap.lab.guest.first as first; print(first)"
    argv = ["chroot", str(tmp_path), str(python.interpreter), "-I", "-S", "-c", program]
    if os.geteuid() != 0:
        pytest.skip("not root, so no chroot: whether the agent runs from its own files is not tested")
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"/{AGENT_FOLDER}/offmap/lab/guest/first.pyc" in done.stdout


def test_kernel_without_9p_is_refused(tmp_path: Path) -> None:
    (tmp_path / "modules.dep").write_text("kernel/fs/overlayfs/overlay.ko:\n")
    kernel = HostKernel("test", "6.12", tmp_path / "k", tmp_path)
    with pytest.raises(LabError, match="no module virtio_pci; use a kernel with 9p"):
        initramfs.initramfs(kernel)


def test_dynamic_busybox_is_no_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "busybox"
    fake.write_bytes(b"\x7fELF" + bytes(200) + b"/lib64/ld-linux-x86-64.so.2")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(initramfs, "_BUSYBOX", ())
    with pytest.raises(LabError, match="install busybox-static"):
        initramfs.busybox()
