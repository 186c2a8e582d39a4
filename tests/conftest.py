"""What tests of every kind share: small guest kernels, limits that follow the machine, signals as at a terminal."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import settings

from offmap.patience import calibration, scaled

# An example that takes long on a machine busy with something else is no failure. The suite tries the same examples each
# time, so that a failure has a cause in what was changed; --hypothesis-profile=explore tries others.
settings.register_profile("explore", deadline=None)
settings.register_profile("offmap", settings.get_profile("explore"), derandomize=True)
settings.load_profile("offmap")

# A shell starts what it puts into the background with SIGINT ignored, and what a test interrupts inherits that.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Have tests take the user's Firecracker."""
    parser.addoption("--firecracker", metavar="PATH", help="instead of the released one, which is fetched")


@pytest.hookimpl(tryfirst=True, wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Have a test's limit (pytest-timeout reads it after this) follow the machine as it is when the test starts."""
    own = item.get_closest_marker("timeout")
    seconds = float(own.args[0] if own else item.config.getini("timeout"))
    item.add_marker(pytest.mark.timeout(scaled(seconds)), append=False)
    return (yield)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Name a failure when it happens, on the original standard error: a run that is cut short has no summary."""
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        print(f"\n{report.when} of {report.nodeid} failed:\n{report.longreprtext[-2000:]}", file=sys.__stderr__)


def pytest_report_header(config: pytest.Config) -> str:
    """Say how fast this machine is, and what that makes of limits."""
    return f"{calibration()}; a test that started now might take {scaled(float(config.getini('timeout'))):.0f} s"


PAYLOADS = Path(__file__).with_name("payloads")
FREESTANDING = [
    *("-nostdlib", "-static", "-O2", "-ffreestanding", "-fno-stack-protector"),
    *("-fno-pic", "-mno-red-zone", "-mgeneral-regs-only"),
]


@pytest.fixture(scope="session")
def payload(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Give a function that builds a guest kernel (an ELF vmlinux at 16 MiB) from payloads/NAME.S or NAME.c."""
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("no gcc: no test guest could be built (install gcc)")
    folder = tmp_path_factory.mktemp("payloads")
    built: dict[str, Path] = {}

    def build(name: str) -> Path:
        if name not in built:
            program = folder / f"{name}.elf"
            link = "-Wl,-N,-Ttext=0x1000000,--build-id=none"
            source = next(PAYLOADS.glob(f"{name}.[Sc]"))
            command = [compiler, *FREESTANDING, link, "-o", str(program), str(source)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            built[name] = program
        return built[name]

    return build


@dataclass(frozen=True)
class House:
    """A copy of the tree in which recipes of CONTRIBUTING.md are followed, by tests/house.

    Attributes:
        tree: where it is.
        touched: the files that a recipe changed or added, by the recipe's name.
        listed: those that CONTRIBUTING.md names for it.
    """

    tree: Path
    touched: dict[str, set[str]]
    listed: dict[str, set[str]]

    @classmethod
    def build(cls, tree: Path) -> "House":
        root = PAYLOADS.parents[1]
        recipes = tomllib.loads((root / "tests/house/recipes.toml").read_text())
        for folder in ("src", "docs", "kernel"):
            shutil.copytree(root / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__", "results"))
        house = cls(tree, {}, {})
        for recipe, content in recipes.items():
            for name, where in content["new"].items():
                shutil.copy(root / "tests/house" / name, tree / where)
            for row in content["rows"]:
                text = (tree / row["file"]).read_text()
                assert text.count(f"{row['after']}\n") == 1, f"{row['file']}: no such line: {row['after']}"
                (tree / row["file"]).write_text(text.replace(f"{row['after']}\n", f"{row['after']}\n{row['row']}\n"))
            house.touched[recipe] = {*content["new"].values(), *(row["file"] for row in content["rows"])}
            house.listed[recipe] = _listed(root / "CONTRIBUTING.md", content["section"], content["name"])
        return house

    @property
    def environment(self) -> dict[str, str]:
        """For a Python that is to import offmap from there."""
        return {**os.environ, "PYTHONPATH": str(self.tree / "src"), "PYTHONDONTWRITEBYTECODE": "1"}


def _listed(contributing: Path, section: str, name: str) -> set[str]:
    """The file that each step of a recipe begins with."""
    text = contributing.read_text().partition(f"## {section}\n")[2].partition("\n## ")[0]
    return {file.replace("NAME", name) for file in re.findall(r"^\d\. `([^`]+)`", text, re.MULTILINE)}


@pytest.fixture(scope="session")
def house(tmp_path_factory: pytest.TempPathFactory) -> House:
    """Give a tree with a kind of RAM (lent), a device (dice) and a question (uptime) that are made up."""
    return House.build(tmp_path_factory.mktemp("house"))
