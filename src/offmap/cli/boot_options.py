"""The options of ``offmap run`` that say what to boot: a kernel or an image, and perhaps one command to run in it."""

from offmap.boot.linux import BootSource
from offmap.errors import OffmapError
from offmap.options import Options
from offmap.typed import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

    from offmap.devices.virtio.device import DeviceSpec

_CMDLINE = "console=ttyS0 quiet"


def add_boot_options(parser: "argparse.ArgumentParser") -> None:
    """Add the options."""
    parser.add_argument("--kernel", type=file_name, help="bzImage (/boot/vmlinuz-…) or ELF vmlinux")
    parser.add_argument("--initrd", type=file_name, help="initial RAM disk")
    parser.add_argument(
        "--cmdline",
        default=_CMDLINE,
        help="the guest kernel's command line (default: %(default)s; an image adds its root)",
    )
    parser.add_argument(
        "--console",
        choices=("serial", "virtio"),
        help="the guest's console: its serial port, ttyS0 (the default), or a virtio console, hvc0, which is told "
        "the terminal's size; console=hvc0 is added to the command line",
    )
    parser.add_argument(
        "--image",
        metavar="IMAGE[,rw=on]",
        help="boot an image of offmap image build, by its name or folder; what the guest writes stays in its RAM and "
        "goes with it, unless rw=on: then it goes into the image",
    )
    parser.add_argument(
        "--exec",
        metavar="COMMAND",
        help="run COMMAND in the image (default: debian) by /bin/sh, its input and output ours, and return its exit "
        "status; 125 if offmap failed. With --audit, 125 too if the guest's RAM was not found hidden",
    )


def file_name(text: str) -> str:
    """The file name, as it was given. Raises ArgumentTypeError: it is empty."""
    if not text:  # of an unset shell variable
        import argparse

        raise argparse.ArgumentTypeError("is an empty name")
    return text


def boot_of(args: "argparse.Namespace") -> "tuple[BootSource, list[tuple[str, DeviceSpec]]]":
    """Read the options: (what to boot, the devices that must come before all others).

    Raises:
        OffmapError: there is no such image, or options contradict each other.
    """
    if args.exec is not None and args.console is not None:
        raise OffmapError("a command of --exec has no console", "leave out --console")
    image = args.image if args.image is not None or args.exec is None else "debian"
    if image is not None:
        return _image(args, image)
    if args.kernel is None:
        raise OffmapError("there is nothing to boot", "give --kernel FILE or --image IMAGE; see offmap run --help")
    return BootSource(args.kernel, args.initrd, args.cmdline), []


def _image(args: "argparse.Namespace", text: str) -> "tuple[BootSource, list[tuple[str, DeviceSpec]]]":
    from offmap.guests.image import find_image

    if args.kernel is not None or args.initrd is not None:
        raise OffmapError("an image has a kernel and an initrd of its own", "leave out --kernel and --initrd")
    where, comma, option = text.rpartition(",")
    writable = False
    if comma and option.startswith("rw="):
        with Options(option, "--image", "write rw=on or rw=off") as options:
            writable = options.switch("rw")
    else:
        where = text
    image = find_image(where)
    source, drive = image.boot(args.cmdline, writable=writable, attended=args.exec is None)
    return source, [drive]
