# SPDX-License-Identifier: GPL-2.0
"""Kernel samepage merging: save and restore its knobs, wait for its scans, read its counters.

::

    with Ksm() as ksm:
        ksm.merge(mapping)     # makes it mergeable, scans, stops ksmd, asserts that every page was merged
        move(...)
        ksm.scan()             # lets ksmd scan again, and stops it
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from guest_tests.mm import kpage, maps, pagemap, syscalls
from guest_tests.mm.mapping import PAGE_SIZE, Mapping
from guest_tests.mm.waiting import wait_until
from harness.agent.processes import kernel_thread, state_of

DIRECTORY: Final = Path("/sys/kernel/mm/ksm")

#: Writable knobs in the order in which they are restored. The advisor's mode comes before the number of pages: changing
#: it resets that number, and the number cannot be written while the advisor is on.
KNOBS: Final = (
    "merge_across_nodes",  # 3.9, CONFIG_NUMA; EBUSY while pages are shared
    "max_page_sharing",  # 4.13; EBUSY while pages are shared
    "use_zero_pages",  # 4.12
    "stable_node_chains_prune_millisecs",  # 4.13
    "smart_scan",  # 6.7
    "advisor_max_cpu",  # 6.8, like all of the advisor
    "advisor_min_pages_to_scan",
    "advisor_max_pages_to_scan",
    "advisor_target_scan_time",
    "advisor_mode",
    "pages_to_scan",
    "sleep_millisecs",
    "run",
)
#: knobs that the kernel refuses to change while any page is shared
_NEED_UNMERGED: Final = ("merge_across_nodes", "max_page_sharing")
#: Settings for tests: each scan is complete, immediate, and skips nothing. A batch ends with the scan it is in, and
#: `run` cannot be written during a batch (mm/ksm.c, ksm_thread_mutex), so that ksmd always stops between two scans.
_FOR_TESTS: Final[dict[str, int | str]] = {
    "smart_scan": 0,
    "advisor_mode": "none",
    "pages_to_scan": 1 << 24,
    "sleep_millisecs": 0,
}


@dataclass(frozen=True)
class Counters:
    """System-wide counters, in pages unless said otherwise. None where the kernel has no such file."""

    #: merged pages in use
    pages_shared: int
    #: further mappings of merged pages: how many pages are saved
    pages_sharing: int
    #: scanned repeatedly, and equal to no other page
    pages_unshared: int
    #: changing too fast to be merged
    pages_volatile: int
    #: complete scans of all mergeable memory
    full_scans: int
    #: merged pages that have more than max_page_sharing mappings (4.13)
    stable_node_chains: int | None = None
    #: their copies (4.13)
    stable_node_dups: int | None = None
    #: empty pages replaced by the zero page, under use_zero_pages (6.6)
    ksm_zero_pages: int | None = None
    #: (6.6)
    pages_scanned: int | None = None
    #: passed over by smart_scan (6.7)
    pages_skipped: int | None = None
    #: bytes, may be negative (6.4)
    general_profit: int | None = None


@dataclass(frozen=True)
class KsmStat:
    """KSM's numbers of one process, from /proc/PID/ksm_stat (6.1). None where the kernel has no such line."""

    #: pages that ksmd keeps track of
    rmap_items: int
    #: pages merged (6.4)
    merging_pages: int | None = None
    #: pages replaced by the zero page (6.6)
    zero_pages: int | None = None
    #: bytes, may be negative (6.4)
    process_profit: int | None = None
    #: whether PR_SET_MEMORY_MERGE is on (after 6.12)
    merge_any: bool | None = None
    #: whether any mapping is mergeable (after 6.12)
    mergeable: bool | None = None


def available() -> bool:
    """Whether the kernel has KSM at all."""
    return DIRECTORY.is_dir()


def read(knob: str) -> int:
    """Read a number below /sys/kernel/mm/ksm.

    :raises FileNotFoundError: if this kernel does not have it.
    """
    return int(read_text(knob))


def read_text(knob: str) -> str:
    """Read a knob; of a choice like advisor_mode, the chosen word."""
    text = (DIRECTORY / knob).read_text().strip()
    return text[text.index("[") + 1 : text.index("]")] if "[" in text else text


def write(knob: str, value: int | str) -> None:
    """Write a knob, exactly as given.

    :raises OSError: EINVAL for a value out of range, EBUSY for what cannot change while pages are shared.
    """
    with open(DIRECTORY / knob, "w") as file:
        file.write(str(value))


