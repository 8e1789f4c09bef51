# SPDX-License-Identifier: GPL-2.0
"""Says why two adjacent VMAs are not merged, by the rules of ``can_vma_merge_before()`` and its helpers.

See mm/vma.c of Linux 6.12 and 7.3.
"""

from __future__ import annotations

from harness.audit.kernel import VM_SHARED, VM_SOFTDIRTY, Vma
from harness.audit.rmap import ReverseMap

#: names of the VMA flags that may differ between neighbours in practice (include/linux/mm.h)
_FLAGS = {
    0x1: "read",
    0x2: "write",
    0x4: "exec",
    VM_SHARED: "shared",
    0x2000: "locked",
    0x20000: "dontcopy",
    0x40000: "dontexpand",
    0x100000: "accounted",
    0x20000000: "hugepage",
    0x40000000: "nohugepage",
    0x80000000: "mergeable",
}


def apart(before: Vma, vma: Vma, rmap: ReverseMap, page_shift: int) -> tuple[str, ...]:
    """The reasons why ``before`` and ``vma`` are not merged, in words; empty if they are not adjacent.

    It is no kernel bug if there is no reason. The kernel merges VMAs only when it changes one of them.

    :param page_shift: log2 of the kernel's page size.
    """
    if before.end != vma.start:
        return ()
    reasons = []
    if differ := (before.flags ^ vma.flags) & ~VM_SOFTDIRTY:
        names = [name for bit, name in _FLAGS.items() if differ & bit]
        reasons.append(f"flags differ: {', '.join(names) or hex(differ)}")
    if before.file != vma.file or before.ops != vma.ops:
        reasons.append("different files")
    pages = before.end - before.start >> page_shift
    if before.pgoff + pages != vma.pgoff:
        reasons.append(f"page offset is {vma.pgoff:#x}, but merging needs {before.pgoff + pages:#x}")
    if before.file and not vma.flags & VM_SHARED and before.anon_pgoff + pages != vma.anon_pgoff:
        reasons.append(f"anonymous index is {vma.anon_pgoff:#x}, but merging needs {before.anon_pgoff + pages:#x}")
    if before.anon_vma and vma.anon_vma and before.anon_vma != vma.anon_vma:
        reasons.append("different anon_vmas")
    elif before.anon_vma != vma.anon_vma:
        faulted = rmap.anon_vma(before.anon_vma or vma.anon_vma)
        if faulted is not None and faulted.root != faulted.at:
            reasons.append("only one of them has an anon_vma, and it was inherited by fork")
    for what, one, other in (
        ("memory policies", before.policy, vma.policy),
        ("names", before.name, vma.name),
        ("userfaultfd contexts", before.uffd, vma.uffd),
    ):
        if one != other:
            reasons.append(f"different {what}")
    return tuple(reasons) or ("no reason: neither of them has changed since merging became possible",)
