# SPDX-License-Identifier: GPL-2.0
"""Kernels are built once for each source, series, configuration and compiler, and no source tree is written to."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from harness.arch import ARM64, X86_64, Architecture
from harness.build import builder, kconfig, series, source
from harness.build.builder import BuildRequest, BuiltKernel
from harness.build.source import GitSource, PackageSource, TreeSource
from harness.debian.apt import Archive
from harness.errors import BuildError, ConfigError, HostError, PatchError, SpecError
from harness.host.cache import Cache
from harness.kernels.built import BuildSpec
from harness.kernels.grammar import parse, parse_all
from harness.kernels.kernel import BootSpec, Kernel
from harness.options import BuildOptions
from tests.kernel_files import build_deb, fill
from tests.toy_kernel import PATCH, git, lay_out, programs, repository

AS_IT_IS = BuildOptions()


class Workshop:
    """A cache of its own, stand-ins for compilers, and a count of what was compiled."""

    def __init__(self, tmp_path: Path, path: str) -> None:
        self.tmp_path = tmp_path
        self.said: list[str] = []
        self.cache = Cache(tmp_path / "cache", self.said.append)
        self.archive = Archive(self.cache, progress=self.said.append)

    def resolve(self, text: str, building: BuildOptions = AS_IT_IS) -> Kernel:
        spec = parse(text, X86_64, building)
        assert isinstance(spec, BootSpec)
        return spec.resolve(self.cache, self.archive)

    def build(self, text: str, settings: str) -> BuiltKernel:
        spec = parse(text, X86_64)
        assert isinstance(spec, BuildSpec)
        wanted = kconfig.merge(kconfig.parse_fragment(settings, "toy.config"))
        patches = [patch for path in spec.name.series for patch in series.load(path)]
        request = BuildRequest(X86_64, spec.name.source, tuple(patches), None, "toy", wanted, "toy")
        return builder.build(request, self.cache, self.archive)

    def count(self, what: str) -> list[str]:
        """What was noted since the last call: "compiled" or "configured"."""
        lines = []
        for path in self.cache.root.glob(f"sources/*/{what}"):
            lines += path.read_text().splitlines()
            path.unlink()
        return lines


@pytest.fixture
def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    monkeypatch.setenv("PATH", f"{programs(tmp_path / 'bin')}:{os.environ['PATH']}")
    monkeypatch.setattr("platform.machine", lambda: X86_64.machine)
    return Workshop(tmp_path, os.environ["PATH"])


def digest(path: Path) -> dict[str, tuple[str, int]]:
    """The bytes and times of all files below a directory.

    Git renews the time of an object that somebody borrows, lest it be collected as garbage: those times are left out.
    """
    return {
        str(each.relative_to(path)): (
            hashlib.sha256(each.read_bytes()).hexdigest(),
            0 if ".git/objects/" in str(each) else each.stat().st_mtime_ns,
        )
        for each in path.rglob("*")
        if each.is_file()
    }


# Names


def spelled(text: str, arch: Architecture = X86_64, building: BuildOptions = AS_IT_IS) -> tuple[str, str]:
    spec = parse(text, arch, building)
    assert isinstance(spec, BuildSpec)
    return spec.text, spec.label


@pytest.mark.parametrize(
    ("text", "arch", "words", "expected"),
    [
        ("unpatched", X86_64, (), ("unpatched:fast", "unpatched-x86_64")),
        ("unpatched:fast", X86_64, ("debug",), ("unpatched:fast", "unpatched-x86_64")),
        ("relocate-anon", X86_64, ("debug",), ("relocate-anon:debug", "relocate-anon:debug-x86_64")),
        ("relocate-anon:dwarf", ARM64, (), ("relocate-anon:fast:dwarf", "relocate-anon:fast:dwarf-arm64")),
        ("relocate-anon:64k:debug", ARM64, (), ("relocate-anon:debug:64k", "relocate-anon:debug:64k-arm64")),
        ("relocate-anon:4k", ARM64, (), ("relocate-anon:fast", "relocate-anon-arm64")),
        ("relocate-anon-6.12:debug", X86_64, (), ("relocate-anon-6.12:debug", "relocate-anon-6.12:debug-x86_64")),
        ("linux-source-7.3:kasan", X86_64, (), ("linux-source-7.3:kasan", "linux-source-7.3:kasan-x86_64")),
    ],
)
def test_a_kernel_to_build_is_named_by_source_and_presets(
    text: str, arch: Architecture, words: tuple[str, ...], expected: tuple[str, str]
) -> None:
    assert spelled(text, arch, BuildOptions(words=words)) == expected
    assert spelled(*expected[:1], arch, BuildOptions(words=("kasan",))) == expected


def test_patches_and_revisions_are_part_of_the_name(tmp_path: Path) -> None:
    path = repository(tmp_path / "a+b@c")
    fill({tmp_path / "fix+1.mbx": PATCH, tmp_path / "more/1.patch": PATCH})
    text = f"git:{path}@HEAD@{{0}}+{tmp_path}/fix+1.mbx+{tmp_path}/more:debug"
    spec = parse(text, X86_64)
    assert isinstance(spec, BuildSpec)
    assert spec.name.source == GitSource(path, "HEAD@{0}")
    assert spec.name.series == (tmp_path / "fix+1.mbx", tmp_path / "more")
    assert spec.text == text
    assert spec.label == "a+b-c-HEAD-0-+fix+1+more:debug-x86_64"


def test_a_tree_is_built_when_asked_for_or_when_it_is_changed(tmp_path: Path) -> None:
    path = lay_out(tmp_path / "linux")
    fill({tmp_path / "fix.patch": PATCH})
    with pytest.raises(SpecError, match="build it first with make, or with --build"):
        parse(str(path), X86_64)
    for text, building in ((f"{path}", BuildOptions(trees=True)), (f"{path}:debug", BuildOptions())):
        spec = parse(text, X86_64, building)
        assert isinstance(spec, BuildSpec)
        assert spec.name.source == TreeSource(path)
    assert spelled(f"{path}+{tmp_path}/fix.patch")[1] == "linux+fix-x86_64"


def test_the_same_kernel_under_two_names_is_taken_once() -> None:
    specs = parse_all(["unpatched", "unpatched:fast", "unpatched:debug"], X86_64)
    assert [spec.label for spec in specs] == ["unpatched-x86_64", "unpatched:debug-x86_64"]


@pytest.mark.parametrize(
    ("text", "arch", "says"),
    [
        (
            "unpatched:debgu",
            X86_64,
            "there is no preset 'debgu': use fast, debug, kasan, kcsan, dwarf, kcov, mutants, 4k for",
        ),
        ("unpatched:64k", X86_64, "x86_64 has no pages of 64k"),
        ("unpatched:16k:64k", ARM64, "a kernel has one page size, not 16k and 64k"),
        ("unpatched+/nowhere.mbx", X86_64, "there is no patch, mbox or directory '/nowhere.mbx'"),
        ("git:/nowhere@v1", X86_64, "there is no git repository /nowhere: give git:PATH@REVISION"),
        ("/nowhere:debug", X86_64, "/nowhere:debug cannot be built: there is no kernel source /nowhere"),
        ("unpatchd", X86_64, "there is no file or directory unpatchd: give debian:VERSION"),
    ],
)
def test_what_cannot_be_built_is_refused_in_one_line(text: str, arch: Architecture, says: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse(text, arch)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_preset_without_a_kernel_to_build_is_refused() -> None:
    with pytest.raises(SpecError, match="--preset=debug has no effect"):
        parse_all(["debian:6.12"], X86_64, BuildOptions(words=("debug",)))


def test_presets_of_the_command_line_are_part_of_test_ids(tmp_path: Path) -> None:
    fill({tmp_path / "pytest.ini": "[pytest]\nguest_tests = .\n", tmp_path / "test_one.py": "def test_one(): pass\n"})
    command = ["pytest", "-q", "--collect-only", "--kernel=unpatched", "--kernel=relocate-anon:kasan"]
    command += ["--arch=arm64", "--preset=debug:dwarf", "--preset=64k"]
    done = subprocess.run([sys.executable, "-m", *command], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[:2] == [
        "test_one.py::test_one[unpatched:debug:dwarf:64k-arm64]",
        "test_one.py::test_one[relocate-anon:kasan-arm64]",
    ]


# Building


def test_a_revision_becomes_a_kernel(workshop: Workshop) -> None:
    path = repository(workshop.tmp_path / "linux")
    kernel = workshop.resolve(f"git:{path}@v1")
    assert (kernel.release, kernel.modules, kernel.vmlinux) == ("9.1.2-toy", None, None)
    assert b"merge\nline 1\n" in kernel.boot_image.read_bytes()
    assert kernel.has("KSM")
    provenance = kernel.provenance.build
    assert provenance is not None
    assert provenance.source == f"v1 of {path}"
    assert provenance.source_digest == git(path, "rev-parse", "v1^{tree}")
    assert provenance.compiler == "gcc (toy) 1, ld 1"
    assert provenance.config_digest == hashlib.sha256((kernel.boot_image.parent / "config").read_bytes()).hexdigest()
    assert str(kernel.provenance).startswith(f"built from v1 of {path}, fast configuration ")


def test_the_same_kernel_is_built_once(workshop: Workshop) -> None:
    path = repository(workshop.tmp_path / "linux")
    first = workshop.resolve(f"git:{path}@v1")
    assert len(workshop.count("compiled")) == 3
    assert workshop.resolve(f"git:{path}@HEAD").boot_image == first.boot_image
    assert workshop.count("compiled") == []
    assert len(workshop.count("configured")) == 1


def test_a_pair_differs_in_its_patches_alone(workshop: Workshop) -> None:
    path = repository(workshop.tmp_path / "linux")
    fill({workshop.tmp_path / "move.patch": PATCH})
    plain = workshop.resolve(f"git:{path}@v1")
    patched = workshop.resolve(f"git:{path}@v1+{workshop.tmp_path}/move.patch")
    assert b"patched 3\n" not in plain.boot_image.read_bytes()
    assert b"patched 3\n" in patched.boot_image.read_bytes()
    assert plain.provenance.build is not None
    assert patched.provenance.build is not None
    mine, its = vars(plain.provenance.build), vars(patched.provenance.build)
    assert {name for name in mine if mine[name] != its[name]} == {"patches", "patchset_hash"}
    assert its["patchset_hash"] == series.patchset_hash(series.load(workshop.tmp_path / "move.patch"))


def test_each_built_kernel_keeps_the_log_of_its_build(workshop: Workshop) -> None:
    path = repository(workshop.tmp_path / "linux")
    fill({workshop.tmp_path / "move.patch": PATCH})
    plain = workshop.build(f"git:{path}@v1", "CONFIG_NR=1\n")
    patched = workshop.build(f"git:{path}@v1+{workshop.tmp_path}/move.patch", "CONFIG_NR=1\n")
    logs = [built.boot_image.with_name("build.log").read_text() for built in (plain, patched)]
    assert ["CC      mm/ksm.o" in log for log in logs] == [True, False], "the logs of two builds are mixed up"
    assert all("CC      mm/mremap.o" in log for log in logs)


def test_a_patch_recompiles_only_what_it_changes(workshop: Workshop) -> None:
    path = repository(workshop.tmp_path / "linux")
    fill({workshop.tmp_path / "move.patch": PATCH})
    workshop.resolve(f"git:{path}@v1")
    assert sorted(each for each in workshop.count("compiled") if each.startswith("mm/")) == ["mm/ksm", "mm/mremap"]
    workshop.resolve(f"git:{path}@v1+{workshop.tmp_path}/move.patch")
    assert [each for each in workshop.count("compiled") if each.startswith("mm/")] == ["mm/mremap"]


def test_another_compiler_makes_another_kernel(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    path = repository(workshop.tmp_path / "linux")
    first = workshop.resolve(f"git:{path}@v1")
    monkeypatch.setenv("TOY", "2")
    second = workshop.resolve(f"git:{path}@v1")
    assert first.boot_image != second.boot_image
    assert second.provenance.build is not None
    assert second.provenance.build.compiler == "gcc (toy) 2, ld 1"


def test_a_source_tree_is_built_as_it_stands_and_is_not_touched(workshop: Workshop) -> None:
    path = repository(workshop.tmp_path / "linux")
    fill({path / "mm/ksm.c": "uncommitted\n", path / "mm/new.c": "untracked\n", path / "mm/old.o": "ignored\n"})
    fill({path / "arch/x86/boot/bzImage": "built in place", workshop.tmp_path / "move.patch": PATCH})
    before = digest(path)
    kernel = workshop.resolve(f"{path}+{workshop.tmp_path}/move.patch", BuildOptions(trees=True))
    image = kernel.boot_image.read_bytes()
    assert b"uncommitted\n" in image
    assert b"untracked\n" in image
    assert b"patched 33\n" in image
    assert b"ignored\n" not in image
    assert digest(path) == before


def test_a_tree_that_no_git_knows_is_built_too(workshop: Workshop) -> None:
    path = lay_out(workshop.tmp_path / "linux")
    before = digest(path)
    first = workshop.resolve(str(path), BuildOptions(trees=True))
    assert workshop.resolve(str(path), BuildOptions(trees=True)).boot_image == first.boot_image
    assert digest(path) == before
    fill({path / "mm/ksm.c": "changed\n"})
    assert b"changed\n" in workshop.resolve(str(path), BuildOptions(trees=True)).boot_image.read_bytes()


def test_a_linked_work_tree_is_built_too(workshop: Workshop) -> None:
    path = repository(workshop.tmp_path / "linux")
    git(path, "worktree", "add", "--quiet", str(workshop.tmp_path / "other"))
    assert workshop.resolve(str(workshop.tmp_path / "other"), BuildOptions(trees=True)).release == "9.1.2-toy"


def test_a_build_that_was_killed_is_started_over(workshop: Workshop) -> None:
    path = repository(workshop.tmp_path / "linux")
    fill({workshop.tmp_path / "move.patch": PATCH})
    workshop.resolve(f"git:{path}@v1")
    (output,) = (path for path in workshop.cache.root.glob("sources/*/tree/out-x86_64-*"))
    fill({output / ".unfinished": "", output / "mm/ksm.o": "half an obj"})
    kernel = workshop.resolve(f"git:{path}@v1+{workshop.tmp_path}/move.patch")
    assert b"merge\n" in kernel.boot_image.read_bytes()


def test_few_output_directories_are_kept(workshop: Workshop) -> None:
    path = repository(workshop.tmp_path / "linux")
    for number in range(5):
        workshop.build(f"git:{path}@v1", f"CONFIG_NR={number}\n")
    assert len(list(workshop.cache.root.glob("sources/*/tree/out-x86_64-*"))) == 3


def test_progress_is_told(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder, "_TELL_EVERY", 0.0)
    path = repository(workshop.tmp_path / "linux")
    workshop.resolve(f"git:{path}@v1")
    assert "linux-v1-x86_64: configuring" in workshop.said
    assert any(
        re.match(r"linux-v1-x86_64: building, \d+% \(2 of about \d+ files\), about \d+ s left", each)
        for each in workshop.said
    )


def test_what_is_left_is_not_estimated_where_only_changes_are_compiled(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builder, "_TELL_EVERY", 0.0)
    path = repository(workshop.tmp_path / "linux")
    fill({workshop.tmp_path / "move.patch": PATCH})
    workshop.resolve(f"git:{path}@v1")
    workshop.resolve(f"git:{path}@v1+{workshop.tmp_path}/move.patch")
    assert "linux-v1+move-x86_64: building, 1 changed files so far" in workshop.said


# What goes wrong


def test_a_patch_that_does_not_apply_is_named_with_its_hunk(workshop: Workshop) -> None:
    path = repository(workshop.tmp_path / "linux")
    broken = PATCH.replace("-line 33", "-line thirty-three")
    fill({workshop.tmp_path / "s/1.patch": PATCH.replace("mremap", "ksm2"), workshop.tmp_path / "t/1.patch": PATCH})
    fill({workshop.tmp_path / "t/2.patch": broken.replace("line 3\n", "patched 3\n", 1)})
    with pytest.raises(PatchError) as caught:
        workshop.resolve(f"git:{path}@v1+{workshop.tmp_path}/t")
    assert str(caught.value) == "patch 2 of 2 does not apply: 2.patch: hunk 2 of 2 of mm/mremap.c (line 32) fails"
    with pytest.raises(PatchError, match=r"patch 1 of 1 does not apply: 1\.patch: mm/ksm2\.c: does not exist in index"):
        workshop.resolve(f"git:{path}@v1+{workshop.tmp_path}/s")


def test_a_damaged_patch_is_named(workshop: Workshop) -> None:
    path = repository(workshop.tmp_path / "linux")
    fill({workshop.tmp_path / "x.patch": PATCH.replace(" line 34\n", "")})
    with pytest.raises(PatchError, match=r"x\.patch: corrupt patch at line"):
        workshop.resolve(f"git:{path}@v1+{workshop.tmp_path}/x.patch")


def test_a_patch_reaches_no_file_outside_the_tree(workshop: Workshop) -> None:
    path = repository(workshop.tmp_path / "linux")
    fill({workshop.tmp_path / "x.patch": "--- /dev/null\n+++ b/../../evil\n@@ -0,0 +1 @@\n+evil\n"})
    with pytest.raises(PatchError, match="invalid path"):
        workshop.resolve(f"git:{path}@v1+{workshop.tmp_path}/x.patch")


def test_an_option_that_does_not_stick_is_an_error_each_time(workshop: Workshop) -> None:
    path = repository(workshop.tmp_path / "linux")
    for _ in range(2):
        with pytest.raises(
            ConfigError, match=r"CONFIG_LOST=y from toy\.config became n: it depends on NEVER \[NEVER=n\]"
        ):
            workshop.build(f"git:{path}@v1", "CONFIG_LOST=y\n")


def test_a_source_that_does_not_compile_says_where(workshop: Workshop) -> None:
    path = repository(workshop.tmp_path / "linux")
    fill({path / "mm/ksm.c": "BROKEN\n"})
    with pytest.raises(BuildError) as caught:
        workshop.resolve(str(path), BuildOptions(trees=True))
    first, *_, last = str(caught.value).splitlines()
    assert first == "linux-x86_64 does not compile: mm/ksm.c:1:1: error: BROKEN is no C"
    assert Path(last.removeprefix("the whole log is ")).is_file()
    fill({path / "mm/ksm.c": "mended\n"})
    assert b"mended\n" in workshop.resolve(str(path), BuildOptions(trees=True)).boot_image.read_bytes()


def test_an_unknown_revision_is_refused(workshop: Workshop) -> None:
    path = repository(workshop.tmp_path / "linux")
    with pytest.raises(SpecError, match=r"has no revision 'v9'"):
        workshop.resolve(f"git:{path}@v9")


def test_a_missing_compiler_is_named_with_its_package(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    path = repository(workshop.tmp_path / "linux")
    spec = parse(f"git:{path}@v1", ARM64)
    assert isinstance(spec, BuildSpec)
    monkeypatch.setenv("PATH", str(workshop.tmp_path / "bin"))
    with pytest.raises(
        HostError,
        match=r"cannot compile kernels for arm64: .* apt-get install gcc-aarch64-linux-gnu binutils-aarch64-linux-gnu$",
    ):
        spec.resolve(workshop.cache, workshop.archive)


def test_missing_programs_are_named_with_their_packages(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    (workshop.tmp_path / "bin/bison").unlink()
    git_only = workshop.tmp_path / "git-only"
    git_only.mkdir()
    for name in ("git", "sh"):
        (git_only / name).symlink_to(subprocess.run(["which", name], capture_output=True, text=True).stdout.strip())
    path = repository(workshop.tmp_path / "linux")
    monkeypatch.setenv("PATH", f"{workshop.tmp_path / 'bin'}:{git_only}")
    with pytest.raises(HostError, match=r"install what is missing with: apt-get install make bison$"):
        workshop.resolve(f"git:{path}@v1")


# Source packages


def tarball(path: Path, tree: Path) -> bytes:
    with tarfile.open(path, "w:xz") as archive:
        archive.add(tree, arcname="linux-source-9.1")
    return path.read_bytes()


def test_a_source_package_becomes_the_tree_that_git_makes_of_it(workshop: Workshop) -> None:
    tree = lay_out(workshop.tmp_path / "tree")
    fill({tree / 'odd "name".txt': "odd", tree / "scripts/run.sh": "#!/bin/sh\n", tree / "Documentation/Kconfig": ""})
    fill({tree / "Documentation/index.rst": "words"})
    (tree / "scripts/run.sh").chmod(0o755)
    (tree / "link").symlink_to("mm/ksm.c")
    data = tarball(workshop.tmp_path / "x.tar.xz", tree)
    package = build_deb(workshop.tmp_path, "linux-source-9.1", {"usr/src/linux-source-9.1.tar.xz": data}, "all")
    store = PackageSource("linux-source-9.1").store(workshop.cache)
    store.init(store.git_dir / "objects")
    source._import(package, store, "refs/heads/x")
    git(tree, "init", "--quiet")
    git(tree, "add", ".")
    found = store.git("rev-parse", "refs/heads/x^{tree}")
    assert found == git(tree, "write-tree")
    work = store.checkout(found)
    assert (work / "Documentation/Kconfig").exists()
    assert not (work / "Documentation/index.rst").exists()
    assert (work / "scripts/run.sh").stat().st_mode & 0o100
    assert (work / "link").readlink() == Path("mm/ksm.c")


def test_the_work_tree_is_mended_and_keeps_the_times_of_what_stays(workshop: Workshop) -> None:
    path = repository(workshop.tmp_path / "linux")
    fill({workshop.tmp_path / "move.patch": PATCH})
    local = GitSource(path, "v1")
    version = local.identify(workshop.cache, workshop.archive)
    store = local.store(workshop.cache)
    tree = local.fetch(version, workshop.cache, workshop.archive)
    work = store.checkout(tree)
    before = digest(work)
    store.checkout(store.apply(tree, series.load(workshop.tmp_path / "move.patch")))
    after = digest(work)
    assert {name for name in before if before[name] != after[name]} == {"mm/mremap.c"}
    fill({work / "mm/ksm.c": "somebody was here\n"})
    store.checkout(tree)
    assert {name: found for name, (found, _) in digest(work).items()} == {
        name: was for name, (was, _) in before.items()
    }
