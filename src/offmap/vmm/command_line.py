"""The kernel parameters that tell a Linux guest what it cannot find out about this machine by itself."""

from collections.abc import Iterable


def with_machine_parameters(command_line: str, tsc_khz: int | None, more: Iterable[str] = ()) -> str:
    """`command_line` and the parameters that this machine adds. A parameter that the user gave stays as it is.

    Words behind ``--`` are for init (admin-guide/kernel-parameters) and stay there.

    Args:
        tsc_khz: the TSC's frequency, for a guest that gets no kvm-clock; else None.
        more: parameters that are added whether or not there are some of that name.

    ``pci=off``: there is no PCI bus, and on some processors Linux looks at all 256 of them twice before it believes it
    (search_agp_bridge in arch/x86/kernel/aperture_64.c: 33,000 exits).

    ``tsc_early_khz=``: works on every vendor's processors (CPUID leaf 0x15 is read on Intel only) and makes calibration
    against a PIT needless. ``tsc=reliable``: there is no second clock that could watch it, and KVM gives all vCPUs of a
    VM one TSC, which Linux cannot know where the processor does not promise it.
    """
    parameters = {"pci": "off"}
    if tsc_khz is not None:
        parameters |= {"tsc_early_khz": str(tsc_khz), "tsc": "reliable"}
    words, end = _words(command_line)
    given = {word.partition("=")[0] for word in words[:end]}
    added = [f"{name}={value}" for name, value in parameters.items() if name not in given]
    return " ".join([*words[:end], *added, *more, *words[end:]]).strip()


def with_hvc0(command_line: str) -> str:
    """`command_line` with ``console=hvc0`` as its last console, which becomes /dev/console; unless it has it.

    Earlier consoles stay: hvc0 exists only once a driver has found the device, and the kernel prints before that.
    """
    words, end = _words(command_line)
    if "console=hvc0" in words[:end]:
        return command_line
    consoles = [number for number, word in enumerate(words[:end]) if word.startswith("console=")]
    place = consoles[-1] + 1 if consoles else end
    return " ".join([*words[:place], "console=hvc0", *words[place:]]).strip()


def _words(command_line: str) -> tuple[list[str], int]:
    """The words of it, and how many of them are for the kernel (the others are for init)."""
    words = command_line.split(" ")
    return words, words.index("--") if "--" in words else len(words)
