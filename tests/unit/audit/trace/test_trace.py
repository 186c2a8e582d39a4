"""Events of the kernel as mappings of guest pages: each is told once, and what cannot be told is a doubt."""

from pathlib import Path

import numpy as np
import pytest

from offmap.audit.guest_pages import GuestPages
from offmap.audit.trace.events import Event, EventReader
from offmap.audit.trace.instance import Instance, missed_calls
from offmap.audit.trace.judge import Judge
from offmap.audit.trace.probes import ARRAYS, LISTED_PAGES, NEEDED, PROBES
from offmap.audit.trace.trace import Trace
from offmap.audit.verdict import Verdict
from offmap.errors import Undetermined

VMEMMAP = 0xFFFF_EA00_0000_0000
DIRECT = 0xFFFF_8880_0000_0000
INIT_MM = 0xFFFF_FFFF_8200_0000
PID = 100
FRAME = 0x60000  # the guest has 16 pages from here
VA = 0xFFFF_C900_0000_1000

CALL, END = "python-100     (    100) [000] ..... 20", "kworker/0:1-29      (-------) [001] d..1. 20"
LINES = f"""\
          {CALL}.983600: vmap: (vmap+0x4/0xd0) n=1 p0={{PAGE,0x0,(fault)}} p1={{0x0}}
          {CALL}.983610: <stack trace>
 => vmap
 => alias_write
          {CALL}.983700: vmap_ret: (alias_write+0x188/0x220 <- vmap) va=0xffffc90000001000
          {CALL}.983710: <stack trace>
 => alias_write
     {END}.983800: remove_vm_area: (remove_vm_area+0x4/0x70) va=0xffffc90000001000
     {END}.983801: <stack trace>
 => remove_vm_area
"""


def page(frame: int) -> int:
    return VMEMMAP + frame * 64


ARRAY_NAMES = [f"p{n}" for n in range(ARRAYS)]
FULL = "{" + ",".join([f"{page(1):#x}"] * 64) + "}"


def guest(frame: int = FRAME, pages: int = 16) -> GuestPages:
    one = [np.array([value], dtype=np.int64) for value in (frame, pages, 0x7F00_0000_0000, 0x1000)]
    return GuestPages(*one)


@pytest.fixture
def judge() -> Judge:
    found = Judge(PID, VMEMMAP, DIRECT, INIT_MM)
    found.walked(guest())
    return found


def event(name: str, time: int = 1, tid: int = PID, tgid: int = PID, **arguments: object) -> Event:
    words = {key: f"{value:#x}" if isinstance(value, int) else str(value) for key, value in arguments.items()}
    return Event(name, time, "task", tid, tgid, words, [name, "caller"])


def pages(*pointers: int | str) -> str:
    return "{" + ",".join(f"{each:#x}" if isinstance(each, int) else each for each in pointers) + "}"


def test_text_to_a_mapping_with_its_life_and_stack(judge: Judge) -> None:
    reader = EventReader()
    text = LINES.replace("PAGE", f"{page(FRAME + 3):#x}")
    events = [one for at in range(0, len(text), 7) for one in reader.feed(text[at : at + 7])] + reader.flush()
    assert [one.name for one in events] == ["vmap", "vmap_ret", "remove_vm_area"]
    assert events[2].task == "kworker/0:1" and events[2].tgid == 0
    judge.feed(events)
    (mapping,) = judge.hits(final=False)
    assert (mapping.va, mapping.pa, mapping.pages, mapping.life_us) == (VA, (FRAME + 3) << 12, 1, 100)
    assert (mapping.guest_phys_addr, mapping.task, mapping.stack) == (0x4000, "python", ("vmap", "alias_write"))
    assert judge.hits(final=True) == [] and judge.take_doubts() == ()


@pytest.mark.parametrize("name", ["a\n => b", "a\n\nb", "CPU:0 [LOST", "-1 (  1) [000]", "x: y: (z) n=1"])
def test_a_process_cannot_hide_an_event_by_its_name(name: str) -> None:
    reader = EventReader()
    text = LINES.replace("python", name).replace("PAGE", "0x0")
    events = reader.feed(text) + reader.flush()
    assert [(one.name, one.tid) for one in events][:2] == [("vmap", 100), ("vmap_ret", 100)]


def test_lost_events_and_strange_lines_are_counted() -> None:
    reader = EventReader()
    reader.feed("CPU:0 [LOST 25 EVENTS]\n# a comment\n\nwhat is this\n")
    assert (reader.lost, reader.strange) == (25, 1)


def test_an_event_without_a_stack_is_told_when_nothing_follows() -> None:
    reader = EventReader()
    line = LINES.splitlines(keepends=True)[0]
    assert reader.feed(line) == []
    assert len(reader.feed("")) == 1


