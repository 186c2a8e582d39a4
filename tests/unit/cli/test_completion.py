"""What a shell completes, asked of real shells."""

import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from offmap.cli.main import main
from offmap.memory.backend import BACKENDS


@pytest.fixture
def script(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Path:
    """Give the file of bash's completion."""
    assert main(["completion", "bash"]) == 0
    path = tmp_path / "offmap"
    path.write_text(capsys.readouterr().out)
    return path


def completed(script: Path, *words: str) -> list[str]:
    """What bash offers for the last of these words."""
    program = 'source "$0"; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _shtab_offmap; printf "%s\\n" "${COMPREPLY[@]}"'
    command = ["bash", "--norc", "-c", program, str(script), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def test_tab_in_a_terminal_offers_the_backends(script: Path) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        os.execvpe("bash", ["bash", "--noprofile", "--norc", "-i"], {**os.environ, "TERM": "dumb", "PS1": "$ "})
    seen = ""

    def read_until(pattern: str) -> None:
        nonlocal seen
        deadline = time.monotonic() + 60
        while not re.search(pattern, seen):
            assert select.select([terminal], [], [], max(deadline - time.monotonic(), 0))[0], seen
            seen += os.read(terminal, 4096).decode()

    try:
        os.write(terminal, f"bind 'set page-completions off'; source {script}; echo 're''ady'\r".encode())
        read_until("ready")
        os.write(terminal, b"offmap run --memory \t\t")
        read_until(rf"\s{max(BACKENDS)}\s(?s:.*)\$ offmap run --memory $")
        assert set(seen.rpartition("ready")[2].split()) >= set(BACKENDS)
    finally:
        os.close(terminal)
        os.waitpid(pid, 0)


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("",), {"run", "audit", "lab", "completion"}),
        (("run", "--memory", "secret"), {"secretmem", "secretmem-bridge"}),
        (("compare", "--backend", ""), set(BACKENDS)),
        (("lab", "kernel", ""), {"path", "build", "list"}),
        (("run", "--log"), {"--log-format"}),
        (("-v", "run", "--log-format", ""), {"text", "json"}),
        (("run", "--kernel", __file__[:-2]), {__file__}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_is_offered(script: Path, words: tuple[str, ...], offered: set[str]) -> None:
    assert offered <= set(completed(script, "offmap", *words))


def test_sizes_of_a_host_are_no_backends(script: Path) -> None:
    assert completed(script, "offmap", "lab", "exec", "--memory", "") == []


@pytest.mark.parametrize("shell", ["zsh", "fish", "tcsh"])
def test_other_shells_get_the_backends_too(shell: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["completion", shell]) == 0
    text = capsys.readouterr().out
    assert "guest_memfd-unmapped" in text
    if shutil.which(shell) and shell != "tcsh":
        (tmp_path / "script").write_text(text)
        assert subprocess.run([shell, "-n", str(tmp_path / "script")], check=False).returncode == 0


def test_the_manual_page_has_every_command_and_is_sound_roff(tmp_path: Path) -> None:
    root = Path(__file__).parents[3]
    file = tmp_path / "offmap.1"
    subprocess.run([sys.executable, root / "scripts/man", file], check=True, stdout=subprocess.DEVNULL)
    if shutil.which("groff") is None:
        pytest.skip("the manual page was not rendered: there is no groff (install groff-base)")
    done = subprocess.run(
        ["groff", "-k", "-man", "-Tutf8", "-P-c", "-ww", str(file)], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    text = re.sub(".\b", "", done.stdout)
    for heading in ("offmap run", "offmap lab exec", "offmap lab kernel build", "offmap completion", "Exit status"):
        assert re.search(rf"^{heading}$", text, re.MULTILINE), heading
    # Every option with what it does.
    assert re.search(r"^ +--memory-size SIZE\n +bytes of RAM \(default: 256M\)$", text, re.MULTILINE)
    assert re.search(r"^ +--rng \S+\s+entropy from the host", text, re.MULTILINE)
