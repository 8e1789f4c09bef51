# SPDX-License-Identifier: GPL-2.0
"""``harness audit``: audits a memory dump, or the guest of one test."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from harness.audit import debuginfo, formats, picture, walk
from harness.audit.memory import Facts
from harness.errors import UsageError
from harness.host.cache import Cache, Progress

if TYPE_CHECKING:
    import pytest

_RANGE = re.compile(r"(\d+):(?:0x)?([0-9a-f]+)-(?:0x)?([0-9a-f]+)")


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "audit",
        help="check in a memory dump, or after a test, that rmap walks find every anonymous mapping",
        description="Audits a memory dump (dump-guest-memory, virsh dump --memory-only, kdump) or the guest of a test.",
        epilog="Exit status: 0 if the reverse map has no errors; 1 if it has, if the dump cannot be read, or if "
        "nothing was audited; 2 if the options are wrong.",
    )
    parser.add_argument("dump", nargs="?", type=Path, metavar="DUMP", help="the dump")
    parser.add_argument(
        "--vmlinux",
        type=Path,
        metavar="FILE",
        help="the vmlinux of the dump's kernel, with debug information; needed only once for each kernel",
    )
    parser.add_argument(
        "--pid",
        type=int,
        action="append",
        default=[],
        help="audit only this process and its descendants; may be repeated",
    )
    parser.add_argument(
        "--picture", type=Path, metavar="FILE", help="draw moved VMAs and errors into this file: .html or .svg"
    )
    parser.add_argument(
        "--range",
        action="append",
        default=[],
        metavar="PID:START-END",
        help="draw this address range instead (hexadecimal); may be repeated",
    )
    parser.add_argument(
        "--merges", action="store_true", help="say for each pair of adjacent VMAs why they are not merged"
    )
    parser.add_argument("--kernel", metavar="SPEC", help="run one test on this kernel, and audit its guest")
    parser.add_argument("--arch", metavar="ARCH", help="an architecture such as arm64, with --kernel")
    parser.add_argument("-k", dest="test", metavar="EXPRESSION", help="which test, with --kernel, as for pytest")


def run(options: argparse.Namespace, progress: Progress) -> int:
    """Run the command.

    :raises UsageError: if the options do not go together.
    :raises HarnessError: if the dump cannot be audited.
    """
    if options.kernel:
        if options.dump or not options.test:
            raise UsageError("--kernel audits the guest of a test: give -k EXPRESSION, and no dump")
        return _run_test(options)
    if options.dump is None:
        raise UsageError("give a dump, or --kernel=SPEC -k EXPRESSION")
    return _audit_dump(options, progress)


class _Counting:
    """A pytest plug-in that counts the audits which tests report."""

    def __init__(self) -> None:
        self.audits = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count the audits of one report; pytest calls this."""
        self.audits += sum(int(str(value).split()[0]) for name, value in report.user_properties if name == "audits")


def _run_test(options: argparse.Namespace) -> int:
    import pytest

    arch = [f"--arch={options.arch}"] if options.arch else []
    counting = _Counting()
    arguments = [f"--kernel={options.kernel}", *arch, "--audit=end", "-k", options.test, "-rA"]
    status = int(pytest.main(arguments, plugins=[counting]))
    if status == 0 and not counting.audits:
        print(
            f"nothing was audited: no test of -k {options.test!r} moved memory in a guest that can be audited. "
            "Choose a test that moves memory, on a kernel with debug information",
            file=sys.stderr,
        )
        return 1
    return status


def _audit_dump(options: argparse.Namespace, progress: Progress) -> int:
    with formats.opened(options.dump) as image:
        known = debuginfo.find(Facts.parse(image.vmcoreinfo).build_id, options.vmlinux, Cache(progress=progress))
        audit = walk.audit(image, known, pids=options.pid)
        print(audit.report())
        if options.merges:
            for region in audit.regions:
                for reason in region.apart:
                    print(f"{region.process} {region.name}: {reason}")
        if options.picture:
            ranges = [_range(text) for text in options.range] or picture.interesting(audit)
            drawn = walk.audit(image, known, pids=options.pid, keep=walk.pages_between(ranges))
            picture.save(options.picture, f"Audit of {options.dump.name}", [picture.Panel(str(options.dump), drawn)])
            print(f"drawn in {options.picture}", file=sys.stderr)
    return 1 if audit.errors or audit.unlisted else 0


def _range(text: str) -> tuple[int, int, int]:
    match = _RANGE.fullmatch(text)
    if match is None:
        raise UsageError(f"--range={text} is not an address range: give PID:START-END, with addresses in hexadecimal")
    return int(match[1]), int(match[2], 16), int(match[3], 16)