def scan_for(seconds: float) -> None:
    """Let ksmd scan for a while, however far it comes. :class:`Ksm` is for scans that end."""
    write("run", 1)
    time.sleep(seconds)
    write("run", 0)


def counters() -> Counters:
    """All counters, read one after the other: each has a file of its own."""
    names = [field.name for field in fields(Counters)]
    return Counters(**{name: read(name) for name in names if (DIRECTORY / name).exists()})


def stat(pid: int | str = "self") -> KsmStat:
    """KSM's numbers of a process.

    :raises FileNotFoundError: without CONFIG_KSM, or if there is no such process.
    """
    words: dict[str, str] = {}
    for line in Path(f"/proc/{pid}/ksm_stat").read_text().splitlines():
        key, value = line.split()
        words[key.rstrip(":").removeprefix("ksm_")] = value
    return KsmStat(
        rmap_items=int(words["rmap_items"]),
        merging_pages=_number(words, "merging_pages"),
        zero_pages=_number(words, "zero_pages"),
        process_profit=_number(words, "process_profit"),
        merge_any=_yes(words, "merge_any"),
        mergeable=_yes(words, "mergeable"),
    )


def _number(words: dict[str, str], key: str) -> int | None:
    return int(words[key]) if key in words else None


def _yes(words: dict[str, str], key: str) -> bool | None:
    return words[key] == "yes" if key in words else None


def merging_pages(pid: int | str = "self") -> int:
    """Pages merged for a process, from /proc/PID/ksm_merging_pages (5.19)."""
    return int(Path(f"/proc/{pid}/ksm_merging_pages").read_text())


def merged(address: int, pages: int, pid: int | str = "self") -> list[bool]:
    """For each page from ``address`` whether a merged page is present there. KSM's zero pages do not count.

    :raises RuntimeError: if the kernel does not show the state of a page (see
        :func:`guest_tests.mm.kpage.tells_ksm`) and the sum in smaps leaves it open.
    """
    frames = pagemap.pfns(address, pages, pid)
    if kpage.tells_ksm():
        return [frame is not None and kpage.Flag.KSM in kpage.flags(frame) for frame in frames]
    known: set[int] = set()
    for vma in maps.vmas_between(address, address + pages * PAGE_SIZE, pid, detailed=True):
        known |= _merged_frames(vma, pid)
    return [frame in known for frame in frames]


