"""The kernel's own tests: which there are, and which of the source they are made of."""

from pathlib import Path

import pytest

from offmap.lab import selftests
from offmap.lab.errors import LabError
from offmap.lab.selftests import DEFAULT, Selftests, stock_of
from offmap.lab.series import changes_below, patch_series


@pytest.fixture
def tests(tmp_path: Path) -> Selftests:
    found = Selftests(tmp_path / "7.3-0")
    for name in ("mm/memfd_secret.c", "kvm/x86/kvm_clock_test.c", "memory-hotplug/mem-on-off-test.sh"):
        (found.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (found.folder / name).write_text("")
    return found


def test_a_patched_kernel_is_compared_with_debians_of_its_series() -> None:
    assert stock_of("patched:7.3") == stock_of("patched:7.3+debug") == "debian:7.3"
    assert stock_of("debian:6.12") == ""


@pytest.mark.parametrize("spec", ["running", "/boot/vmlinuz", "debian:", "patched:1.0"])
def test_a_kernel_without_a_source_is_refused(spec: str) -> None:
    with pytest.raises(LabError):
        stock_of(spec)


def test_tests_are_named_by_collection(tests: Selftests) -> None:
    names = ["mm/memfd_secret", "kvm/x86/kvm_clock_test", "memory-hotplug/mem-on-off-test.sh"]
    assert tests.names([*names, names[0]]) == names
    assert set(tests.names(DEFAULT)) == set(names)  # an older source has fewer


def test_a_name_may_go_on_with_options(tests: Selftests) -> None:
    names = ["mm/memfd_secret -s a", "mm/memfd_secret -s b"]
    assert tests.names(names) == names
    assert {tests.program(name) for name in names} == {tests.folder / "mm/memfd_secret"}


@pytest.mark.parametrize("name", ["mm/none", "mm/none -s a", "net", "net/tap", "memfd_secret"])
def test_an_unknown_test_is_refused(tests: Selftests, name: str) -> None:
    with pytest.raises(LabError, match=name):
        tests.names([name])


def test_a_collection_is_what_its_makefile_lists(tests: Selftests) -> None:
    folder = tests.folder / "mm"
    (folder / "Makefile").write_text(
        f"TEST_GEN_PROGS = {folder}/a b\nTEST_GEN_FILES = c\nTEST_PROGS = wrapper.sh\nall:\n"
    )
    assert tests.names(["mm"]) == ["mm/a", "mm/b", "mm/c"]
    (folder / "Makefile").write_text("TEST_PROGS = wrapper.sh\nall:\n")
    assert tests.names(["mm"]) == ["mm/wrapper.sh"]


def test_what_does_not_build_is_named(tests: Selftests, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftests, "_LIBRARIES", {})
    makefile = "%/good:\n\ttouch $@\n%/bad:\n\t@echo bad.c: error: no >&2; false\n"
    (tests.folder / "mm/Makefile").write_text(makefile)
    said: list[str] = []
    assert tests.build(["mm/good", "mm/bad", "memory-hotplug/mem-on-off-test.sh"], said.append) == ["mm/bad"]
    assert said == ["building 2 tests of mm"]
    assert tests.build(["mm/bad -s a", "mm/good -s a", "mm/good -s b"], said.append) == ["mm/bad -s a"]
    assert said[1:] == ["building 2 tests of mm"]
    assert "no" in tests.log.read_text()
    with pytest.raises(LabError, match=r"collection mm does not build: bad\.c: error: no"):
        tests.build(["mm/bad"], said.append)


def test_a_missing_library_is_named_with_its_package(tests: Selftests, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftests, "_LIBRARIES", {"mm": {"no/such.h": "libno-dev"}})
    with pytest.raises(LabError, match="lacks libno-dev; run: apt-get install libno-dev"):
        tests.build(["mm/memfd_secret"], lambda _: None)
    assert tests.build(["memory-hotplug/mem-on-off-test.sh"], lambda _: None) == []


def test_of_the_patches_only_what_changes_tests_and_headers_is_applied() -> None:
    patches = patch_series("patched:7.3").patches
    changes = b"".join(changes_below(path, ["tools/testing/selftests/", "include/uapi/"]) for path in patches)
    names = {line.split()[2].decode() for line in changes.splitlines() if line.startswith(b"diff --git ")}
    assert "a/include/uapi/linux/kvm.h" in names
    assert "a/tools/testing/selftests/mm/memfd_secret.c" in names
    assert all(name.startswith(("a/tools/testing/selftests/", "a/include/uapi/")) for name in names)
