"""The module's pool (kernel/module/pool.c, runs.c), compiled for a process: how it chooses pages, and counts them."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

MODULE = Path(__file__).parents[3] / "kernel/module"
HERE = Path(__file__).parent / "userspace"
HEADER = re.compile(r"^#include <(linux/.*)>", re.MULTILINE)


def built(folder: Path, program: str, *sources: str) -> Path:
    """A program of `userspace`, with these sources of the module."""
    if shutil.which("gcc") is None:
        pytest.skip("no gcc: how a pool gives out pages was not tried (install gcc)")
    files = [HERE / f"{program}.c", *(MODULE / source for source in sources)]
    for text in (MODULE / "pool.h", MODULE / "internal.h", *files):
        for header in HEADER.findall(text.read_text()):
            (folder / header).parent.mkdir(parents=True, exist_ok=True)
            (folder / header).write_text("")
    include = [f"-I{folder}", f"-I{MODULE}", "-include", str(HERE / "kernel.h")]
    checks = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    names = [str(file) for file in files]
    subprocess.run(["gcc", "-O1", "-g", *checks, *include, "-o", str(folder / program), *names], check=True)
    return folder / program


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory.mktemp("runs"), "runs", "runs.c")


def taken(program: Path, free: list[tuple[int, int]], *files: int) -> list[tuple[list[tuple[int, int]], int]]:
    """What each file gets, as (PFN, pages), and how many free runs were walked over for that."""
    listed = "".join(f"{pfn} {count}\n" for pfn, count in reversed(free))
    words = f"{listed}0 0\n" + "".join(f"{file}\n" for file in files)
    said = subprocess.run(
        [program], input=words, stdout=subprocess.PIPE, text=True, check=True, env={"ASAN_OPTIONS": "detect_leaks=0"}
    ).stdout
    found = []
    for line in said.splitlines():
        *pieces, steps = line.split()
        found.append(([(int(pfn), int(count)) for pfn, count in (piece.split("+") for piece in pieces)], int(steps)))
    return found


def test_large_pages_are_kept_for_what_can_use_them(runs: Path) -> None:
    free = [(100, 3), (512, 1024), (2000, 2), (4096, 512)]
    (large, _), (small, _) = taken(runs, free, 1024, 6)
    assert large == [(512, 1024)]
    assert small == [(100, 3), (2000, 2), (4096, 1)]


def test_a_user_who_left_a_hole_at_every_other_page_keeps_nobody_waiting(runs: Path) -> None:
    """Nothing is walked over twice for one file, though each 2 MiB of it are looked for, with the pool locked."""
    count = 1 << 14
    holes = [(1 + 2 * index, 1) for index in range(count)]
    ((pages, steps),) = taken(runs, holes, count)
    assert pages == holes
    assert steps <= 3 * count


def test_every_page_is_on_somebodys_account_until_it_is_clean(tmp_path: Path) -> None:
    """Whatever files, the kernel's mappings and failing pages do; and nobody waits where nobody would wake him."""
    program = built(tmp_path, "pool", "pool.c", "runs.c")
    for seed in (1, 2, 3):
        assert subprocess.run([program, str(seed)], stdout=subprocess.PIPE, check=True).stdout == b"1\n"
