# SPDX-License-Identifier: GPL-2.0
"""Taking page frames out of use, and giving them back.

The files in /sys/devices/system/memory need CONFIG_MEMORY_FAILURE and CONFIG_MEMORY_HOTPLUG (drivers/base/memory.c).
Unlike madvise(2) they take a frame, not an address, so that nobody who maps it has to take part.
"""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Final

from guest_tests.mm import kpage
from guest_tests.mm.mapping import PAGE_SIZE
from guest_tests.mm.vmstat import meminfo

_MEMORY: Final = Path("/sys/devices/system/memory")
#: from the module hwpoison-inject (CONFIG_HWPOISON_INJECT), with debugfs mounted
_UNPOISON: Final = Path("/sys/kernel/debug/hwpoison/unpoison-pfn")
#: frames that may be out of use at a time, in kB; a guest is small
BUDGET_KB: Final = 16 << 10


def missing(kind: str) -> str | None:
    """Why the kernel cannot take frames out of use, or None.

    :param kind: "soft" or "hard".
    """
    if (_MEMORY / f"{kind}_offline_page").exists():
        return None
    return f"needs CONFIG_MEMORY_FAILURE and CONFIG_MEMORY_HOTPLUG: {_MEMORY}/{kind}_offline_page does not exist"


def over_budget() -> str | None:
    """Why no further frame may be used up, or None."""
    lost = meminfo().get("HardwareCorrupted", 0)
    if lost < BUDGET_KB:
        return None
    return f"{lost} kB of memory are poisoned already: load hwpoison-inject to have frames given back, or reboot"


def offline(kind: str, pfn: int) -> str:
    """Take frame ``pfn`` out of use: "soft" moves what it holds elsewhere, "hard" declares it lost.

    :returns: the error, as a remark, or nothing.
    """
    return attempt(_MEMORY / f"{kind}_offline_page", hex(pfn * PAGE_SIZE), f"{kind} offline")


def poisoned(pfn: int) -> bool:
    """Whether frame ``pfn`` is out of use."""
    return kpage.Flag.HWPOISON in kpage.flags(pfn)


def restore(pfn: int) -> str:
    """Give frame ``pfn`` back to the kernel if it was taken and that is possible.

    :returns: a remark if it remains out of use, or nothing.
    """
    if not poisoned(pfn):
        return ""
    why = attempt(_UNPOISON, str(pfn), "unpoison") if _UNPOISON.exists() else "no hwpoison-inject"
    return f"frame {pfn:#x} stays out of use ({why})" if poisoned(pfn) else ""


def attempt(path: Path, text: str, what: str) -> str:
    """Write ``text`` to a file of the kernel; returns the error as a remark, or nothing."""
    try:
        path.write_text(text)
    except OSError as error:
        return f"{what}: {errno.errorcode.get(error.errno or 0, str(error))}"
    return ""
