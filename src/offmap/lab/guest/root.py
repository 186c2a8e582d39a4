"""The root file system of a disposable host: this machine's files over 9p, below a writable overlay in memory.

Until it is made nothing in the host depends on this machine's files, nor on what differs from host to host.
"""

import ctypes
import fcntl
import os
import struct
import time

NEW = "/newroot"
_SHARE = "trans=virtio,version=9p2000.L,msize=512000"
MS_RDONLY, MS_BIND, MS_MOVE = 1, 4096, 8192  # linux/mount.h
RNDADDENTROPY = 0x40085203  # linux/random.h: _IOW('R', 0x03, int[2])
RNDRESEEDCRNG = 0x5207  # _IO('R', 0x07)
_POWER_OFF = 0x4321FEDC  # linux/reboot.h: LINUX_REBOOT_CMD_POWER_OFF

_libc = ctypes.CDLL(None, use_errno=True)

# (type, place below the new root, options); a kernel may lack those that are not needed.
_NEEDED = (("proc", "proc", ""), ("sysfs", "sys", ""), ("devtmpfs", "dev", ""))
_WANTED = (
    ("debugfs", "sys/kernel/debug", ""),
    ("tracefs", "sys/kernel/tracing", ""),
    ("cgroup2", "sys/fs/cgroup", ""),
    ("devpts", "dev/pts", "gid=5,mode=620,ptmxmode=666"),
    ("tmpfs", "dev/shm", "mode=1777"),
)
_LINKS = (("/proc/self/fd", "fd"), ("fd/0", "stdin"), ("fd/1", "stdout"), ("fd/2", "stderr"))


class Settings:
    """What the outer end tells a host that waits: text by name.

    ``modules`` and ``out`` are folders of this machine or empty; ``name`` is the host's name; ``entropy`` is
    hexadecimal; ``time`` is in nanoseconds since 1970; ``token`` comes back in the agent's HELLO.
    """

    def __init__(self, payload: bytes) -> None:
        pairs = [string.split(b"=", 1) for string in payload.split(b"\0")[:-1]]
        values = {name.decode(): os.fsdecode(value) for name, value in pairs}
        self.modules = values["modules"]
        self.out = values["out"]
        self.name = values["name"]
        self.token = values["token"]
        self.entropy = bytes.fromhex(values["entropy"])
        self.time = int(values["time"])


def _mount(source: str, target: str, kind: str = "", flags: int = 0, data: str = "") -> None:
    words = [os.fsencode(word) for word in (source, target, kind, data)]
    if _libc.mount(words[0], words[1], words[2], ctypes.c_ulong(flags), words[3]) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"cannot mount {source} at {target}: {os.strerror(error)}")


def personalize(settings: Settings) -> None:
    """Give this host what no other has: random numbers, the time, a name."""
    time.clock_settime_ns(time.CLOCK_REALTIME, settings.time)
    seed = settings.entropy
    random = os.open("/dev/urandom", os.O_WRONLY)
    fcntl.ioctl(random, RNDADDENTROPY, struct.pack("ii", 8 * len(seed), len(seed)) + seed)
    fcntl.ioctl(random, RNDRESEEDCRNG)  # what is drawn from now on depends on the seed
    os.close(random)
    _libc.sethostname(settings.name.encode(), len(settings.name))


def make(settings: Settings) -> None:
    """Make the root file system at `NEW`. Raises OSError: something that it needs cannot be mounted."""
    # Nothing changes below a lab host's feet, so what was read once is kept (cache=loose).
    _mount("offmap-root", "/lower", "9p", MS_RDONLY, f"{_SHARE},cache=loose")
    _mount("tmpfs", "/upper", "tmpfs", 0, "size=75%")
    _make_folder("/upper/data")
    _make_folder("/upper/work")
    _mount("overlay", NEW, "overlay", 0, "lowerdir=/lower,upperdir=/upper/data,workdir=/upper/work")
    os.chdir(NEW)
    for folder in ("proc", "sys", "dev", "run", "tmp"):
        _make_folder(folder)
    for kind, place, options in _NEEDED:
        _mount(kind, place, kind, 0, options)
    for folder in ("dev/pts", "dev/shm"):
        _make_folder(folder)
    for kind, place, options in _WANTED:
        try:
            _mount(kind, place, kind, 0, options)
        except OSError:
            continue
    for target, name in _LINKS:
        try:
            os.symlink(target, f"dev/{name}")  # noqa: PTH211 - pathlib is slow to import here
        except FileExistsError:  # devtmpfs is one, wherever it is mounted
            continue
    _mount("/run", "run", "", MS_MOVE)
    if settings.modules and os.path.isdir(NEW + settings.modules):  # noqa: PTH112 - pathlib is slow to import here
        place = f"lib/modules/{os.uname().release}"
        os.makedirs(place, exist_ok=True)  # noqa: PTH103
        _mount(NEW + settings.modules, place, "", MS_BIND)
    if settings.out:
        # Not cached: what a command has written has left the host, whatever becomes of it, and a full disk is its
        # ENOSPC.
        os.makedirs(NEW + settings.out, exist_ok=True)  # noqa: PTH103
        _mount("offmap-out", NEW + settings.out, "9p", 0, f"{_SHARE},cache=none")


def _make_folder(path: str) -> None:
    if not os.path.isdir(path):  # noqa: PTH112
        os.mkdir(path)  # noqa: PTH102


def enter() -> None:
    """In the first process: put the new root file system into the place of the initramfs."""
    os.chdir(NEW)
    _mount(".", "/", "", MS_MOVE)
    os.chroot(".")
    os.chdir("/")


def power_off() -> None:
    """End the host."""
    os.sync()
    _libc.reboot(_POWER_OFF)
