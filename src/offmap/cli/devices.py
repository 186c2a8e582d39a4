"""The options of ``offmap run`` that give the guest devices: one row each. Each device parses its own option."""

from functools import partial
from importlib import import_module

from offmap.typed import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import argparse

    from offmap.devices.virtio.device import DeviceSpec


class _Option(NamedTuple):
    """One kind of device.

    Attributes:
        name: of the option, without its dashes, and of the devices in messages.
        parser: ``module:function``, which makes a DeviceSpec of the option's text. Imported when it is used, so that
            `offmap run` starts quickly.
        metavar: the option's value, for the help; in brackets if it may be left out.
    """

    name: str
    parser: str
    metavar: str
    help: str


_OPTIONS = (
    _Option(
        "drive",
        "offmap.devices.virtio.drive:parse_drive",
        "PATH[,option=value…]",
        "a raw image or block device; options: readonly=on, serial=TEXT, direct=on, bounce=on; rate=BYTES and ops=N "
        "limit what the guest may move in a second, here and with other devices",
    ),
    _Option(
        "net",
        "offmap.devices.virtio.net_spec:parse_net",
        "tap=NAME|fd=N|passt[,option=value…]",
        "a network card; tap=: an interface, made where there is none (address=IPV4/PREFIX for the host's side); fd=: "
        "an open tap; passt: user-mode networking (tcp=SPEC and udp=SPEC forward ports: see passt(1)); options: mac=, "
        "mtu=, vhost=on (the host kernel moves the packets of a tap), rate=, ops=",
    ),
    _Option(
        "vsock",
        "offmap.devices.virtio.vsock_spec:parse_vsock",
        "cid=N,path=PATH[,option=value…]",
        "sockets to the guest: programs of the host connect to PATH and say CONNECT <port>; who waits for the guest "
        "listens at PATH_<port>; options: rate=, ops=",
    ),
    _Option(
        "balloon",
        "offmap.devices.virtio.balloon:parse_balloon",
        "size=SIZE",
        "memory that the guest gives back to the host: SIZE from the start, and what it reports to be free",
    ),
    _Option("rng", "offmap.devices.virtio.rng:parse_rng", "[option=value…]", "entropy from the host"),
)


def add_device_options(parser: "argparse.ArgumentParser") -> None:
    """Add them all. The guest finds the devices in the order of the options."""
    group = parser.add_argument_group("devices", "virtio devices, in the order in which the guest finds them")
    for option in _OPTIONS:
        group.add_argument(
            f"--{option.name}",
            action="append",
            type=partial(_written, option),
            const=(option, "") if option.metavar.startswith("[") else None,
            dest="devices",
            default=[],
            help=option.help,
            metavar=option.metavar,
            nargs="?" if option.metavar.startswith("[") else None,
        )
    group.add_argument(
        "--virtio-mmio-cmdline",
        action="store_true",
        help="announce them on the guest's command line too, for a kernel that does not find them by ACPI",
    )


def _written(option: _Option, text: str) -> tuple[_Option, str]:
    return option, text


def device_specs(args: "argparse.Namespace") -> "list[tuple[str, DeviceSpec]]":
    """The devices that were asked for, each with a name for messages: ``drive0``, ``drive1``, ``rng0``.

    Raises:
        OffmapError: the text of an option is wrong.
    """
    specs: list[tuple[str, DeviceSpec]] = []
    numbers: dict[str, int] = {}
    for option, text in args.devices:
        module, _, function = option.parser.partition(":")
        spec: DeviceSpec = getattr(import_module(module), function)(text)
        number = numbers.get(option.name, 0)
        numbers[option.name] = number + 1
        specs.append((f"{option.name}{number}", spec))
    return specs
