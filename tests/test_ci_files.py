# SPDX-License-Identifier: GPL-2.0
"""The files in ``docs/ci/``: their own linters accept them, and what they run exists. Nothing boots."""

from __future__ import annotations

import argparse
import fcntl
import functools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness.commands import cli
from harness.host import requirements
from harness.paths import PROJECT

CI = PROJECT / "docs/ci"
WORKFLOW, JOB, SCRIPT, CONTAINER = (
    CI / name for name in ("github-workflow.yml", "gitlab-ci.yml", "cron.sh", "Containerfile")
)
PAGE = PROJECT / "docs/ci.md"

#: yamllint's own rules, with the width of this project's lines.
RULES = "{extends: default, rules: {line-length: {max: 120}, document-start: disable}}"


def run(*command: str, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, **more)


def module(*command: str) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "-m", *command)


# --- scripts in the files --------------------------------------------------------------------------------------------


def strings(node: Any) -> Iterator[str]:
    for each in node.values() if isinstance(node, dict) else node:
        if isinstance(each, str):
            yield each
        elif isinstance(each, dict | list):
            yield from strings(each)


def scripts(path: Path) -> list[str]:
    """The shell scripts in a file."""
    text = path.read_text()
    if path == SCRIPT:
        return [text]
    if path == WORKFLOW:
        # GitHub puts values in the place of its expressions before a shell sees them.
        steps = yaml.safe_load(text)["jobs"]["guests"]["steps"]
        return [re.sub(r"\$\{\{.*?\}\}", "value", step["run"]) for step in steps if "run" in step]
    if path == JOB:
        job = yaml.safe_load(text)["mremap"]
        return [line for name in ("before_script", "script", "after_script") for line in job[name]]
    if path == CONTAINER:
        shown = re.findall(r"^#   (podman (?:.*\\\n)*.*)$", text, re.M)
        built = re.findall(r"^RUN (.*)$", re.sub(r"\\\n\s*", "", text), re.M)
        return [*built, *(re.sub(r"^#\s*", "", each, flags=re.M) for each in shown)]
    return list(re.findall(r"^```\n(.*?)^```", text, re.M | re.S))


FILES = (WORKFLOW, JOB, SCRIPT, CONTAINER, PAGE)


def parts(path: Path) -> Iterator[list[str]]:
    """The words of each simple command in a file's scripts."""
    for script in scripts(path):
        for line in re.sub(r"\\\n", " ", script).splitlines():
            for part in re.split(r"&&|\|\||[|;]", re.sub(r"(^|\s)#\s.*", "", line)):
                if re.search(r"\b(harness|pytest|make)\b", part):
                    yield shlex.split(re.sub(r"\d?[<>]+\S*", " ", part))


def commands(path: Path) -> list[list[str]]:
    """The commands of this project that a file runs: the name, and its arguments."""
    found = []
    for words in parts(path):
        if words[:2] == ["podman", "run"]:  # in the image, what follows its name is for harness
            found.append(["harness", *(words[words.index("mremap-harness") + 1 :] or ["doctor"])])
        for place, word in enumerate(words):
            if os.path.basename(word) in ("harness", "pytest") and words[:place] in ([], ["nice"]):
                found.append([os.path.basename(word), *words[place + 1 :]])
    return found


@functools.cache
def pytest_options() -> set[str]:
    """pytest's own options and those of its plug-ins, from its help."""
    return {plain(each) for each in re.findall(r"(?<![\w-])--?[a-z][\w-]*", module("pytest", "--help").stdout)}


def plain(option: str) -> str:
    """An option without the dashes in the middle: pytest takes --junitxml for --junit-xml."""
    return option[:2] + option[2:].replace("-", "")


def unknown(command: list[str]) -> str:
    """What a command has that does not exist; empty if all of it does."""
    name, *words = command
    given = [word.partition("=")[0] for word in words if word.startswith("-")]
    if name == "pytest" or words[0] == "test":
        return " ".join(each for each in given if plain(each) not in pytest_options())
    (action,) = (each for each in cli._parser()._actions if isinstance(each, argparse._SubParsersAction))
    parser = action.choices.get(words[0])
    if parser is None:
        return words[0]
    return " ".join(each for each in given if each not in parser._option_string_actions)


# --- linters ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [WORKFLOW, JOB], ids=lambda path: path.name)
def test_yamllint_accepts(path: Path) -> None:
    done = module("yamllint", "--strict", "-d", RULES, str(path))
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("path", "options"),
    [(WORKFLOW, ["vendor.github-workflows"]), (JOB, ["vendor.gitlab-ci", "--data-transform", "gitlab-ci"])],
    ids=["github", "gitlab"],
)
def test_the_schema_of_the_service_accepts(path: Path, options: list[str]) -> None:
    done = module("check_jsonschema", "--builtin-schema", *options, str(path))
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("runs-on:", "runs-at:"),
        ("timeout-minutes: 120", "timeout-minutes: long"),
        ("      - name: Test", "      - nome: Test"),
    ],
)
def test_the_schema_notices_a_slip(tmp_path: Path, old: str, new: str) -> None:
    text = WORKFLOW.read_text()
    assert text.count(old) == 1
    (tmp_path / "workflow.yml").write_text(text.replace(old, new))
    done = module("check_jsonschema", "--builtin-schema", "vendor.github-workflows", str(tmp_path / "workflow.yml"))
    assert done.returncode == 1, done.stdout


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_shell_can_read_every_script(path: Path) -> None:
    assert scripts(path)
    for script in scripts(path):
        done = run("bash", "-n", input=script)
        assert done.returncode == 0, f"{script}\n{done.stderr}"


