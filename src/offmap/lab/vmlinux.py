"""The ELF kernel of a bzImage, unpacked once into the cache: for VMMs that boot nothing else, as Firecracker."""

from pathlib import Path

from offmap.boot.packed import unpacked
from offmap.lab.cache import cache_folder, sha256_of, write_atomically


def vmlinux_of(kernel: Path) -> Path:
    """The file of the ELF kernel that this bzImage carries.

    Raises:
        OffmapError: the image cannot be read or unpacked.
    """
    path = cache_folder("vmlinux") / sha256_of(kernel)[:16]
    if not path.is_file():
        write_atomically(path, unpacked(kernel))
    return path
