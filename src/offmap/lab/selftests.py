"""The kernel's own tests (tools/testing/selftests), of the source that a lab host's kernel was built from.

Only the parts of the source that these tests need are unpacked, with the series' patches to them. They stay in the
cache, and each test is built there when it is first wanted.
"""

import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from offmap.lab.build import apply_patches, run_make
from offmap.lab.cache import cache_folder, locked, replace_folder, scratch_folder
from offmap.lab.errors import LabError
from offmap.lab.series import PatchSeries, changes_below, patch_series
from offmap.lab.source import KernelSource, kernel_source

COLLECTIONS = ("memory-hotplug", "mm", "kvm")
# What runs unless tests are named: each takes seconds in an emulated host. Memory that one test poisons keeps a block
# from coming online again, so blocks go first.
DEFAULT = (
    "memory-hotplug/mem-on-off-test.sh",
    *(f"mm/{name}" for name in ("memfd_secret", "madv_populate", "map_populate", "mlock2-tests", "mlock-random-test")),
    *(f"mm/{name}" for name in ("gup_longterm", "cow", "pfnmap", "process_madv", "guard-regions", "merge")),
    *(f"mm/{name}" for name in ("split_huge_page_test", "compaction_test", "memory-failure")),
    *(f"kvm/{name}" for name in ("guest_memfd_test", "guest_memfd_race_test", "set_memory_region_test")),
    *(f"kvm/{name}" for name in ("pre_fault_memory_test", "steal_time", "x86/kvm_clock_test", "x86/kvm_pv_test")),
    *(f"kvm/{name} -b 16M -s memfd_secret" for name in ("demand_paging_test", "memslot_modification_stress_test")),
    *(f"kvm/{name} -b 16M -s guest_memfd_hva_no_direct_map" for name in ("dirty_log_perf_test", "kvm_page_table_test")),
)

_FORMAT = 1  # of the cache
# What tests and `make headers` read. The library for VFIO's tests, which KVM's are linked with, has links to headers of
# drivers.
_PARTS = (
    *("Makefile", "Kbuild", "scripts", "usr/include", "include/uapi", "include/asm-generic", "include/linux/pci_ids.h"),
    *("arch/x86/include", "arch/x86/entry", "arch/x86/tools", "arch/x86/Makefile*", "mm/gup_test.h"),
    *("tools/testing/selftests", "tools/include", "tools/arch/x86", "tools/lib", "tools/scripts", "tools/build"),
    *("drivers/dma/idxd/registers.h", "drivers/dma/ioat", "drivers/net/ethernet/intel/igb/*.h"),
)
_PATCHED = ("tools/testing/selftests/", "tools/include/", "tools/arch/x86/", "include/uapi/", "arch/x86/include/")
_TESTS = "tools/testing/selftests"
# Headers of libraries, and the Debian package of each.
_LIBRARIES = {"kvm": {"uuid/uuid.h": "uuid-dev"}, "mm": {"sys/capability.h": "libcap-dev"}}
# Printed by make itself, whatever the folder calls its tests.
_LIST = "offmap-list: ; @printf '%s\\n' $(TEST_GEN_PROGS) $(TEST_GEN_FILES) $(if $(TEST_GEN_FILES),,$(TEST_PROGS))"

Say = Callable[[str], None]


def stock_of(spec: str) -> str:
    """Return the stock kernel that a patched kernel is compared with; empty if `spec` is itself a stock kernel.

    Raises:
        LabError: there is no source to be had for this kernel.
    """
    kind, _, series = spec.partition(":")
    if kind == "patched":
        return f"debian:{patch_series(spec).name}"
    if kind == "debian" and series:
        return ""
    raise LabError(f"the source of the host kernel {spec} is not known", "name patched:7.3 or debian:7.3")


