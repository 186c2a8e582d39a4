"""The initramfs of a disposable host: busybox, the modules it cannot do without, and guest/init.sh.

Nothing of it is cached: composing it takes a quarter of a second, and what does not lie about needs no checking.
"""

import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path

from offmap.lab.cpio import Entry, char_device, directory, newc, regular
from offmap.lab.errors import LabError
from offmap.lab.kernel import HostKernel
from offmap.lab.modules import ModuleIndex, load_module

__all__ = ["KVM", "NEEDED", "busybox", "compose", "initramfs"]

# Some are built into some kernels (ModuleIndex knows); a kernel without them is no lab host.
NEEDED = ("virtio_pci", "virtio_console", "9pnet_virtio", "9p", "overlay")
KVM = {"amd": "kvm_amd", "intel": "kvm_intel"}
_BUSYBOX = ("/usr/bin/busybox", "/bin/busybox")
_PT_INTERP = b"/lib64/ld-linux"


def busybox() -> bytes:
    """Return a statically linked busybox.

    Raises:
        LabError: there is none.
    """
    found = shutil.which("busybox")
    for name in (*((found,) if found else ()), *_BUSYBOX):
        path = Path(name)
        if path.is_file():
            data = path.read_bytes()
            if _PT_INTERP not in data[:4096]:
                return data
    raise LabError("no statically linked busybox", "install busybox-static")


def initramfs(kernel: HostKernel, settings: Mapping[str, str]) -> bytes:
    """Compose the archive for ``kernel``; ``settings`` become shell variables of the init script.

    Raises:
        LabError: busybox or a needed module is missing.
    """
    index = ModuleIndex.of(kernel.modules)
    # A kernel without any module index is taken to have all of it built in; its boot will tell.
    order = {"needed": index.load_order(NEEDED) if index else []}
    for vendor, module in KVM.items():
        order[f"kvm_{vendor}"] = index.load_order([module]) if module in index else []
    files = {name: load_module(kernel.modules / name) for names in order.values() for name in names}
    init = Path(__file__).with_name("guest") / "init.sh"
    return newc(compose(init.read_bytes(), busybox(), order, files, settings))


def compose(
    init: bytes,
    shell: bytes,
    order: Mapping[str, list[str]],
    modules: Mapping[str, bytes],
    settings: Mapping[str, str],
) -> list[Entry]:
    """List the archive's entries.

    Args:
        init: the init script.
        shell: the busybox program.
        order: name of a list -> the modules to load for it, in order.
        modules: the content of each, uncompressed.
        settings: shell variables.
    """
    folders = ("bin", "dev", "proc", "sys", "modules", "lower", "upper", "newroot")
    entries = [directory(name) for name in folders]
    entries.append(char_device("dev/console", 5, 1))  # the kernel opens it for init before anything is mounted
    entries.append(regular("bin/busybox", shell, 0o755))
    entries.append(regular("init", init, 0o755))
    conf = "".join(f"{name}={shlex.quote(value)}\n" for name, value in sorted(settings.items()))
    entries.append(regular("lab.conf", conf.encode()))
    for path, data in modules.items():
        entries.append(regular(f"modules/{_flat(path)}", data))
    for name, paths in order.items():
        entries.append(regular(f"modules/{name}", "".join(f"{_flat(path)}\n" for path in paths).encode()))
    return entries


def _flat(path: str) -> str:
    return path.rsplit("/", 1)[-1].split(".ko", 1)[0] + ".ko"
