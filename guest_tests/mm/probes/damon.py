# SPDX-License-Identifier: GPL-2.0
"""DAMON watching one page of physical memory, through sysfs (CONFIG_DAMON_SYSFS, 5.18; CONFIG_DAMON_PADDR).

Files and commands as in Documentation/admin-guide/mm/damon/usage.rst of Linux 6.12 to 7.3.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from guest_tests.mm import pagemap
from guest_tests.mm.mapping import PAGE_SIZE, map_anonymous
from guest_tests.mm.waiting import slowness

_KDAMONDS: Final = Path("/sys/kernel/mm/damon/admin/kdamonds")
#: CONFIG_DAMON_STAT_ENABLED_DEFAULT (6.17) starts a monitor of its own that lets nobody else watch
#: (damon_start() with "exclusive", mm/damon/stat.c).
_STAT: Final = Path("/sys/module/damon_stat/parameters/enabled")
_ANY: Final = 1 << 31
#: samples in an aggregation
_SAMPLES: Final = 4
#: Seconds. 6.12 waits a tenth of a second for the answer to a command (damon_sysfs_handle_cmd(), mm/damon/sysfs.c), and
#: 7.3 no longer than the thread needs (damon_call()).
_WAITS: Final = 0.09


def missing() -> str | None:
    """Why DAMON cannot watch physical memory here, or None."""
    if not _KDAMONDS.exists():
        return "needs CONFIG_DAMON_SYSFS and CONFIG_DAMON_PADDR (Linux 5.18)"
    if (_KDAMONDS / "nr_kdamonds").read_text().strip() != "0":
        return f"needs DAMON for itself, but {_KDAMONDS}/nr_kdamonds is not 0"
    try:
        (_KDAMONDS / "nr_kdamonds").write_text("1")
        (_KDAMONDS / "0/contexts/nr_contexts").write_text("1")
        offered = (_KDAMONDS / "0/contexts/0/avail_operations").read_text().split()
    finally:
        (_KDAMONDS / "nr_kdamonds").write_text("0")
    return None if "paddr" in offered else "needs CONFIG_DAMON_PADDR"


def zero_page() -> int:
    """The frame number of the zero page. DAMON sees no access to it, because it is on no LRU list
    (damon_get_folio(), mm/damon/ops-common.c).
    """
    scratch = map_anonymous(1)
    try:
        scratch.touch_read()
        return pagemap.pfn(scratch.address)
    finally:
        scratch.unmap()


class Kdamond:
    """DAMON's kernel thread, set up for one page frame and one scheme. A context manager that undoes everything.

    The zero page is monitored beside the frame. Kernels before July 2026 need two regions in different folios:
    __damon_pa_check_access() (mm/damon/paddr.c, since a28397beb55b, 5.16) reuses the result of the last sample if that
    was taken in the same folio. A monitor with one region of one page thus looks at the page once and repeats what it
    saw for ever. "mm/damon/paddr: drop last same folio access check reuse optimization" removed this; 6.1.188 and
    6.12.110 have that change. Seen on 6.16.12, 6.18.15 and 7.1.13.

    :param pfn: the frame.
    :param action: what the scheme does when it applies, e.g. ``stat`` (nothing but counting) or ``pageout``.
    :param accessed: whether the scheme applies only while the page is seen accessed.
    """

    def __init__(self, pfn: int, action: str, accessed: bool) -> None:
        self._frames = sorted([pfn, zero_page()])
        self._action = action
        self._accessed = accessed
        self._stat = ""
        self._fastest = math.inf  # seconds that a command took
        #: seconds between two looks at the page's accessed bits
        self.sample = 0.001 * slowness()
        #: seconds after which the scheme is applied to what was seen
        self.aggregation = _SAMPLES * self.sample

    def __enter__(self) -> Self:
        if _STAT.exists():
            self._stat = _STAT.read_text().strip()
            _STAT.write_text("N")
        (_KDAMONDS / "nr_kdamonds").write_text("1")
        try:
            self._prepare()
        except BaseException:
            self._undo()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._undo()

    def _prepare(self) -> None:
        (_KDAMONDS / "0/contexts/nr_contexts").write_text("1")
        for name, value in {
            "operations": "paddr",
            "monitoring_attrs/intervals/sample_us": int(self.sample * 1e6),
            "monitoring_attrs/intervals/aggr_us": int(self.aggregation * 1e6),
            "monitoring_attrs/nr_regions/min": 3,  # the least the kernel takes
            "monitoring_attrs/nr_regions/max": 4,
            "targets/nr_targets": 1,
            "targets/0/regions/nr_regions": len(self._frames),
            "targets/0/regions/0/start": self._frames[0] * PAGE_SIZE,
            "targets/0/regions/0/end": (self._frames[0] + 1) * PAGE_SIZE,
            "targets/0/regions/1/start": self._frames[1] * PAGE_SIZE,
            "targets/0/regions/1/end": (self._frames[1] + 1) * PAGE_SIZE,
            "schemes/nr_schemes": 1,
            "schemes/0/action": self._action,
            "schemes/0/access_pattern/sz/max": _ANY,
            "schemes/0/access_pattern/nr_accesses/min": int(self._accessed),
            "schemes/0/access_pattern/nr_accesses/max": _ANY,
            "schemes/0/access_pattern/age/max": _ANY,
        }.items():
            (_KDAMONDS / "0/contexts/0" / name).write_text(str(value))

    def _undo(self) -> None:
        if self.running:
            self.command("off")
        (_KDAMONDS / "nr_kdamonds").write_text("0")
        if self._stat == "Y":
            _STAT.write_text("Y")

    @property
    def running(self) -> bool:
        """Whether it watches."""
        return (_KDAMONDS / "0/state").read_text().strip() == "on"

    def command(self, word: str) -> None:
        """Give a command, such as ``on`` and ``off``.

        :raises OSError: EBUSY while somebody else watches exclusively, EINVAL if what was set up makes no sense.
        """
        (_KDAMONDS / "0/state").write_text(word)

    def applied(self) -> int:
        """How often the scheme's access pattern held so far, at the end of an aggregation."""
        self.command("update_schemes_stats")
        return int((_KDAMONDS / "0/contexts/0/schemes/0/stats/nr_tried").read_text())

    def settled(self) -> int:
        """The same when all that was seen until now has been counted: after the aggregation that has begun.

        The thread executes such a command itself, and at most one with each sample (kdamond_fn(), mm/damon/core.c of
        6.12 and 7.3). So this counts its samples. Time would say little: a guest on a busy host stands still again and
        again, and its clock goes on, so that two aggregations may pass with a sample or two. Older kernels take many
        samples while they wait for the answer to one command, so that one is enough.
        """
        for _ in range(_SAMPLES + 3):  # the sample that is being taken, and those before and after the count
            begin = time.monotonic()
            self.applied()
            self._fastest = min(self._fastest, time.monotonic() - begin)
            if self._fastest > _WAITS:
                break
        return self.applied()