def test_physical_mappings(judge: Judge) -> None:
    judge.feed([event("ioremap_page_range", va=VA, end=VA + 0x3000, pa=(FRAME - 1) << 12)])
    assert judge.hits(final=False) == []
    (mapping,) = judge.hits(final=True)  # it is still there
    assert (mapping.pages, mapping.pa, mapping.life_us) == (2, FRAME << 12, None)
    judge.feed([event("ioremap_page_range", va=VA, end=VA + 0x1000, pa=(FRAME + 16) << 12)])
    assert judge.hits(final=True) == []
    assert judge.count == 2


@pytest.mark.parametrize(
    "made",
    [
        event("set_direct_map_default_noflush", page=page(FRAME)),
        event("set_direct_map_valid_noflush", page=page(FRAME - 1), n=2, on=1),
        event("set_memory_p", va=DIRECT + (FRAME << 12), n=1),
        event("init_memory_mapping", pa=0, end=1 << 40),
        event("native_set_fixmap", pa=FRAME << 12),
        event("vmap_page_range", va=VA, end=VA + 1, pa=FRAME << 12),
    ],
    ids=lambda made: made.name,
)
def test_other_ways_to_map(judge: Judge, made: Event) -> None:
    judge.feed([made])
    (mapping,) = judge.hits(final=True)
    assert mapping.pa == FRAME << 12 and judge.take_doubts() == ()


def test_what_takes_pages_away_is_no_mapping(judge: Judge) -> None:
    judge.feed([event("set_direct_map_valid_noflush", page=page(FRAME), n=1, on=0)])
    assert judge.hits(final=True) == [] and judge.take_doubts() == ()


@pytest.mark.parametrize(
    "made",
    [
        Event("vmap", 1, "task", PID, PID, {"n": str(LISTED_PAGES + 1), **dict.fromkeys(ARRAY_NAMES, FULL)}),
        event("vmap", n=2, p0=pages(page(1), "(fault)")),
        event("vmap", n=2, p0=pages(page(1), 0)),
        event("vmap", n=2, p0=pages(page(1), page(1) + 1)),
        event("vmap", n=2, p0=pages(page(1))),
        event("vmap", p0=pages(page(1))),
        event("vmap_pfn", n=1),
        event("apply_to_page_range", mm=INIT_MM, n=4096),
        event("vmap_ret", va=VA),
        event("ioremap_page_range", va=VA, end=VA + 0x1000),
        event("kvm_set_memslot"),
        event("kvm_set_memslot", tgid=0),
    ],
)
def test_what_is_not_told_is_a_doubt(judge: Judge, made: Event) -> None:
    judge.feed([made])
    assert len(judge.take_doubts()) == 1
    assert judge.take_doubts() == ()


def test_slots_that_another_process_changes_for_its_vm_are_a_doubt(judge: Judge) -> None:
    judge.vms = frozenset({0xFFFF_C900_0000_1000})
    judge.feed([event("kvm_set_memslot", tgid=7, kvm=0xFFFF_C900_0000_2000)])
    assert judge.take_doubts() == ()
    judge.feed([event("kvm_set_memslot", tgid=7, kvm=0xFFFF_C900_0000_1000)])
    assert len(judge.take_doubts()) == 1


def test_of_others_nothing_is_said(judge: Judge) -> None:
    judge.feed([event("kvm_set_memslot", tgid=7), event("apply_to_page_range", mm=5, n=1), event("exit_mmap", tgid=7)])
    judge.feed([event("vmap", n=1, p0=pages(page(1))), event("vmap_ret", va=VA)])
    assert judge.take_doubts() == () and judge.hits(final=True) == [] and judge.ended_us is None


def test_one_mapping_of_which_two_functions_tell(judge: Judge) -> None:
    for name in ("ioremap_page_range", "vmap_page_range"):
        judge.feed([event(name, va=VA, end=VA + 0x1000, pa=FRAME << 12)])
    assert judge.count == 1
    judge.feed([event("ioremap_page_range", time=7, va=VA, end=VA + 0x1000, pa=1 << 12)])
    (mapping,) = judge.hits(final=False)  # another one is there now
    assert mapping.life_us == 6


def test_vmap_that_fails_maps_nothing(judge: Judge) -> None:
    judge.feed([event("vmap", n=1, p0=pages(page(FRAME))), event("vmap_ret", va=0)])
    assert judge.hits(final=True) == []


def test_threads_are_told_apart(judge: Judge) -> None:
    judge.feed([event("vmap", tid=1, n=1, p0=pages(page(FRAME))), event("vmap", tid=2, n=1, p0=pages(page(1)))])
    judge.feed([event("vmap_ret", tid=2, va=VA), event("vmap_ret", tid=1, va=VA + 0x2000)])
    (mapping,) = judge.hits(final=True)
    assert mapping.va == VA + 0x2000 and mapping.tid == 1


