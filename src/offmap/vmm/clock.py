"""A correct clock for a guest without kvm-clock: the TSC, its frequency handed over on the command line."""

__all__ = ["clock_parameters"]


def clock_parameters(tsc_khz: int, command_line: str) -> str:
    """Kernel parameters to append to `command_line`.

    ``tsc_early_khz=`` works on every vendor's processors (CPUID leaf 0x15 is read on Intel only) and makes calibration
    against a PIT needless. ``tsc=reliable`` because there is no second clock that could watch it, and because KVM gives
    all vCPUs of a VM one TSC, which Linux cannot know where the processor does not promise it.
    """
    given = {word.partition("=")[0] for word in command_line.split()}
    parameters = {"tsc_early_khz": str(tsc_khz), "tsc": "reliable"}
    return " ".join(f"{name}={value}" for name, value in parameters.items() if name not in given)
