# SPDX-License-Identifier: GPL-2.0
"""``harness report``: writes results that were recorded in other formats."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from harness.errors import UsageError

#: The formats, by the name of their option.
_FORMATS = {
    "html": "as one HTML page",
    "junit": "as JUnit XML, valid against the schema of Jenkins' xUnit plug-in",
    "ktap": "as KTAP, which the kernel's kunit.py parses",
    "kcidb": "as a document for KCIDB, version 5.3; needs the extra kcidb",
}


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "report",
        help="write results that pytest --results=FILE recorded in other formats",
        description="Writes the results in one or more records, which pytest --results=FILE wrote, in other formats. "
        "Several records are put together. - stands for standard output.",
        epilog="Exit status: 0 all files were written, 1 the host failed, or tests regressed with --fail-on=regressed, "
        "2 a record or the command line makes no sense. Otherwise what the tests found does not change it.",
    )
    parser.add_argument("records", nargs="+", type=Path, metavar="RECORD", help="a file that --results wrote")
    for name, what in _FORMATS.items():
        parser.add_argument(f"--{name}", default="", metavar="FILE", help=f"write the results to FILE {what}")
    parser.add_argument(
        "--artifacts", default="", metavar="DIR", help="write the evidence of each failure to files in DIR"
    )
    parser.add_argument(
        "--kcidb-origin",
        default="mremap_harness",
        metavar="NAME",
        help="who submits the document for KCIDB (default: mremap_harness)",
    )
    parser.add_argument(
        "--artifacts-url",
        default="",
        metavar="URL",
        help="where the directory of --artifacts will be found; the document for KCIDB links to its files",
    )
    parser.add_argument(
        "--fail-on",
        choices=("regressed",),
        default="",
        help="exit with 1 unless nothing regressed against the first kernel of its architecture",
    )


def run(chosen: argparse.Namespace) -> int:
    """Run the command; returns its exit status."""
    from harness.report import compare, record, runs
    from harness.report.artifacts import Artifacts
    from harness.report.formats import Outputs

    wanted = {name: str(getattr(chosen, name)) for name in _FORMATS if getattr(chosen, name)}
    if not (wanted or chosen.fail_on or chosen.artifacts):
        options = ", ".join(f"--{name}=FILE" for name in _FORMATS)
        raise UsageError(f"say what to do with the results: {options}, --artifacts=DIR or --fail-on=regressed")
    settings = {
        "junit": {"artifacts": chosen.artifacts},
        "kcidb": {"origin": chosen.kcidb_origin, "artifacts_url": chosen.artifacts_url},
    }
    outputs = Outputs(wanted, {str(path): path for path in chosen.records}, settings)
    whole = runs.merge([record.read(path) for path in chosen.records])
    outputs.write(whole)
    if chosen.artifacts:
        artifacts = Artifacts(Path(chosen.artifacts))
        for item in whole.items:
            artifacts.add(item)
    found = [*whole.missing, *compare.objections(whole.compared)] if chosen.fail_on else []
    for note in dict.fromkeys((*whole.missing, *whole.notes, *found)):
        print(f"harness: {note}", file=sys.stderr)
    return 1 if found else 0
