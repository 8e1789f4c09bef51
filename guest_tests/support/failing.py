# SPDX-License-Identifier: GPL-2.0
"""Allocations and relocations of the kernel that are made to fail, one at a time (CONFIG_FAULT_INJECTION).

::

    with failing("slab"):
        injected, code = fails_at(3, call)  # the third allocation of this call fails
    with failing_relocation() as arm:
        arm(3)
        call()  # the third folio of this relocation is refused
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import pytest

from guest_tests.mm import system
from guest_tests.support.folios import knob

DEBUG: Final = Path("/sys/kernel/debug")
#: where the relocation of a chosen folio is made to fail; not every kernel with relocation has it
RELOCATION: Final = DEBUG / "fail_mremap_relocate"

#: what can be made to fail: the directory in debugfs, the option that brings it, and its settings
KINDS: Final[Mapping[str, tuple[str, str, Mapping[str, str]]]] = {
    "slab": ("failslab", "FAILSLAB", {}),
    "page-table": ("fail_page_alloc", "FAIL_PAGE_ALLOC", {"min-order": "0"}),
}


@contextmanager
def failing(kind: str) -> Iterator[None]:
    """Let allocations of one of the :data:`KINDS` fail where :func:`fails_at` says so. Skips where they cannot."""
    name, config, settings = KINDS[kind]
    place = DEBUG / name
    if not place.exists():
        pytest.skip(f"needs {place}, which this kernel does not have: CONFIG_{config}=y brings it")
    system.require_file("/proc/thread-self/fail-nth", "FAULT_INJECTION")
    with ExitStack() as stack:
        for setting, value in {"verbose": "0", "ignore-gfp-wait": "N", **settings}.items():
            stack.enter_context(knob(place / setting, value))
        yield


def fails_at(number: int, call: Callable[[], object]) -> tuple[bool, int]:
    """Make a call whose n-th allocation fails. Returns whether it had so many, and its error or 0."""
    fd = os.open("/proc/thread-self/fail-nth", os.O_RDWR)
    code = 0
    try:
        os.pwrite(fd, str(number).encode(), 0)
        try:
            call()
        except OSError as error:
            code = error.errno or -1
        injected = os.pread(fd, 16, 0).strip() == b"0"
        os.pwrite(fd, b"0", 0)
    finally:
        os.close(fd)
    return injected, code


# --- relocations -------------------------------------------------------------------------------------------------


@contextmanager
def failing_relocation() -> Iterator[Callable[[int], None]]:
    """A function that makes the relocation of the n-th folio from now on fail, once, in this thread.

    Skips where no relocation can be made to fail. The files are those of every fault attribute
    (Documentation/fault-injection/fault-injection.rst).
    """
    if not RELOCATION.exists():
        pytest.skip(
            f"needs {RELOCATION}: CONFIG_FAULT_INJECTION_DEBUG_FS=y, and a kernel that can fail at a chosen folio"
        )

    def arm(number: int) -> None:
        # "space" is compared before it is lowered, so that the kernel lets number - 1 folios pass (lib/fault-inject.c).
        (RELOCATION / "space").write_text(str(number))
        (RELOCATION / "times").write_text("1")

    settings = {"probability": "100", "interval": "1", "verbose": "0", "task-filter": "Y", "times": "0", "space": "0"}
    with ExitStack() as stack:
        for name, value in settings.items():
            stack.enter_context(knob(RELOCATION / name, value))
        stack.enter_context(knob("/proc/thread-self/make-it-fail", "1"))
        yield arm
