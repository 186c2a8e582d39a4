"""``offmap attack``: what an attacker gets who can read everything that the host kernel maps."""

import argparse
import json
import os
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from offmap.errors import ExitStatus, OffmapError

if TYPE_CHECKING:
    from offmap.attack.attack import Beforehand, Victim
    from offmap.attack.primitive import Primitive


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "attack",
        description="Read a secret out of a guest of your own by reads of the host kernel's memory, from the kernel's "
        "image to the guest's process, as somebody with a leak in the host kernel would. A measuring tool: it needs "
        "root, and nothing is leaked by speculation.",
        epilog="Exit status: 0 the chain ends, as no mapping leads on; 1 the secret was recovered; 2 it failed or was "
        "used wrongly; 3 the trail was lost, or there was no control that got through.",
    )
    parser.add_argument("pid", type=int, metavar="PID", nargs="?", help="the VMM's process")
    parser.add_argument(
        "--target",
        default="planted",
        metavar="TARGET",
        help="planted: a secret that the guest was told to plant (default); tls: the RSA key of a server, in its "
        "memory; file:PATH and key:PATH: a file of a page at most, or a private key, in the guest's page cache",
    )
    parser.add_argument(
        "--secret",
        metavar="SECRET",
        help="what it is known by. planted: its SHA-256, as the guest printed it; file: SHA256:BYTES; tls and key: a "
        "file with the certificate or the public key",
    )
    parser.add_argument(
        "--process", metavar="NAME", help="the guest's process that has the secret (default: sh, of tls nginx)"
    )
    parser.add_argument(
        "--control",
        metavar="PID:SECRET",
        help="a guest on plain RAM beside it; only if the same chain gets through there, it can be said to end here",
    )
    parser.add_argument(
        "--host-kernel",
        type=Path,
        metavar="FILE",
        help="the host's vmlinuz or vmlinux, or what --learn wrote (default: that of the running kernel in /boot)",
    )
    parser.add_argument(
        "--guest-kernel", type=Path, metavar="FILE", help="the same of the guest's kernel (default: the host's)"
    )
    parser.add_argument(
        "--module",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="kvm.ko of the host's kernel (default: that of the running kernel in /lib/modules)",
    )
    parser.add_argument(
        "--types",
        type=Path,
        metavar="FILE",
        help="for a kernel without BTF: kernel/types/offmap_types.c, compiled with the kernel's headers",
    )
    parser.add_argument(
        "--learn",
        type=Path,
        metavar="FILE",
        help="only write down what these three files tell, and end",
    )
    parser.add_argument(
        "--primitive",
        choices=["kcore", "module"],
        default="kcore",
        help="what reads the kernel's memory: /proc/kcore (default), or a module for disposable hosts",
    )
    parser.add_argument(
        "--user-memory",
        action="store_true",
        help="let the primitive read the VMM's user memory too, as a leak in the VMM's process would (VMScape): hiding "
        "RAM from the kernel does not stop that. Needs --primitive module",
    )
    parser.add_argument(
        "--pieces",
        metavar="HEX,...",
        help="the secret in pieces of eight bytes, as hexadecimal digits with commas between: search all that the host "
        "kernel maps for any 16 bytes of it",
    )
    parser.add_argument(
        "--kaslr", metavar="ADDRESS", help="where the host's kernel image is; without it, it is searched for"
    )
    parser.add_argument(
        "--error-rate", type=float, default=0.0, metavar="SHARE", help="make so many of the words read wrong (0 to 0.5)"
    )
    parser.add_argument(
        "--votes", type=int, default=1, metavar="N", help="read everything N times, and take what comes most often"
    )
    parser.add_argument(
        "--latency", type=float, default=0.0, metavar="SECONDS", help="wait so long at each word of eight bytes"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--json-schema", action="store_true", help="print the JSON Schema of the result and end")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write a page that draws the way, as one file")
    parser.add_argument("--no-color", action="store_true", help="no colours, even on a terminal")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Attack one VM; the exit status is that of its outcome."""
    from offmap.attack.attack import attack
    from offmap.attack.text import render_text

    if args.json_schema:
        from offmap.attack.result import attack_schema

        print(attack_schema(), end="", flush=True)
        return ExitStatus.DONE
    if args.learn is not None:
        return _learn(args)
    if args.pid is None or args.secret is None:
        raise OffmapError("no guest to attack", "give the PID of its VMM and --secret")
    victim, control = _victim(args, args.pid, args.secret, args.pieces), _control(args)
    known = _beforehand(args)
    if args.html is not None:
        from offmap.report.files import check_replaceable

        check_replaceable(args.html)
    with _primitive(args) as primitive:
        result = attack(primitive, known, victim, control)
    if args.json:
        print(json.dumps(result.to_json(), indent=2), flush=True)
    else:
        color = sys.stdout.isatty() and not args.no_color and not os.environ.get("NO_COLOR")
        print(render_text(result, color), flush=True)
    if args.html is not None:
        from offmap.attack.html import render_html
        from offmap.report.files import PRIVATE, replace_file

        replace_file(args.html, render_html(result), PRIVATE)
    return int(result.exit_status)


def _learn(args: argparse.Namespace) -> int:
    from offmap.attack.knowledge import learn
    from offmap.report.files import PUBLIC, replace_file

    modules = args.module or _running_modules(args.host_kernel)
    kernel = learn(args.host_kernel or _running_image(), modules, args.types)
    replace_file(args.learn, json.dumps(kernel.to_json(), indent=1) + "\n", PUBLIC)
    return ExitStatus.DONE


def _beforehand(args: argparse.Namespace) -> "Beforehand":
    from offmap.attack.attack import Beforehand
    from offmap.attack.knowledge import known

    modules = args.module or _running_modules(args.host_kernel)
    host = known(args.host_kernel or _running_image(), modules, args.types)
    guest = host if args.guest_kernel is None else known(args.guest_kernel)
    try:
        base = None if args.kaslr is None else int(args.kaslr, 16)
    except ValueError:
        raise OffmapError(f"{args.kaslr!r} is no address", "write it like 0xffffffff81000000") from None
    return Beforehand(host, guest, base)


def _running_image() -> Path:
    return Path(f"/boot/vmlinuz-{platform.release()}")


def _running_modules(image: Path | None) -> list[Path]:
    """kvm.ko of the running kernel; none where another kernel was named."""
    if image is not None:
        return []
    folder = Path(f"/lib/modules/{platform.release()}/kernel/arch/x86/kvm")
    return sorted(folder.glob("kvm.ko*"))


def _victim(args: argparse.Namespace, pid: int, secret: str, pieces: str | None = None) -> "Victim":
    from offmap.attack.attack import Victim
    from offmap.attack.sweep import parse_pieces
    from offmap.attack.target import parse_target

    target = parse_target(args.target, secret, args.process)
    if pieces is None:
        return Victim(pid, target)
    if not target.digest:
        raise OffmapError(f"pieces of {target.name} cannot be checked", "sweep for a planted secret or a file")
    return Victim(pid, target, parse_pieces(pieces))


def _control(args: argparse.Namespace) -> "Victim | None":
    if args.control is None:
        return None
    pid, _, secret = args.control.partition(":")
    if not (pid.isascii() and pid.isdigit()):
        raise OffmapError(f"{args.control[:80]!r} is no control", "write PID:SECRET")
    if int(pid) == args.pid:
        raise OffmapError(f"process {pid} is attacked, and cannot be its own control", "name a guest on plain RAM")
    return _victim(args, int(pid), secret)


def _primitive(args: argparse.Namespace) -> "Primitive":
    from offmap.attack.primitive import Noisy

    if not 0 <= args.error_rate <= 0.5 or args.votes < 1 or not 0 <= args.latency <= 1:
        raise OffmapError(
            "a leak cannot be like that", "give --error-rate 0 to 0.5, --votes above 0, --latency 0 to 1 second"
        )
    primitive: Primitive
    if args.primitive == "module":
        from offmap.attack.module_primitive import ModulePrimitive

        primitive = ModulePrimitive(user_memory=args.user_memory)
    elif args.user_memory:
        raise OffmapError("/proc/kcore shows no user memory", "take --primitive module, in a disposable host")
    else:
        from offmap.attack.kcore_primitive import KcorePrimitive

        primitive = KcorePrimitive()
    if args.error_rate or args.latency or args.votes > 1:
        return Noisy(primitive, args.error_rate, args.latency, args.votes)
    return primitive
