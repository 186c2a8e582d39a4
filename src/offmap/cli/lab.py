"""``offmap lab``: disposable hosts."""

import argparse
import time
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from offmap.cli import lab_selftests
from offmap.cli.arguments import seconds
from offmap.cli.lab_options import add_kernel_options, add_machine_options, console_file
from offmap.cli.log import quiet_in_a_file
from offmap.errors import OffmapError
from offmap.log import Logger

if TYPE_CHECKING:
    from offmap.lab.command import LabCommand
    from offmap.lab.host import LabHost

_log = Logger("offmap.cli")

SIGINT = 2
DEFAULT_OUT = Path("out/lab")


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register ``offmap lab`` and its own subcommands."""
    lab = subparsers.add_parser("lab", description="Disposable hosts under QEMU.")
    commands = lab.add_subparsers(metavar="COMMAND", required=True)
    run = commands.add_parser(
        "exec",
        help="run a command in a disposable host",
        description="Run COMMAND as root in a disposable host that has this machine's files. "
        "Its changes to them are lost. Its output is streamed and its exit status returned; "
        "$OFFMAP_OUT is a folder that survives.",
    )
    add_kernel_options(run)
    add_machine_options(run)
    run.add_argument("--fresh", action="store_true", help="boot in full, not from a snapshot of a booted host")
    run.add_argument("--timeout", type=seconds, metavar="S", help="end the command and the host after S seconds")
    run.add_argument("--out", type=Path, metavar="DIR", help=f"the folder that survives (default: {DEFAULT_OUT})")
    run.add_argument(
        "--access-log",
        type=Path,
        metavar="FILE",
        help="log the accesses of the host's kernel to the RAM of guests, from its boot on, and write a report to FILE "
        "(JSON); the host is emulated then, and a quarter as fast",
    )
    run.add_argument(
        "--load-module", action="store_true", help="build the offmap module for the host's kernel, and load it there"
    )
    run.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND …", help="program and arguments")
    run.set_defaults(run=run_exec)
    snapshot = commands.add_parser(
        "snapshot",
        help="the snapshots that disposable hosts start from",
        description="Snapshots of booted hosts, from which later hosts of the same kind start. They are kept in the "
        "cache folder, at most $OFFMAP_SNAPSHOT_LIMIT (default: 4G; 0: none), and only until this machine restarts.",
    )
    snapshots = snapshot.add_subparsers(metavar="COMMAND", required=True)
    listing = snapshots.add_parser("list", help="the snapshots, the last used first")
    listing.set_defaults(run=run_snapshot_list)
    drop = snapshots.add_parser("drop", help="delete snapshots; hosts that were started from them run on")
    drop.add_argument("snapshot", nargs="*", metavar="NAME", help="as list names it (default: all)")
    drop.set_defaults(run=run_snapshot_drop)
    kernel = commands.add_parser("kernel", help="the kernels of disposable hosts", description="Kernels for hosts.")
    kernels = kernel.add_subparsers(metavar="COMMAND", required=True)
    path = kernels.add_parser(
        "path",
        help="get a kernel and print where its bzImage is",
        description="Get a host kernel and print the path of its bzImage, which boots as a guest too.",
    )
    path.add_argument("kernel", nargs="?", metavar="KERNEL", help="debian:6.12, running, … (default: as for lab exec)")
    path.set_defaults(run=run_kernel_path)
    build = kernels.add_parser(
        "build",
        help="build a kernel with offmap's patches and print where its bzImage is",
        description="Build a kernel with offmap's patches from Debian's source, unless that has been done.",
    )
    build.add_argument("kernel", nargs="?", metavar="KERNEL", help="patched:7.3 (default: the newest there is)")
    build.add_argument(
        "--debug",
        action="store_true",
        help="a kernel that checks itself (lockdep, KASAN, DEBUG_VM), at a fraction of the speed; the same as the host "
        "kernel patched:7.3+debug",
    )
    build.set_defaults(run=run_kernel_build)
    names = kernels.add_parser("list", help="the patched kernels, their patches, and whether they have been built")
    names.set_defaults(run=run_kernel_list)
    lab_selftests.add_parser(commands)


def run_kernel_path(args: argparse.Namespace) -> int:
    """Run ``offmap lab kernel path``."""
    from offmap.lab.provision import host_kernel

    print(host_kernel(args.kernel).vmlinuz)
    return 0


def run_kernel_build(args: argparse.Namespace) -> int:
    """Run ``offmap lab kernel build``."""
    from offmap.lab.build import patched_kernel
    from offmap.lab.series import newest_series

    spec = args.kernel or newest_series().spec
    if args.debug and not spec.endswith("+debug"):
        spec += "+debug"
    print(patched_kernel(spec, _log.info).vmlinuz)
    return 0


def run_kernel_list(_args: argparse.Namespace) -> int:
    """Run ``offmap lab kernel list``."""
    from offmap.lab.build import built_tree
    from offmap.lab.series import all_series

    for series in all_series():
        tree = built_tree(series)
        print(f"{series.spec}  {next((tree / 'boot').glob('vmlinuz-*')) if tree else 'not built'}")
        for subject in series.subjects():
            print(f"    {subject}")
    return 0


def run_snapshot_list(_args: argparse.Namespace) -> int:
    """Run ``offmap lab snapshot list``."""
    from offmap.lab.snapshot import Snapshots

    for entry in Snapshots().listed():
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
        state = "" if entry.current else "  (of an earlier start of this machine: not used)"
        print(f"{entry.name}  {entry.size >> 20:5d} MiB  used {when}  {entry.description}{state}")
    return 0


def run_snapshot_drop(args: argparse.Namespace) -> int:
    """Run ``offmap lab snapshot drop``."""
    from offmap.lab.snapshot import Snapshots

    snapshots = Snapshots()
    known = [entry.name for entry in snapshots.listed()]
    if unknown := [name for name in args.snapshot if name not in known]:
        raise OffmapError(f"there is no snapshot {unknown[0]}", "see offmap lab snapshot list")
    for name in args.snapshot or known:
        snapshots.drop(name)
    return 0


def run_exec(args: argparse.Namespace) -> int:
    """Run ``offmap lab exec``; return the command's exit status."""
    from offmap.lab.errors import LabError
    from offmap.lab.host import LabHost
    from offmap.lab.provision import host_kernel

    argv = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not argv:
        raise OffmapError("no command to run", "write it after --: offmap lab exec -- uname -a")
    began = time.monotonic()
    say = quiet_in_a_file(_log)
    with ExitStack() as stack:
        out = _out_folder(args.out)
        console = console_file(args.console, stack)
        log = _access_log(args.access_log, stack)
        say("getting the host kernel")
        kernel = host_kernel(args.host_kernel, args.modules, say)
        module = None
        if args.load_module:
            from offmap.kmod.lab_build import lab_module

            say("building the module, unless that has been done")
            module = lab_module(kernel)
        say(f"starting {kernel.release}")
        host = stack.enter_context(
            LabHost.start(
                kernel,
                memory=args.memory,
                cmdline=args.host_cmdline,
                out=out,
                accel=args.accel,
                console=console,
                timeout=args.timeout,
                nodes=args.nodes,
                access_log=log,
                fresh=args.fresh,
            )
        )
        say(f"{host.release} up after {time.monotonic() - began:.1f} s ({host.options.accel})")
        if module is not None:
            from offmap.kmod.lab_build import load

            if why := load(host, module):
                raise LabError(f"the disposable host does not load {module}", "see why with --console FILE", why=why)
        deadline = None if args.timeout is None else began + args.timeout
        status = _run(host, argv, deadline)
        if log is not None:
            say(_tell_accesses(host, log, args.access_log))
        return status


