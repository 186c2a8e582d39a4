"""The numbers and structures of tap, vhost and the virtio devices, compared with the installed headers."""

import ctypes
import re
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from offmap.uapi import if_tun, vhost
from offmap.uapi.virtio import balloon, console, net, vsock

HEADERS = """
#include <stddef.h>
#include <stdio.h>
#include <linux/if.h>
#include <linux/if_ether.h>
#include <linux/if_tun.h>
#include <linux/sockios.h>
#include <linux/vhost.h>
#include <linux/virtio_balloon.h>
#include <linux/virtio_console.h>
#include <linux/virtio_net.h>
#include <linux/virtio_vsock.h>
#include <sys/socket.h>
#include <linux/vm_sockets.h>
"""

MODULES = (if_tun, vhost, balloon, console, net, vsock)

LONGER = {"virtio_net_config", "vhost_memory"}  # in the header: what we declare is their beginning

PACKED = {
    "virtio_vsock_hdr": (vsock.VIRTIO_VSOCK_HDR.format, vsock.virtio_vsock_hdr._fields),
    "virtio_console_config": (
        console.VIRTIO_CONSOLE_CONFIG.format,
        ("cols", "rows", "max_nr_ports", "emerg_wr"),
    ),
    "virtio_console_control": (console.VIRTIO_CONSOLE_CONTROL.format, ("id", "event", "value")),
}


def questions() -> Iterator[tuple[str, int]]:
    """Each C expression with what we say it is."""
    for module in MODULES:
        yield from ((name, value) for name, value in public(module))
        for name, value in vars(module).items():
            if not (isinstance(value, type) and issubclass(value, ctypes.Structure) and name.startswith("virtio_")):
                continue
            if name not in LONGER:
                yield f"sizeof(struct {name})", ctypes.sizeof(value)
            for field, *_ in value._fields_:
                yield f"offsetof(struct {name}, {field})", getattr(value, field).offset
                yield f"sizeof(((struct {name} *)0)->{field})", getattr(value, field).size
    yield "offsetof(struct ifreq, ifr_flags)", if_tun.ifreq.ifru_flags.offset
    yield "offsetof(struct ifreq, ifr_addr)", if_tun.ifreq.ifru_addr.offset
    yield "sizeof(((struct ifreq *)0)->ifr_addr)", if_tun.ifreq.ifru_addr.size
    yield "offsetof(struct ifreq, ifr_mtu)", if_tun.ifreq.ifru_mtu.offset
    for name, (text, fields) in PACKED.items():
        yield f"sizeof(struct {name})", struct.calcsize(text)
        codes = re.findall(r"[a-zA-Z]", text)
        for number, field in enumerate(fields):
            yield f"offsetof(struct {name}, {field})", struct.calcsize(text[0] + "".join(codes[:number]))


def public(module: ModuleType) -> Iterator[tuple[str, int]]:
    for name, value in vars(module).items():
        if isinstance(value, int) and name.isupper():
            yield name, value


def test_everything_is_as_the_headers_say(tmp_path: Path) -> None:
    compiler = shutil.which("gcc")
    if compiler is None or not Path("/usr/include/linux/virtio_net.h").exists():
        pytest.skip("no gcc or no kernel headers: no structure, offset or number was compared (gcc, linux-libc-dev)")
    asked = list(questions())
    body = "\n".join(f'    printf("%lld\\n", (long long)({expression}));' for expression, _ in asked)
    source, program = tmp_path / "ask.c", tmp_path / "ask"
    source.write_text(f"{HEADERS}\nint main(void)\n{{\n{body}\n    return 0;\n}}\n")
    built = subprocess.run([compiler, "-w", "-o", program, source], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    answers = [int(line) for line in subprocess.run([program], capture_output=True, check=True).stdout.split()]
    assert len(answers) == len(asked) > 100
    # Compared as unsigned: ioctl numbers have their top bit set.
    wrong = {
        expression: (ours, theirs)
        for (expression, ours), theirs in zip(asked, answers, strict=True)
        if (ours - theirs) % (1 << 32)
    }
    assert not wrong
