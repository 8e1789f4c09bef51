# SPDX-License-Identifier: GPL-2.0
"""A bisect finds the version that fixed a known finding, and a commit that was broken on purpose. Real kernels."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.arch import X86_64
from harness.build import builder
from harness.build.source import PackageSource
from harness.commands import cli
from harness.debian.apt import Archive
from harness.errors import HostError
from harness.host.cache import Cache
from tests.toy_kernel import git


def test_a_finding_ends_where_it_is_known_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    tests = ["guest_tests/test_programs.py", "-k", "merged-with-untouched"]
    command = ["bisect", "--packages=6.18.5..6.18.9", "--fixed", "--arch=x86_64", "--", *tests]
    assert cli.main(command) == 0
    said = capsys.readouterr().out
    assert "\nThe first fixed version is 6.18.9\n" in said
    assert "E       AssertionError: page 48 does not move to another node" in said
    assert cli.main(command) == 0
    assert capsys.readouterr().out.count("from the log") == 2


class Repository:
    """Commits on top of Debian's kernel source. No file of it is checked out.

    :param path: a directory to make.
    """

    def __init__(self, path: Path) -> None:
        cache = Cache()
        archive = Archive(cache)
        source = PackageSource("linux-source-7.3")
        store = source.store(cache)
        version = source.identify(cache, archive)
        with store.locked():
            tree = source.fetch(version, cache, archive)
        path.mkdir()
        self.path = path
        git(path, "init", "--quiet")
        (path / ".git/objects/info/alternates").write_text(f"{store.git_dir / 'objects'}\n")
        git(path, "read-tree", tree)

    def show(self, name: str) -> str:
        """A file."""
        return git(self.path, "show", f":{name}") + "\n"

    def commit(self, subject: str, **files: str) -> str:
        """Commit files, whose names have "__" for the slash and no suffix; the short ID and the subject."""
        for name, text in files.items():
            new = self.path / "new"
            new.write_text(text)
            blob = git(self.path, "hash-object", "-w", str(new))
            git(self.path, "update-index", "--cacheinfo", f"100644,{blob},{name.replace('__', '/')}.c")
        git(self.path, "commit", "--quiet", "--allow-empty", "-m", subject)
        return git(self.path, "log", "-1", "--format=%h %s")


@pytest.fixture
def own_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache without sources and built kernels, above the user's. It is removed, because it takes 2 GB."""
    try:
        builder.Toolchain.of(X86_64)
        builder.check_host()
    except HostError as error:
        pytest.skip(str(error))
    users = Cache().root
    own = tmp_path / "cache/mremap-harness"
    own.mkdir(parents=True)
    for shared in ("apt", "ccache", "debs", "initrds", "locks", "userlands"):
        (users / shared).mkdir(parents=True, exist_ok=True)
        (own / shared).symlink_to(users / shared)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    yield
    shutil.rmtree(own)


@pytest.mark.builds_kernel
def test_a_commit_that_breaks_a_promise_is_found_past_those_that_cannot_be_tested(
    tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    repository = Repository(tmp_path / "linux")
    request.getfixturevalue("own_sources")
    mremap, main, ksm = map(repository.show, ("mm/mremap.c", "init/main.c", "mm/ksm.c"))
    entry = "static int __ref kernel_init(void *unused)\n{\n\tint ret;\n"
    natural, wrong = "index = rmap_item->linear_page_index;", "index = addr >> PAGE_SHIFT;"
    assert entry in main
    assert natural in ksm
    repository.commit("Linux 7.3")
    git(repository.path, "tag", "good")
    repository.commit("mm/mremap: add a comment", mm__mremap=f"{mremap}/* one */\n")
    repository.commit("mm/mremap: start something", mm__mremap=f"{mremap}#error broken on purpose\n")
    silent = main.replace(entry, f'{entry}\n\tpanic("broken on purpose");\n')
    repository.commit("mm/mremap: finish it; init: start something", mm__mremap=mremap, init__main=silent)
    repository.commit("init: finish that as well", init__main=main)
    bad = repository.commit("mm/ksm: search by address", mm__ksm=ksm.replace(natural, wrong))
    repository.commit("mm/mremap: add another comment", mm__mremap=f"{mremap}/* two */\n")

    test = ["guest_tests/test_question.py", "-k", "the_walk_finds_pages_merged_again_after_the_move"]
    where = [f"--tree={repository.path}", "--good=good", "--bad=HEAD", "--arch=x86_64"]
    assert cli.main(["bisect", *where, "--", *test]) == 0
    said = capsys.readouterr().out
    assert f"\nThe first bad commit is {bad}\n" in said
    assert "start something: no verdict" in said
