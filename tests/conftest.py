"""What tests of every kind share: small guest kernels, hypothesis without a stop-watch, signals as at a terminal."""

import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

# An example that takes long on a machine busy with something else is no failure.
settings.register_profile("offmap", deadline=None)
settings.load_profile("offmap")

# A shell starts what it puts into the background with SIGINT ignored, and what a test interrupts inherits that.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

PAYLOADS = Path(__file__).with_name("payloads")


@pytest.fixture(scope="session")
def payload(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Give a function that builds a guest kernel (an ELF vmlinux at 16 MiB) from payloads/NAME.S."""
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("no gcc: no test guest could be built (install gcc)")
    folder = tmp_path_factory.mktemp("payloads")
    built: dict[str, Path] = {}

    def build(name: str) -> Path:
        if name not in built:
            program = folder / f"{name}.elf"
            link = "-Wl,-N,-Ttext=0x1000000,--build-id=none"
            command = [compiler, "-nostdlib", "-static", link, "-o", str(program), str(PAYLOADS / f"{name}.S")]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            built[name] = program
        return built[name]

    return build
