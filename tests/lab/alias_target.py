"""Run in a disposable host: secret memory with a canary in every page, audited with its aliased pages and without.

``alias_target.py KEY MIB`` prints JSON: what ``offmap audit`` says of it both times. A canary is put together in the
memory itself and nowhere else, so that no copy of it stands in this process's heap.
"""

import hashlib
import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterable
from typing import Any

from offmap.audit.canary import PREFIX
from offmap.memory.backing import Backing
from offmap.memory.secretmem import secret_backing

PAGE = 4096


def plant(memory: memoryview, key: bytes, pages: Iterable[int]) -> None:
    """One canary in each of the pages, which tell themselves apart by the nonce (a canary's number has 16 bits)."""
    run = secrets.randbits(64) << 64
    for page in pages:
        ours = b"%04x:%032x" % (page & 0xFFFF, run | page)
        check = hashlib.sha256(b"%s:%s" % (key, ours)).hexdigest().encode()
        at = page * PAGE + 16 * (page % 200)  # anywhere in its page, but not across two
        for part in (PREFIX, ours, b":" + check):
            memory[at : at + len(part)] = part
            at += len(part)


def audit(backing: Backing, key: str, excluded: list[list[int]]) -> Any:
    """What the audit says of it, as the RAM of a guest that does not get what is excluded."""
    slot = {"guest_phys_addr": 0, "memory_size": backing.size, "userspace_addr": backing.address}
    claim = os.memfd_create("offmap-memslots")
    statement = {"schema": "offmap-memslots/1", "slots": [{**slot, "backend": "secretmem"}], "excluded": excluded}
    os.write(claim, json.dumps(statement).encode())
    began = time.monotonic()
    command = [sys.executable, "-m", "offmap", "audit", str(os.getpid()), "--json", "--canary", key]
    done = subprocess.run(command, check=False, capture_output=True)
    os.close(claim)
    print(f"audited in {time.monotonic() - began:.1f} s: {done.stderr.decode()}", file=sys.stderr, flush=True)
    return {**json.loads(done.stdout), "status": done.returncode}


def main() -> None:
    key, size = sys.argv[1], int(sys.argv[2]) << 20
    with secret_backing(size) as backing:
        began = time.monotonic()
        plant(backing.view, key.encode(), range(size // PAGE))
        print(f"planted in {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)
        before = audit(backing, key, [])
        # They are not the guest's then: nothing of it is in them.
        excluded = before["mapped_guest_ranges"]
        for start, length in excluded:
            backing.view[start : start + length] = bytes(length)
        after = audit(backing, key, excluded)
        print(json.dumps({"before": before, "after": after}))


if __name__ == "__main__":
    main()
