# SPDX-License-Identifier: GPL-2.0
"""Lets ``git bisect`` choose among the commits of a user's repository, in a repository of its own.

That repository is empty: it reads the objects of the user's. So the user's checkout, index, refs and a bisect of his
own under way are left alone, and no work tree is needed.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from harness.bisect.search import Ask, Direction, Found
from harness.bisect.step import Step
from harness.build.source import UNCONFIGURED, git_complaint, run_git
from harness.errors import HarnessError, SpecError
from harness.host import safe_text
from harness.report.state import State

#: The terms of ``git bisect`` for the older and the newer side. It does not let "good" be the newer one.
_TERMS = {State.GOOD: ("good", "bad"), State.BAD: ("broken", "fixed")}


class History:
    """The commits of a repository.

    :param tree: the top of the user's repository, or of one of its work trees.
    :param directory: an empty directory, for the repository of this bisect.
    :raises SpecError: if there is no repository.
    """

    def __init__(self, tree: Path, directory: Path) -> None:
        self.tree = tree
        self._directory = directory
        lines = self._ask("rev-parse", "--show-cdup", "--show-object-format", "--git-path", "objects").splitlines()
        if len(lines) != 3 or lines[0]:
            raise SpecError(f"{tree} is not the top of a git repository")
        self._git("init", "--quiet", "--bare", f"--object-format={lines[1]}", str(directory))
        (directory / "objects/info/alternates").write_text(f"{(tree / lines[2]).resolve()}\n")
        shallow = (tree / self._ask("rev-parse", "--git-path", "shallow")).resolve()
        if shallow.is_file():
            shutil.copyfile(shallow, directory / "shallow")

    def find(self, revision: str) -> str:
        """The ID of a commit.

        :raises SpecError: if there is none.
        """
        found = self._ask("rev-parse", "--verify", "--end-of-options", f"{revision}^{{commit}}")
        if not found:
            raise SpecError(f"{self.tree} has no revision {revision!r}: see git -C {self.tree} branch -a, or git tag")
        return found

    def name(self, commit: str) -> str:
        """A commit as a person names it: the short ID and the subject."""
        return safe_text.escape(self._ask("show", "--no-patch", "--format=%h %s", commit))

    def log(self) -> str:
        """What ``git bisect replay`` understands."""
        return self._said(self._git("bisect", "log"))

    def search(self, older: str, newer: str, ask: Ask, direction: Direction) -> Found:
        """Find the change between two commits, which are asked first.

        :raises WrongBaseline: if one of them is not as it should be.
        :raises HarnessError: if one of them has no verdict, or git sees no way between them.
        """
        steps = max(0, int(self._ask("rev-list", "--count", f"{older}..{newer}") or 1) - 1).bit_length()
        after = self._end(newer, ask(newer, steps + 1))
        direction.check_newer(after)
        before = self._end(older, ask(older, steps))
        direction.check_older(before)
        terms = dict(zip((direction.old, direction.new), _TERMS[direction.old], strict=True))
        self._git("update-ref", "--no-deref", "HEAD", newer)  # git bisect wants one
        options = (f"--term-old={terms[direction.old]}", f"--term-new={terms[direction.new]}")
        done = self._git("bisect", "start", "--no-checkout", *options, newer, older)
        answers = {older: before, newer: after}
        while not (found := _candidates(self._said(done))):
            commit = self._said(self._git("rev-parse", "--quiet", "--verify", "BISECT_HEAD"))
            if done.returncode or not commit:
                raise HarnessError(f"git bisect cannot go on: {_reason(done)}")
            step = answers[commit] = ask(commit, _roughly(self._said(done)))
            done = self._git("bisect", terms.get(step.state, "skip"), commit)
        return self._found(found, answers, direction)

    def _found(self, candidates: Sequence[str], answers: Mapping[str, Step], direction: Direction) -> Found:
        """The result, from the commits that git ends with. All but one of them have no verdict."""
        after = next(answers[each] for each in candidates if answers[each].state is direction.new)
        parents = self._ask("rev-list", "--parents", "--max-count=1", after.name).split()[1:]
        old = [each for each in answers.values() if each.state is direction.old]
        before = next((each for each in old if each.name in parents), old[-1])
        return Found(before, after, tuple(each for each in candidates if each != after.name))

    def _end(self, commit: str, step: Step) -> Step:
        if step.state is State.NONE:
            raise HarnessError(f"{self.name(commit)} has no verdict, and a bisect begins with two: give another commit")
        return step

    def _ask(self, *args: str) -> str:
        """What git says of the user's repository, which is only read; empty if it fails."""
        done = run_git(("-C", str(self.tree), *args))
        return self._said(done) if done.returncode == 0 else ""

    def _git(self, *args: str) -> subprocess.CompletedProcess[bytes]:
        return run_git(args, b"", GIT_DIR=str(self._directory), **UNCONFIGURED)

    @staticmethod
    def _said(done: subprocess.CompletedProcess[bytes]) -> str:
        return done.stdout.decode(errors="replace").rstrip("\n")


def _candidates(said: str) -> tuple[str, ...]:
    """The commits that git bisect ends with; empty while it goes on."""
    if one := re.search(r"^([0-9a-f]{40,64}) is the first \S+ commit$", said, re.M):
        return (one[1],)
    if "We cannot bisect more!" in said:
        return tuple(re.findall(r"^([0-9a-f]{40,64})$", said, re.M))
    return ()


def _roughly(said: str) -> int:
    """About how many more commits git will ask for, after the next one."""
    found = re.search(r"\(roughly (\d+) steps?\)", said)
    return int(found[1]) if found else 0


def _reason(done: subprocess.CompletedProcess[bytes]) -> str:
    lines = (done.stderr or done.stdout).decode(errors="replace").strip().splitlines()
    return " ".join(lines) if lines else git_complaint(done)
