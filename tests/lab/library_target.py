"""Run in a disposable host with the module: a guest by the library alone, all of it on a thread that is not the main.

``library_target.py KERNEL INITRD BYTES`` prints JSON: what was said of the guest's RAM, and what `offmap audit` says of
its process while the guest runs.
"""

import ctypes
import json
import mmap
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import msgspec

from offmap.audit.pagemap import own_entries, pfn
from offmap.boot.linux import BootSource
from offmap.hide import Vet
from offmap.machine import Machine
from offmap.memory.secretmem_bridge import SecretmemBridge
from offmap.uapi.page import PAGE_SIZE
from offmap.vmm.config import MachineConfig

MIB = 1 << 20
MOST = 64  # addresses that one file of /dev/offmap-alias takes


def leave_aliases() -> list[int]:
    """Have the kernel map pages all over the host's free memory once more, so that a guest is given some of them.

    They stand together, as those of its image do: else no kernel would find 56 MiB without one.

    Returns:
        Open files; the mappings go with them.
    """
    available = int(Path("/proc/meminfo").read_text().partition("MemAvailable:")[2].split()[0]) << 10
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
    size = (available - 200 * MIB) // MIB * MIB
    with mmap.mmap(-1, size, flags=flags) as memory:
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        files = []
        for at in range(0, len(memory), 32 * MIB):
            files.append(os.open("/dev/offmap-alias", os.O_WRONLY))
            pages = (hex(frame * PAGE_SIZE) for frame in pfn(own_entries(address + at, MOST)).tolist())
            os.write(files[-1], f"loose {' '.join(pages)}".encode())
    return files


def guest(kernel: str, initrd: str, size: str) -> dict[str, Any]:
    source = BootSource(Path(kernel), Path(initrd), "console=ttyS0 quiet panic=-1")
    up = threading.Event()
    said: list[str] = []
    config = MachineConfig(source, SecretmemBridge(), int(size), vetting=Vet())
    with Machine(config, lambda _: None, on_open=up.set, say=said.append) as machine:
        machine.start()
        paused = 0
        while not up.wait(0.2):
            paused += machine.pause()
            machine.resume()
        command = [sys.executable, "-m", "offmap", "audit", str(machine.pid), "--json"]
        audited = subprocess.run(command, capture_output=True, check=False)
        return {
            "said": said,
            "paused": paused,
            "ram": msgspec.to_builtins(machine.ram),
            "stopped": machine.stopped is not None,
            "audit": json.loads(audited.stdout),
        }


def main() -> None:
    leave_aliases()
    found: list[dict[str, Any]] = []
    thread = threading.Thread(target=lambda: found.append(guest(*sys.argv[1:])))
    thread.start()
    thread.join()
    print(json.dumps(found[0]))


if __name__ == "__main__":
    main()
