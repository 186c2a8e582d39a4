"""The initrd of a guest: busybox, the modules of its devices and of its root file system, and init.sh.

It is small because every boot reads it. A module is loaded only if its device is there.
"""

from collections.abc import Iterable
from importlib.resources import files

from offmap.lab.cpio import Entry, char_device, directory, newc, regular
from offmap.lab.initramfs import busybox
from offmap.lab.kernel import HostKernel
from offmap.lab.modules import ModuleIndex, load_module

# Needed by every guest. crc32c is what ext4 asks the kernel for by an alias, for which there is no modprobe here; some
# kernels have it built in, under another name.
BASE = ("virtio_mmio", "virtio_blk", "crc32c_generic", "ext4", "overlay")
_OPTIONAL = frozenset({"crc32c_generic"})

# Device number (virtio 1.2, chapter 5), as Linux writes it in the device's `device` attribute.
DEVICES = {
    "0x0001": ("virtio_net",),
    "0x0003": ("virtio_console",),
    "0x0004": ("virtio_rng",),
    "0x0005": ("virtio_balloon",),
    "0x0013": ("vmw_vsock_virtio_transport",),
}


def guest_initrd(kernel: HostKernel) -> bytes:
    """A cpio archive for `kernel`. It is not compressed: to load more bytes takes less time than to unpack them.

    Raises:
        LabError: busybox, or a module that every guest needs, is missing.
    """
    index = ModuleIndex.of(kernel.modules)
    lists = {"base": index.load_order(name for name in BASE if name not in _OPTIONAL or name in index)}
    for number, names in DEVICES.items():
        lists[f"virtio-{number}"] = index.load_order(name for name in names if name in index)
    modules = {name: load_module(kernel.modules / name) for names in lists.values() for name in names}
    return newc(compose(busybox(), lists, modules))


def compose(shell: bytes, lists: dict[str, list[str]], modules: dict[str, bytes]) -> list[Entry]:
    """The archive's entries.

    Args:
        shell: the busybox program.
        lists: name of a list -> the modules to load for it, in order.
        modules: the content of each, uncompressed.
    """
    scripts = files("offmap.guests")
    folders = ("bin", "dev", "proc", "sys", "modules", "loaded", "lower", "upper", "newroot")
    entries = [directory(name) for name in folders]
    entries.append(char_device("dev/console", 5, 1))  # the kernel opens it for init before anything is mounted
    entries.append(regular("bin/busybox", shell, 0o755))
    entries.append(regular("init", scripts.joinpath("init.sh").read_bytes(), 0o755))
    entries.append(regular("udhcpc", scripts.joinpath("udhcpc.sh").read_bytes(), 0o755))
    entries += [regular(f"modules/{_flat(path)}", data) for path, data in modules.items()]
    entries += [regular(f"modules/{name}", _lines(map(_flat, paths))) for name, paths in lists.items()]
    return entries


def _flat(path: str) -> str:
    return path.rsplit("/", 1)[-1].split(".ko", 1)[0] + ".ko"


def _lines(names: Iterable[str]) -> bytes:
    return "".join(f"{name}\n" for name in names).encode()
