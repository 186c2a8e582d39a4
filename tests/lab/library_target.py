"""Run in a disposable host with the module: a guest by the library alone, all of it on a thread that is not the main.

``library_target.py KERNEL INITRD BYTES`` prints JSON: what was said of the guest's RAM, and what `offmap audit` says of
its process while the guest runs.
"""

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import msgspec

from offmap.boot.linux import BootSource
from offmap.hide import Vet
from offmap.machine import Machine
from offmap.memory.secretmem_bridge import SecretmemBridge
from offmap.vmm.config import MachineConfig


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
    found: list[dict[str, Any]] = []
    thread = threading.Thread(target=lambda: found.append(guest(*sys.argv[1:])))
    thread.start()
    thread.join()
    print(json.dumps(found[0]))


if __name__ == "__main__":
    main()