def _access_log(wanted: Path | None, stack: ExitStack) -> Path | None:
    """Where the plugin writes its log; None if no log is `wanted`."""
    if wanted is None:
        return None
    if not wanted.parent.is_dir():
        raise OffmapError(f"cannot write {wanted}: there is no folder {wanted.parent}", "name a file in another one")
    # Sparse: an entry for each page of the host's RAM.
    return Path(stack.enter_context(TemporaryDirectory(prefix="offmap-"))) / "accesses"


def _tell_accesses(host: "LabHost", log: Path, file: Path) -> str:
    """Write the report of a log to `file`; return it in one line."""
    import msgspec

    from offmap.lab.access_log import AccessLog, Symbols
    from offmap.lab.errors import LabError

    try:
        symbols = Symbols(host.output(["cat", "/proc/kallsyms"]).stdout.decode())
    except LabError:  # the command has powered the host off
        symbols = None
    report = AccessLog(log).report(symbols)
    try:
        file.write_bytes(msgspec.json.format(msgspec.json.encode(report)) + b"\n")
    except OSError as error:
        raise OffmapError(f"cannot write {file}: {error.strerror}", "name another file") from error
    return report.headline()


def _out_folder(chosen: Path | None) -> Path:
    folder = chosen or DEFAULT_OUT
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OffmapError(
            f"cannot make the output folder {folder}: {error.strerror}", "give another one with --out"
        ) from error
    return folder


def _run(host: "LabHost", argv: list[str], deadline: float | None) -> int:
    from offmap.lab.terminal import is_interactive, raw_terminal, terminal_size

    def left() -> float | None:
        return None if deadline is None else max(0.0, deadline - time.monotonic())

    if is_interactive():
        command = host.popen(argv, stdin=0, stdout=1, terminal=terminal_size())
        with raw_terminal(command.resize):
            return command.wait(left())
    command = host.popen(argv, stdin=0, stdout=1, stderr=2)
    try:
        return command.wait(left())
    except KeyboardInterrupt:
        return _interrupted(command, left())


def _interrupted(command: "LabCommand", timeout: float | None) -> int:
    """Pass the first Ctrl-C to the command. A second one ends the command and the host."""
    command.send_signal(SIGINT)
    try:
        return command.wait(timeout)
    except KeyboardInterrupt:
        return 128 + SIGINT