def _merged_frames(vma: maps.Vma, pid: int | str) -> set[int]:
    """The frames of ``vma`` that KSM merged, from the sum in smaps alone."""
    count = vma.size("KSM") * 1024 // PAGE_SIZE
    if not count:
        return set()
    entries = pagemap.entries(vma.start, vma.length // PAGE_SIZE, pid)
    anonymous = [
        entry
        for entry in entries
        if entry.pfn is not None and not entry.file and kpage.Flag.ANON in kpage.flags(entry.pfn)
    ]
    shared = [entry for entry in anonymous if not entry.exclusive]
    for candidates in (anonymous, shared):
        if len(candidates) == count:
            return {entry.pfn for entry in candidates if entry.pfn is not None}
    raise RuntimeError(
        f"cannot tell which {count} of {len(anonymous)} pages at {vma} are merged: this kernel's kpageflags calls all "
        f"anonymous pages KSM, and {len(shared)} are mapped more than once"
    )


def is_ksm(address: int, pid: int | str = "self") -> bool:
    """Whether a merged page is present at ``address``; False where nothing is present. As :func:`merged`."""
    return merged(address, 1, pid)[0]


class _Pause:
    """The minute for which ksmd sleeps after pages_to_scan pages.

    A change of sleep_millisecs while ksmd sleeps ends it (ksm_do_scan() and ksm_scan_thread(), mm/ksm.c).
    """

    def __init__(self) -> None:
        ksmd = kernel_thread("ksmd")
        assert ksmd is not None, "ksmd does not run, although this kernel has KSM"
        self._ksmd = ksmd

    def begun(self) -> None:
        """Wait until ksmd sleeps."""
        wait_until(lambda: state_of(self._ksmd) == "S", "ksmd to sleep")

    def end(self) -> None:
        """Wake ksmd."""
        write("sleep_millisecs", 60_001 if read("sleep_millisecs") == 60_000 else 60_000)


class Ksm:
    """Control of KSM: ksmd is stopped except during :meth:`scan`. Every knob is restored in the end."""

    def __init__(self) -> None:
        self._saved: dict[str, str] = {}

    def __enter__(self) -> Self:
        if not available():
            raise FileNotFoundError(f"{DIRECTORY} is missing: the kernel was built without CONFIG_KSM")
        self._saved = {knob: read_text(knob) for knob in KNOBS if (DIRECTORY / knob).exists()}
        self.stop()
        # The mode first: see KNOBS.
        for knob in sorted(_FOR_TESTS, key=KNOBS.index):
            if knob in self._saved:
                write(knob, _FOR_TESTS[knob])
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()
        if any(read_text(knob) != self._saved[knob] for knob in _NEED_UNMERGED if knob in self._saved):
            self.unmerge_all()
        for knob, value in self._saved.items():
            if knob == "pages_to_scan" and self._saved.get("advisor_mode", "none") != "none":
                continue  # the advisor sets it
            if read_text(knob) != value:
                write(knob, value)

    def set(self, **knobs: int | str) -> None:
        """Write knobs, un-merging everything first where the kernel asks for that.

        :raises OSError: EINVAL for a value out of range, ENOENT for a knob this kernel does not have.
        """
        for knob, value in knobs.items():
            if knob in _NEED_UNMERGED and read_text(knob) != str(value):
                self.unmerge_all()
            write(knob, value)

    def stop(self) -> None:
        """Stop ksmd. When this returns it has stopped: the kernel finishes the batch under way first."""
        write("run", 0)

    def scan(self, passes: int = 3, *, seconds: float = 20.0) -> None:
        """Let ksmd complete at least ``passes`` scans of all mergeable memory, then stop it.

        Merging takes two complete scans (the first only notes each page's checksum), and the scan under way when
        ksmd is started may have passed the pages already: three are always enough.

        :param seconds: how long an ordinary machine may take.
        :raises TimeoutError: if ksmd makes no progress, for example because no memory is mergeable.
        """
        goal = read("full_scans") + passes
        write("run", 1)
        try:
            # ksmd has nice 5 and gets no time while another process is busy.
            wait_until(lambda: read("full_scans") >= goal, f"{passes} full scans of ksmd", seconds)
        finally:
            self.stop()

    def scan_exactly(self, passes: int) -> None:
        """Let ksmd complete a number of scans and no more, if all mergeable memory is less than pages_to_scan.

        A pause of a minute follows each scan, and is ended before the next one.

        :raises TimeoutError: if ksmd makes no progress.
        """
        self.stop()
        pause = _Pause()
        for _ in range(passes):
            pause.begun()
            pause.end()
            pause.begun()
            self.scan(1)

    def scan_until(self, done: Callable[[], bool], what: str) -> None:
        """Let ksmd scan one page at a time until ``done()``, and stop it in the middle of a scan.

        A pause of a minute follows each page, and is ended after ``done()`` was asked.

        :param what: completes "waiting for …".
        :raises TimeoutError: if ``done()`` is not true in time.
        """
        self.set(pages_to_scan=1, sleep_millisecs=60_000)
        pause = _Pause()

        def step() -> bool:
            pause.begun()
            if done():
                return True
            pause.end()
            return False

        write("run", 1)
        try:
            # Less than a whole test may take, so that the test says what it waited for.
            wait_until(step, what, seconds=8.0)
        finally:
            self.stop()

    def merge(self, *mappings: Mapping, passes: int = 3) -> None:
        """Make ``mappings`` mergeable, scan, and assert that every page of them was merged.

        :raises AssertionError: naming a page that was not merged.
        """
        for mapping in mappings:
            mapping.madvise(syscalls.MADV_MERGEABLE)
        self.scan(passes)
        for mapping in mappings:
            state = merged(mapping.address, mapping.pages)
            if not all(state):
                index = state.index(False)
                raise AssertionError(
                    f"page {index} of mapping {mapping.address:#x} was not merged by {passes} full scans: "
                    f"pagemap says {pagemap.entry(mapping.page(index))}; {counters()}"
                )

    def unmerge_all(self) -> None:
        """Un-merge every page of the system by copying, and leave ksmd stopped.

        :raises OSError: ENOMEM if there is no memory for the copies, EINTR on a signal.
        """
        # Writing the present value would do nothing.
        write("run", 0)
        write("run", 2)

    @staticmethod
    def counters() -> Counters:
        """See :func:`counters`."""
        return counters()
