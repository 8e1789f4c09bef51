# SPDX-License-Identifier: GPL-2.0
"""Measures how much of mm/ the explorer's programs reach, and how soon: would feedback of coverage find more?

::

    python -m tests.benchmark_coverage --kernel=relocate-anon:kcov --source=~/linux

The same number of programs is made with and without the preference for rare situations. The table, which is printed as
Markdown, says how many places of the functions in some files of mm/ were reached after how many programs. What is still
missing after a few thousand programs is all that feedback could bring.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from pathlib import Path
from typing import Final

from harness import arch
from harness.deadline import Deadline
from harness.guests.fleet import Fleet
from harness.host.terminal import ProgressLine
from harness.kernels import grammar
from harness.kernels.kernel import BootSpec
from harness.machine import provision
from harness.options import MachineOptions
from harness.programs import generate, language
from harness.programs.language import Kind

#: what the programs are about
FILES: Final = (
    *("mremap", "vma", "mmap", "rmap", "ksm", "migrate", "memory", "madvise", "mprotect", "mlock", "mempolicy"),
    *("userfaultfd", "huge_memory", "swapfile", "swap_state", "vmscan", "page_vma_mapped", "guard"),
)
#: programs of one order
_BATCH: Final = 100
#: after how many programs the table has a row
_ROWS: Final = (100, 300, 1000, 2000, 3000, 5000, 10000)
_FUNCTION: Final = re.compile(r"^(?!static inline)[a-z][\w \t*]*?\b(\w+)\(", re.MULTILINE)


def functions(source: Path) -> list[str]:
    """The names of the functions that are defined in these files of a kernel source."""
    texts = [path.read_text() for each in FILES if (path := source / "mm" / f"{each}.c").exists()]
    return sorted({name for text in texts for name in _FUNCTION.findall(text)})


def curve(spec: BootSpec, names: list[str], seed: int, programs: int, *, steered: bool, say: ProgressLine) -> list[int]:
    """How many places were reached after each batch."""
    generate._CANDIDATES = 3 if steered else 1
    # KCOV gives addresses as they were linked (canonicalize_ip(), kernel/kcov.c), kallsyms those of this boot.
    _, machine = provision.provision(spec, MachineOptions(append="nokaslr"), say)
    fleet = Fleet.with_library(machine, say)
    guest, _ = fleet.fresh()
    reached: list[int] = []
    try:
        wait = Deadline.after(programs)
        guest.call("guest_tests.explorer.coverage:main", {}, wait)
        kinds = [Kind(each) for each in guest.hear(wait)["kinds"]]
        guest.tell({"functions": names}, wait)
        generator = generate.Generator(seed, kinds)
        while len(reached) * _BATCH < programs:
            some = [language.to_wire(generator.next().program) for _ in range(_BATCH)]
            guest.tell({"programs": some}, wait)
            reached.append(int(guest.hear(wait)["reached"]))
            if not reached[-1]:
                raise SystemExit("no place was reached: --source is not of this kernel, or KCOV gives other addresses")
            how = "steered" if steered else "not steered"
            say(f"seed {seed}, {how}: {len(reached) * _BATCH} programs, {reached[-1]} places")
    finally:
        guest.close()
        fleet.close()
    return reached


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Measures how much of mm/ the explorer's programs reach.")
    parser.add_argument("--kernel", required=True, help="with the preset kcov")
    parser.add_argument("--source", type=Path, required=True, help="the kernel's source, for the names of functions")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--programs", type=int, default=3000)
    chosen = parser.parse_args()
    spec = grammar.parse(chosen.kernel, arch.find("x86_64"))
    assert isinstance(spec, BootSpec)
    names, say = functions(chosen.source.expanduser()), ProgressLine.on(sys.stderr)
    curves = {
        steered: [
            curve(spec, names, seed, chosen.programs, steered=steered, say=say) for seed in range(1, chosen.seeds + 1)
        ]
        for steered in (True, False)
    }
    say.clear()
    print("| programs | steered to rare situations | by weights alone |", "|---|---|---|", sep="\n")
    for count in (each for each in _ROWS if each <= chosen.programs):
        medians = [statistics.median(one[count // _BATCH - 1] for one in curves[steered]) for steered in (True, False)]
        print(f"| {count} | {medians[0]:.0f} | {medians[1]:.0f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