@dataclass(frozen=True)
class Selftests:
    """The tests of one source.

    Attributes:
        store: the folder in the cache that holds the source and its headers.
    """

    store: Path

    @property
    def folder(self) -> Path:
        """The folder that holds the collections, each a folder."""
        return self.store / "source" / _TESTS

    def names(self, wanted: Sequence[str]) -> list[str]:
        """Return the names of tests (``mm/memfd_secret``) that `wanted` stands for; a collection is all its tests.

        A name may go on with a blank and the test's options.

        Raises:
            LabError: there is no such test or collection.
        """
        found: list[str] = []
        for name in wanted:
            collection, _, test = name.partition("/")
            if collection not in COLLECTIONS:
                raise LabError(
                    f"there are no tests {name}", f"name one of {', '.join(COLLECTIONS)}, or COLLECTION/TEST"
                )
            # A source older than the default set lacks some of it: that is no mistake of the user's.
            if not test:
                found += self._all_of(collection)
            elif any(Path(f"{self.program(name)}{end}").is_file() for end in (".c", "")):
                found.append(name)
            elif name not in DEFAULT:
                raise LabError(f"this kernel's source has no test {name}", f"see {self.folder / collection}")
        return list(dict.fromkeys(found))

    def build(self, names: Sequence[str], say: Say) -> list[str]:
        """Build the tests `names`, where that has not been done; return those that cannot be built here.

        Raises:
            LabError: nothing can be built, or a library is missing.
        """
        lacking = [
            package
            for collection in {name.partition("/")[0] for name in names}
            for header, package in _LIBRARIES.get(collection, {}).items()
            if not (Path("/usr/include") / header).is_file()
        ]
        if what := ", ".join(sorted(lacking)):
            raise LabError(f"cannot build the tests: this machine lacks {what}", f"run: apt-get install {what}")
        with locked(self.store.with_name(f"{self.store.name}.lock")):
            for collection in COLLECTIONS:
                programs = [self.program(name) for name in names if name.startswith(f"{collection}/")]
                programs = sorted({program for program in programs if program.suffix != ".sh"})
                if programs and not all(program.is_file() for program in programs):
                    say(f"building {len(programs)} tests of {collection}")
                    self._make(collection, ["-k", *map(str, programs)])
        return [name for name in names if not self.program(name).is_file()]

    def program(self, name: str) -> Path:
        """The file that the test `name` is, without its options."""
        return self.folder / name.partition(" ")[0]

    @property
    def log(self) -> Path:
        """What make said last."""
        return self.store.with_name(f"{self.store.name}.log")

    def _all_of(self, collection: str) -> list[str]:
        command = [*self._command(collection), "--eval", _LIST, "offmap-list"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=_environment())
        paths = [self.folder / collection / line for line in done.stdout.split()]  # some are absolute
        return [str(path.relative_to(self.folder)) for path in paths if path.is_relative_to(self.folder)]

    def _command(self, collection: str) -> list[str]:
        headers = self.store / "headers/usr"
        return [
            *("make", "-s", f"-j{os.cpu_count() or 1}", "-C", str(self.folder / collection)),
            *(f"KHDR_INCLUDES=-isystem {headers / 'include'}", f"LINUX_HDR_PATH={headers}"),
        ]

    def _make(self, collection: str, targets: list[str]) -> None:
        self.log.write_bytes(b"")
        try:
            run_make([*self._command(collection), *targets], self.log, f"the collection {collection}")
        except LabError:
            # One test that does not build is no reason to run none.
            if not any(Path(target).is_file() for target in targets):
                raise


def selftests(spec: str, say: Say = lambda _: None) -> Selftests:
    """Return the tests of the source of a host kernel (``patched:7.3``, ``debian:7.3``), unpacking them if need be.

    Raises:
        LabError: there is no source for this kernel, or it cannot be prepared.
    """
    series = patch_series(spec) if stock_of(spec) else None
    name = series.name if series else spec.partition(":")[2]
    source = kernel_source(name)
    store = cache_folder("selftests") / f"{name}-{_key(source, series)}"
    with locked(store.with_name(f"{store.name}.lock")):
        if not store.is_dir():
            for leftover in store.parent.glob(f".{store.name}.*"):  # of a run that was killed; we hold the lock
                shutil.rmtree(leftover, ignore_errors=True)
            try:
                _prepare(source, series, store, say)
            except OSError as error:
                raise LabError(
                    f"cannot prepare the tests in {store}: {error}", "check the disk and its rights"
                ) from error
    return Selftests(store)


def _key(source: KernelSource, series: PatchSeries | None) -> str:
    digest = hashlib.sha256(f"{_FORMAT} {source.version}\n{_PARTS}".encode())
    for patch in series.patches if series else ():
        digest.update(changes_below(patch, _PATCHED))
    return digest.hexdigest()[:16]


def _prepare(source: KernelSource, series: PatchSeries | None, store: Path, say: Say) -> None:
    with scratch_folder(store) as scratch:
        tree, patches = scratch / "source", scratch / "patches"
        tree.mkdir()
        patches.mkdir()
        say(f"unpacking the tests of Linux {source.version}")
        source.unpack(tree, _PARTS)
        for patch in series.patches if series else ():
            if changes := changes_below(patch, _PATCHED):
                (patches / patch.name).write_bytes(changes)
        apply_patches(tree, sorted(patches.iterdir()))
        say("installing the kernel's headers")
        headers = ["make", "-s", f"-j{os.cpu_count() or 1}", "-C", str(tree), f"O={scratch / 'headers'}", "headers"]
        run_make(headers, Selftests(store).log, "the set of headers")
        replace_folder(scratch, store)


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