def test_frames_that_only_the_next_walk_finds(judge: Judge) -> None:
    made = event("ioremap_page_range", va=VA, end=VA + 0x1000, pa=0x7000_0000)
    judge.feed([made, event("remove_vm_area", time=5, va=VA)])
    assert judge.hits(final=True) == []
    (mapping,) = judge.walked(guest(0x70000))
    assert mapping.life_us == 4
    assert judge.walked(guest(0x70000)) == []


def test_a_mapping_that_stays_is_told_at_the_second_walk(judge: Judge) -> None:
    judge.feed([event("ioremap_page_range", va=VA, end=VA + 0x1000, pa=FRAME << 12)])
    assert judge.walked(guest()) == []  # it may just be ending, and the end tells how long it lived
    (mapping,) = judge.walked(guest(0x70000))  # whatever frames the guest has now
    assert mapping.life_us is None
    judge.feed([event("remove_vm_area", time=5, va=VA)])
    assert judge.walked(guest()) == []


def test_after_the_end_of_the_process_nothing_is_judged(judge: Judge) -> None:
    judge.feed([event("exit_mmap", time=9), event("ioremap_page_range", va=VA, end=VA + 0x1000, pa=FRAME << 12)])
    assert judge.hits(final=True) == [] and judge.ended_us == 9


def test_another_memory_that_ends_in_its_hands_is_not_its_own(judge: Judge) -> None:
    # As the last holder of /proc/PID/mem of a process that has ended.
    judge.has_memory = lambda: True
    judge.feed([event("exit_mmap", time=9), event("ioremap_page_range", va=VA, end=VA + 0x1000, pa=FRAME << 12)])
    assert len(judge.hits(final=True)) == 1 and judge.ended_us is None


def test_probes_are_well_formed() -> None:
    names = [probe.event for probe in PROBES]
    assert len(names) == len(set(names))
    assert {probe.mechanism for probe in PROBES} >= set(NEEDED)
    for probe in PROBES:
        line = probe.definition("offmap_1")
        assert line.startswith(("p:offmap_1/", "r:offmap_1/")) and len(line.split(" ")) <= 128


def test_a_kernel_without_kprobes_is_undetermined(tmp_path: Path) -> None:
    with pytest.raises(Undetermined, match="no kprobes"):
        Instance(tmp_path)


STATS = "entries: 1\noverrun: 2\ncommit overrun: 3\nbytes: 52\nnow ts: 20.98\ndropped events: 4\nread events: 9\n"
PROFILE = "  vmap    7    1\n  others    7    100\n  vmap_ret    7    0\n"


def test_lost_events_are_counted_and_not_guessed(tmp_path: Path) -> None:
    for cpu in range(2):
        (tmp_path / f"per_cpu/cpu{cpu}").mkdir(parents=True)
        (tmp_path / f"per_cpu/cpu{cpu}/stats").write_text(STATS)
    profile, stats = tmp_path / "kprobe_profile", tmp_path / "per_cpu/cpu1/stats"

    def missed(folder: Path = tmp_path) -> int | None:
        return missed_calls(folder, tmp_path, {"vmap", "vmap_ret"})

    assert missed() is None  # no profile
    profile.write_text(PROFILE)
    assert missed() == 2 * (2 + 3 + 4) + 1
    assert missed(tmp_path / "gone") is None
    profile.write_text(PROFILE.replace("vmap_ret", "another"))
    assert missed() is None
    profile.write_text(PROFILE)
    stats.write_text(STATS.replace("commit overrun", "something"))
    assert missed() is None
    stats.unlink()
    stats.mkdir()  # it cannot be read
    assert missed() is None


def test_a_trace_that_may_have_lost_events_is_undetermined(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int | None] = [0, None, 0, 5]
    monkeypatch.setattr(Instance, "__init__", lambda _: None)
    monkeypatch.setattr(Instance, "take", lambda _: "\n")
    monkeypatch.setattr(Instance, "missed", lambda _: counts.pop(0))
    monkeypatch.setattr(Instance, "lost_here", False, raising=False)
    monkeypatch.setattr(Instance, "not_traced", {}, raising=False)
    monkeypatch.setattr(Trace, "_try_out", lambda _: ())
    monkeypatch.setattr("offmap.audit.trace.trace._judge_of", lambda pid: Judge(pid, VMEMMAP, DIRECT, INIT_MM))
    trace = Trace(PID)
    said = [(found.verdict, found.undetermined) for found in (trace.look() for _ in range(4))]
    assert said == [
        (Verdict.HIDDEN, ()),
        (Verdict.UNKNOWN, ("whether events were lost could not be read",)),
        (Verdict.HIDDEN, ()),
        (Verdict.UNKNOWN, ("5 events were lost",)),
    ]
