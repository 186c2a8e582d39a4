"""The initramfs of a disposable host: busybox, the modules it cannot do without, Python, the agent, guest/init.sh.

Nothing of it is cached: composing it takes a quarter of a second, and what does not lie about needs no checking.
"""

import hashlib
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from offmap.lab.cpio import Entry, char_device, directory, newc, regular
from offmap.lab.errors import LabError
from offmap.lab.guest_python import AGENT_FOLDER, GuestPython, byte_code, guest_python
from offmap.lab.kernel import HostKernel
from offmap.lab.modules import ModuleIndex, load_module

# Some are built into some kernels (ModuleIndex knows); a kernel without them is no lab host.
NEEDED = ("virtio_pci", "virtio_console", "9pnet_virtio", "9p", "overlay")
KVM = {"amd": "kvm_amd", "intel": "kvm_intel"}
_BUSYBOX = ("/usr/bin/busybox", "/bin/busybox")
_PT_INTERP = b"/lib64/ld-linux"
_FOLDERS = ("bin", "dev", "proc", "sys", "run", "tmp", "modules", "lower", "upper", "newroot")
_PACKAGES = ("offmap", "offmap/lab")  # empty ones: the agent needs nothing else of offmap


def busybox() -> bytes:
    """Return a statically linked busybox. Raises LabError: there is none."""
    found = shutil.which("busybox")
    for name in (*((found,) if found else ()), *_BUSYBOX):
        path = Path(name)
        if path.is_file():
            data = path.read_bytes()
            if _PT_INTERP not in data[:4096]:
                return data
    raise LabError("no statically linked busybox", "install busybox-static")


@dataclass(frozen=True)
class Initramfs:
    """What the archive is made of.

    Attributes:
        init: the init script.
        shell: the busybox program.
        order: name of a list -> the module files to load for it, in order.
        python: the agent's Python.
    """

    init: bytes
    shell: bytes
    order: Mapping[str, list[Path]]
    python: GuestPython

    def digest(self) -> bytes:
        """Return a SHA-256 of all that goes in, without composing it."""
        digest = hashlib.sha256()

        def add(name: str, data: bytes) -> None:
            digest.update(f"{name} {len(data)}\n".encode() + data)

        add("init", self.init)
        add("shell", self.shell)
        for name, paths in self.order.items():
            for path in paths:
                add(f"{name} {path.name}", path.read_bytes())
        add("python", str(self.python.interpreter).encode())
        for place, path in sorted((self.python.binaries | self.python.sources).items()):
            add(place, path.read_bytes())
        return digest.digest()

    def archive(self) -> bytes:
        """Compose the archive."""
        return newc(self.entries())

    def entries(self) -> list[Entry]:
        """List the archive's entries."""
        entries = [directory(name) for name in _FOLDERS]
        entries.append(char_device("dev/console", 5, 1))  # the kernel opens it for init before anything is mounted
        files = {"bin/busybox": (self.shell, 0o755), "init": (self.init, 0o755)}
        conf = {"PYTHON": str(self.python.interpreter), "AGENT": f"/{AGENT_FOLDER}"}
        files["lab.conf"] = ("".join(f"{name}={shlex.quote(value)}\n" for name, value in conf.items()).encode(), 0o644)
        for name, paths in self.order.items():
            files[f"modules/{name}"] = ("".join(f"{_flat(path)}\n" for path in paths).encode(), 0o644)
            files |= {f"modules/{_flat(path)}": (load_module(path), 0o644) for path in paths}
        files |= {place: (path.read_bytes(), 0o755) for place, path in self.python.binaries.items()}
        for place, path in self.python.sources.items():
            files[f"{place}c"] = (byte_code(path.read_bytes(), f"/{place}"), 0o644)
        for package in _PACKAGES:
            files[f"{AGENT_FOLDER}/{package}/__init__.pyc"] = (byte_code(b"", package), 0o644)
        folders = {str(parent) for place in files for parent in Path(place).parents} - {".", *_FOLDERS}
        entries += [directory(name) for name in sorted(folders)]
        return [*entries, *(regular(place, data, mode) for place, (data, mode) in files.items())]


def initramfs(kernel: HostKernel) -> Initramfs:
    """Find what the archive for ``kernel`` is made of.

    Raises:
        LabError: busybox, a needed module or a part of Python is missing.
    """
    index = ModuleIndex.of(kernel.modules)
    # A kernel without any module index is taken to have all of it built in; its boot will tell.
    order = {"needed": index.load_order(NEEDED) if index else []}
    for vendor, module in KVM.items():
        order[f"kvm_{vendor}"] = index.load_order([module]) if module in index else []
    paths = {name: [kernel.modules / file for file in files] for name, files in order.items()}
    init = Path(__file__).with_name("guest") / "init.sh"
    return Initramfs(init.read_bytes(), busybox(), paths, guest_python())


def _flat(path: Path) -> str:
    return path.name.split(".ko", 1)[0] + ".ko"