# --- what they name --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_command_of_ours_exists(path: Path) -> None:
    assert commands(path)
    for command in commands(path):
        assert unknown(command) == "", f"{path.name} runs {shlex.join(command)}"


@pytest.mark.parametrize(
    ("command", "what"),
    [
        ("pytest --kernel=debian: --no-such", "--no-such"),
        ("pytest --kernel=debian: -n auto", ""),
        ("harness nothing", "nothing"),
        ("harness cache --prune=7d --purge", "--purge"),
        ("harness test --kernel=debian: --artefacts=x", "--artefacts"),
    ],
)
def test_what_does_not_exist_is_noticed(command: str, what: str) -> None:
    assert unknown(shlex.split(command)) == what


def test_every_target_of_make_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (PROJECT / "Makefile").read_text(), re.M))
    named = [word for path in FILES for words in parts(path) if words[0] == "make" for word in words[1:]]
    asked = {word for word in named if not re.search(r"[-/=]", word.replace("build-host", ""))} - {"mremap-harness"}
    assert {"setup", "build-host"} <= asked <= targets


@pytest.mark.parametrize("path", [WORKFLOW, JOB], ids=lambda path: path.name)
def test_what_is_kept_is_in_the_table_and_is_a_kind_of_the_cache(path: Path) -> None:
    from harness.commands.cache import _WHAT

    kept = set(re.findall(r"mremap-harness/(\w+)$", path.read_text(), re.M))
    assert kept
    assert kept <= set(_WHAT)
    table = re.findall(r"^\| `(\w+)` \|.*\| yes \|$", PAGE.read_text(), re.M)
    assert kept == set(table), "docs/ci.md says which directories are worth keeping"


def test_the_container_installs_what_the_table_of_requirements_says() -> None:
    text = CONTAINER.read_text()
    (purposes,) = re.findall(r"requirements\.py ([a-z ]+)\)", text)
    assert purposes.split() == [requirements.SETUP, requirements.GUESTS, requirements.BUILD]
    for source in re.findall(r"^COPY (?!--from)(\S+)", text, re.M):
        assert (PROJECT / source).exists()


def test_the_page_names_every_file() -> None:
    text = PAGE.read_text()
    for path in CI.iterdir():
        assert f"(ci/{path.name})" in text


# --- the script for cron ---------------------------------------------------------------------------------------------


class Night:
    """A kernel tree, and programs that say what they were asked instead of doing it."""

    def __init__(self, top: Path) -> None:
        self.top = top
        self.tree, self.bin, self.results = top / "linux", top / "bin", top / "results"
        upstream = top / "upstream"
        for path in (upstream, self.bin):
            path.mkdir()
        self.git(upstream, "init", "--quiet", "--initial-branch=master")
        self.upstream = upstream
        self.commit()
        self.commit()
        self.git(top, "clone", "--quiet", str(upstream), str(self.tree))
        for name in ("pytest", "harness"):
            program = self.bin / name
            program.write_text(
                f'#!/bin/sh\necho "$0 $*" >>{top}/asked\necho "said by {name}"\nexit $(cat {top}/{name})\n'
            )
            program.chmod(0o755)
            (top / name).write_text("0")

    def git(self, where: Path, *args: str) -> str:
        command = ["git", "-C", str(where), "-c", "user.name=T", "-c", "user.email=t@example.org", *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    def commit(self) -> str:
        self.git(self.upstream, "commit", "--quiet", "--allow-empty", "--message=x")
        return self.git(self.upstream, "rev-parse", "HEAD")

    def run(self, status: int = 0) -> subprocess.CompletedProcess[str]:
        (self.top / "pytest").write_text(str(status))
        (self.top / "asked").write_text("")
        names = {"TREE": self.tree, "HARNESS": self.bin, "RESULTS": self.results}
        return run(str(SCRIPT), env=os.environ | {name: str(path) for name, path in names.items()})

    @property
    def compared(self) -> list[str]:
        """The commits that pytest was asked to compare."""
        return re.findall(rf"git:{self.tree}@([0-9a-f]+)", (self.top / "asked").read_text())


@pytest.fixture
def night(tmp_path: Path) -> Night:
    return Night(tmp_path)


def test_a_quiet_night_says_nothing_and_the_next_one_begins_where_it_ended(night: Night) -> None:
    first = night.git(night.upstream, "rev-parse", "HEAD")
    done = night.run()
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert night.compared == [night.git(night.upstream, "rev-parse", "HEAD~1"), first]
    second = night.commit()
    night.run()
    assert night.compared == [first, second]
    night.run()
    assert night.compared == [], "nothing is new"


def test_a_regression_is_told_and_stays_until_it_is_mended(night: Night) -> None:
    night.run()
    base, bad = night.git(night.upstream, "rev-parse", "HEAD"), night.commit()
    done = night.run(status=1)
    assert done.returncode == 1
    assert "said by pytest" in done.stdout
    assert "all results: " in done.stdout
    mended = night.commit()
    done = night.run()
    assert night.compared == [base, mended]
    assert bad != mended
    assert done.stdout == ""


def test_a_night_that_tested_nothing_says_so(night: Night) -> None:
    done = night.run(status=4)
    assert done.returncode == 4
    assert "pytest ended with status 4" in done.stdout
    assert not (night.results / "tested").exists()


def test_two_nights_at_once_do_not_meet(night: Night) -> None:
    night.results.mkdir()
    with (night.results / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = night.run()
    assert done.returncode == 1
    assert "the run before has not ended" in done.stdout


def test_a_tree_must_be_named() -> None:
    done = run(str(SCRIPT), env={name: value for name, value in os.environ.items() if name != "TREE"})
    assert done.returncode != 0
    assert "the kernel tree" in done.stderr
