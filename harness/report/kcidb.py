# SPDX-License-Identifier: GPL-2.0
"""Writes results as a KCIDB document, version 5.3: checkouts, builds, tests, and the known bugs that they show.

Identifiers are made of what they name, so a document that is made again of the same records replaces the first one.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote

from harness.errors import HostError, UsageError
from harness.judging.findings import known
from harness.report import artifacts, costs
from harness.report.costs import Cost
from harness.report.record import Item
from harness.report.results import Outcome
from harness.report.runs import KernelRun, Run

#: The origin where none is given. Whoever submits documents has one of their own.
ORIGIN = "mremap_harness"

#: The limit of the schema for an excerpt of a log.
_EXCERPT = 16384

#: Addresses to which the name of a file may be added.
_ADDRESS = re.compile(r"https?://[A-Za-z0-9.-]+(:\d+)?(/[A-Za-z0-9._~%!$&'()*+,;=:@/-]*)?")

#: The version of an issue. It has to grow when a finding's text changes so much that incidents are judged again.
_ISSUE_VERSION = 1


def text(run: Run, *, origin: str = ORIGIN, artifacts_url: str = "") -> str:
    """The text of the file.

    :param origin: who submits it, in the words of KCIDB.
    :param artifacts_url: where the directory of ``--artifacts`` will be found; empty if it will not.
    :raises UsageError: if one of them is not in the form that the schema wants.
    :raises HostError: if kcidb-io is not installed.
    """
    if not re.fullmatch(r"[a-z0-9_]+", origin):
        raise UsageError(f"{origin!r} is no origin of KCIDB: use lower case letters, digits and underscores")
    if artifacts_url and not _ADDRESS.fullmatch(artifacts_url):
        raise UsageError(f"{artifacts_url!r} is no address of artifacts: give one like https://ci.example/run/1")
    document = _Document(run, origin, artifacts_url.rstrip("/")).data()
    _check(document)
    return json.dumps(document, indent=1, allow_nan=False) + "\n"


def _check(document: Mapping[str, Any]) -> None:
    """Check a document against the published schema.

    :raises UsageError: if it is not valid. A record that somebody edited may give such a document.
    :raises HostError: if kcidb-io is not installed.
    """
    try:
        # An extra: type checkers need not find it.
        schema: Any = importlib.import_module("kcidb_io.schema").V5_3
        invalid: type[Exception] = importlib.import_module("jsonschema").ValidationError
    except ImportError:
        raise HostError(
            "writing for KCIDB takes kcidb-io, which is not installed here: pip install 'mremap-harness[kcidb]'"
        ) from None
    try:
        schema.validate(document)
    except invalid as error:
        why = str(error).partition("\n")[0][:300]
        raise UsageError(f"these results do not fit the schema of KCIDB: {why}; was the record edited?") from error


class _Document:
    def __init__(self, run: Run, origin: str, artifacts_url: str) -> None:
        self._run = run
        self._origin = origin
        self._artifacts_url = artifacts_url

    def data(self) -> dict[str, Any]:
        """The document."""
        tests = [(item, self._test(kernel, item)) for kernel in self._run.kernels for item in kernel.items]
        findings = dict.fromkeys(item.finding for item, _ in tests if _tells(item) is not None)
        incidents = [self._incident(item, test["id"]) for item, test in tests if _tells(item) is not None]
        return {
            "version": {"major": 5, "minor": 3},
            "checkouts": [self._checkout(each) for each in self._run.kernels],
            "builds": [self._build(each) for each in self._run.kernels],
            "tests": [test for _, test in tests],
            "issues": [self._issue(name) for name in findings],
            "incidents": incidents,
        }

    def _id(self, *parts: str) -> str:
        digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()
        return f"{self._origin}:{digest[:32]}"

    def _checkout_id(self, kernel: KernelRun) -> str:
        facts = kernel.facts
        return self._id("checkout", facts.spec, facts.release, facts.provenance)

    def _build_id(self, kernel: KernelRun) -> str:
        return self._id("build", self._checkout_id(kernel), kernel.facts.arch)

    def _checkout(self, kernel: KernelRun) -> dict[str, Any]:
        facts = kernel.facts
        return _told(
            id=self._checkout_id(kernel),
            origin=self._origin,
            comment=facts.provenance or facts.spec,
            patchset_hash=facts.patchset_hash,
            start_time=_time(self._run.started),
            misc={"spec": facts.spec, "release": facts.release, "version": facts.version},
        )

    def _build(self, kernel: KernelRun) -> dict[str, Any]:
        facts = kernel.facts
        return _told(
            id=self._build_id(kernel),
            checkout_id=self._checkout_id(kernel),
            origin=self._origin,
            comment=facts.label,
            architecture=facts.arch,
            compiler=facts.compiler,
            config_name=facts.configuration,
            status="PASS" if facts.release else "",
        )

    def _test(self, kernel: KernelRun, item: Item) -> dict[str, Any]:
        facts = kernel.facts
        return _told(
            id=self._id("test", self._build_id(kernel), item.test, str(item.start)),
            build_id=self._build_id(kernel),
            origin=self._origin,
            path=_path(item.test),
            comment=item.test,
            status=item.verdict,
            start_time=_time(item.start) if item.start else "",
            duration=item.duration,
            number=_number(item),
            log_excerpt=_excerpt(item),
            output_files=list(self._files(item)),
            environment=_told(
                comment=" ".join(filter(None, (item.guest, facts.accelerator))),
                misc=_told(guest=item.guest, accelerator=facts.accelerator, harness=self._run.harness),
            ),
            misc=_told(outcome=item.outcome, message=item.message, finding=item.finding, properties=item.properties),
        )

    def _files(self, item: Item) -> Iterator[dict[str, str]]:
        if self._artifacts_url and item.failed:
            place = quote(artifacts.place(item).as_posix())
            for name in artifacts.contents(item):
                yield {"name": name, "url": f"{self._artifacts_url}/{place}/{name}"}

    def _issue(self, finding: str) -> dict[str, Any]:
        about = known().get(finding)
        return _told(
            id=self._id("issue", finding),
            version=_ISSUE_VERSION,
            origin=self._origin,
            comment=f"{finding}: {about.summary}" if about else finding,
            culprit={"code": True, "tool": False, "harness": False},
        )

    def _incident(self, item: Item, test_id: str) -> dict[str, Any]:
        return {
            "id": self._id("incident", test_id, item.finding),
            "origin": self._origin,
            "issue_id": self._id("issue", item.finding),
            "issue_version": _ISSUE_VERSION,
            "test_id": test_id,
            "present": _tells(item),
        }


def _tells(item: Item) -> bool | None:
    """Whether a finding shows; None if the test says nothing of it, or is an ordinary one."""
    return {Outcome.XFAILED.value: True, Outcome.PASSED.value: False}.get(item.outcome) if item.finding else None


def _told(**values: Any) -> dict[str, Any]:
    """An object without what is not known: the schema has no empty values."""
    return {name: value for name, value in values.items() if value not in ("", None, [], (), {})}


def _path(test: str) -> str:
    """The place of a test in the tree of all tests: names joined by dots, of the characters that are allowed."""
    module, _, name = test.partition("::")
    function, _, parameters = name.partition("[")
    parts = (module.rpartition("/")[2].removesuffix(".py"), *function.split("::"), parameters.removesuffix("]"))
    clean = (re.sub(r"[^A-Za-z0-9_-]+", "_", each) for each in parts if each)
    return ".".join(("mremap_harness", *clean))


def _number(item: Item) -> dict[str, Any]:
    """What a move cost, if the test measured one."""
    found = [each for each in costs.records([item.result], item.label) if isinstance(each, Cost) and not each.missing]
    return {"value": found[0].instructions, "unit": "instructions"} if len(found) == 1 else {}


def _excerpt(item: Item) -> str:
    """The end of the most telling section: the console if there is something on it, or else the failure."""
    sections: Mapping[str, str] = dict(item.sections)
    console = sections.get("kernel console", "").strip()
    failure = next(iter(sections.values()), "")
    return (console if console not in ("", "(nothing)") else failure)[-_EXCERPT:]


def _time(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(seconds))
