# SPDX-License-Identifier: GPL-2.0
"""Which operations the kernel has."""

from __future__ import annotations

import errno
from typing import Final

from guest_tests.explorer.arena import Arena
from guest_tests.mm import ksm, memcg, numa, swap, syscalls, system, userfault
from guest_tests.mm.mapping import map_anonymous
from guest_tests.support.failing import RELOCATION
from harness.programs.language import FAILING, Kind

#: advice that not every kernel knows
_ADVICE: Final = {
    Kind.GUARD: syscalls.MADV_GUARD_INSTALL,
    Kind.UNGUARD: syscalls.MADV_GUARD_REMOVE,
    Kind.POPULATE: syscalls.MADV_POPULATE_WRITE,
    Kind.PAGEOUT: syscalls.MADV_PAGEOUT,
    Kind.COLD: syscalls.MADV_COLD,
    Kind.HUGEPAGE: syscalls.MADV_HUGEPAGE,
    Kind.NOHUGEPAGE: syscalls.MADV_NOHUGEPAGE,
    Kind.SOFT_OFFLINE: syscalls.MADV_SOFT_OFFLINE,
}
_KSM: Final = frozenset({Kind.MERGEABLE, Kind.UNMERGEABLE, Kind.SCAN, Kind.UNMERGE_ALL})
_POLICY: Final = frozenset({Kind.BIND, Kind.UNBIND})
_NAMES: Final = frozenset({Kind.NAME, Kind.UNNAME})
_USERFAULTS: Final = frozenset(
    {Kind.UFFD_REGISTER, Kind.UFFD_UNREGISTER, Kind.UFFD_PROTECT, Kind.UFFD_UNPROTECT, Kind.UFFD_MOVE}
)
_RELOCATE: Final = frozenset({Kind.MOVE_RELOCATE, Kind.MOVE_MUST_RELOCATE}) | FAILING


def _can_poke() -> bool:
    """Whether /proc/self/mem writes to memory that is read-only.

    Since 6.12 CONFIG_PROC_MEM_NO_FORCE and the parameter proc_mem.force_override can forbid it (fs/proc/base.c).
    """
    page = map_anonymous(1)
    page.mprotect(syscalls.PROT_READ)
    try:
        syscalls.poke(page.address, b"p")
    except OSError:
        return False
    finally:
        page.unmap()
    return True


def kinds() -> list[Kind]:
    """The kinds of operations that this kernel has, found by trying those that are not everywhere."""
    call, madvise = Arena().call, syscalls.number("madvise")
    # No bytes at no address: the advice alone is looked at (madvise_behavior_valid(), mm/madvise.c).
    missing = {kind for kind, advice in _ADVICE.items() if call(madvise, 0, 0, advice) == errno.EINVAL}
    if not ksm.available():
        missing |= _KSM
    if not system.supports_relocate():
        missing |= _RELOCATE
    if not RELOCATION.exists():
        missing |= FAILING
    if not memcg.available():
        missing.add(Kind.RECLAIM)
    if not swap.areas():
        missing.add(Kind.SWAPOFF)
    if not _can_poke():
        missing.add(Kind.POKE)
    # It does nothing for no memory, if the kernel has it.
    if call(syscalls.number("mbind"), 0, 0, numa.MPOL_DEFAULT):
        missing |= _POLICY
    if not system.has_vma_names():
        missing |= _NAMES
    uffd = userfault.without_reader()
    if uffd is None:
        missing |= _USERFAULTS
    else:
        if not uffd.features & userfault.FEATURE_MOVE:
            missing.add(Kind.UFFD_MOVE)
        uffd.close()
    if len(numa.nodes()) < 2:
        missing.add(Kind.WALK)
    return [kind for kind in Kind if kind not in missing]
