# SPDX-License-Identifier: GPL-2.0
"""The audit of unchanged dumps, and of files that are not a usable dump."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from harness.arch import RISCV64, X86_64
from harness.audit import debuginfo, formats, layout, memory, walk
from harness.audit.memory import DumpError
from harness.debian.apt import Archive
from harness.errors import HarnessError
from harness.host.cache import Cache
from harness.kernels import grammar
from harness.kernels.debian import DebianSpec
from harness.kernels.kernel import Kernel as BootableKernel
from harness.kernels.kernel import Provenance
from tests.audit_case import NAMES, Case
from tests.audit_case import case as case
from tests.audit_scene import DUMPS
from tests.kernel_files import elf

# --- unchanged dumps --------------------------------------------------------------------------------------------------


def test_a_healthy_guest_has_no_discrepancies(case: Case) -> None:
    audit = case.audit()
    assert audit.discrepancies == ()
    assert audit.counts.anonymous > 5000
    assert audit.counts.processes >= 4
    assert "rmap walks find every one of them" in audit.summary


def test_the_audit_sees_the_pages_that_the_guest_saw(case: Case) -> None:
    scene = case.scene
    wanted = [*scene.ksm, *scene.moved, *scene.stayed]
    kept = {
        page.address: page
        for page in case.audit(keep=lambda pid, address: pid == scene.pid and address in wanted).pages
    }
    assert sorted(kept) == sorted(wanted)
    assert all(page.reached for page in kept.values())
    assert {str(at): kept[at].pfn for at in map(int, scene.pfns)} == scene.pfns
    assert [kept[at].ksm for at in wanted] == [True] * 2 + [False] * 6
    assert kept[scene.ksm[0]].pfn == kept[scene.ksm[1]].pfn


def test_a_moved_page_keeps_the_index_of_its_first_address(case: Case) -> None:
    scene, shift = case.scene, case.kernel.page_shift
    pages = case.audit(keep=lambda pid, address: pid == scene.pid and address in scene.moved).pages
    assert [page.index for page in pages] == [(at >> shift) - 8 for at in scene.moved]  # from page 12 to page 20


def test_a_huge_page_is_one_entry(case: Case) -> None:
    scene = case.scene
    (page,) = case.audit(keep=lambda pid, address: (pid, address) == (scene.pid, scene.huge)).pages
    assert (page.pages, page.reached) == (512, True)


def test_the_audit_can_be_limited_to_some_processes(case: Case) -> None:
    everything, some = case.audit(), case.audit(pids=[case.scene.pid])
    assert some.discrepancies == ()
    assert some.counts.processes == 2, "the process of the scene and its child"
    assert some.counts.anonymous < everything.counts.anonymous


def test_neighbours_say_why_they_did_not_merge(case: Case) -> None:
    regions = {each.start: each for each in case.audit().regions if each.pid == case.scene.pid}
    reasons = regions[case.scene.apart].apart
    own = case.scene.apart >> case.kernel.page_shift
    assert reasons == (
        f"page offset is {own + 8:#x}, but merging needs {own:#x}",
        "different anon_vmas",
    )


# --- files and dumps that are refused ---------------------------------------------------------------------------------


def test_a_dump_that_is_cut_short_is_refused(case: Case) -> None:
    whole = case.path.read_bytes()
    for size in (len(whole) - 1, len(whole) // 2, 200, 64, 20):
        case.path.write_bytes(whole[:size])
        with pytest.raises(DumpError, match=r"cut short|cannot be read|no ELF|no dump"), formats.opened(case.path):
            pass


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"\x7fELF", b"\x7fELF\x02\x01" + bytes(60), b"KDUMP   " + bytes(80)]
)
def test_a_file_that_is_no_dump_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "dump"
    path.write_bytes(content)
    with pytest.raises(HarnessError, match=str(path)), formats.opened(path):
        pass


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DumpError, match="No such file"), formats.opened(tmp_path / "none"):
        pass


def test_an_architecture_without_page_tables_is_refused_before_anything_is_fetched(tmp_path: Path) -> None:
    spec = grammar.parse("debian:6.12", RISCV64)
    assert isinstance(spec, DebianSpec)
    provenance = Provenance("debian", "linux-image-6.12-riscv64", "6.12-1", "")
    kernel = BootableKernel(spec, RISCV64, "6.12-riscv64", tmp_path / "image", {}, None, None, provenance)
    with pytest.raises(layout.DebugInfoError, match=r"^there is no audit on riscv64: leave out --audit$"):
        debuginfo.layout_of(kernel, Archive(Cache(tmp_path), "http://127.0.0.1:9/debian"), fetch=True)
    assert list(tmp_path.iterdir()) == []


def test_a_vmlinux_of_an_architecture_without_page_tables_is_refused(tmp_path: Path) -> None:
    (tmp_path / "vmlinux").write_bytes(elf(243))
    with pytest.raises(layout.DebugInfoError, match=r"vmlinux cannot be audited: there is no audit on riscv64$"):
        layout._architecture(tmp_path / "vmlinux")


def test_a_kernel_before_6_10_is_refused_by_its_missing_member() -> None:
    class Type:
        size = 8

        def has_member(self, member: str) -> bool:
            return member != "_large_mapcount"

    class Drgn:
        def type(self, name: str) -> Type:
            return Type()

        def offsetof(self, kind: Type, member: str) -> int:
            return 0

    with pytest.raises(layout.DebugInfoError, match=r"no member _large_mapcount: it is older than Linux 6\.10"):
        layout._collect(Drgn(), Drgn(), None, "00", X86_64)


def test_the_vmlinux_of_another_build_is_refused(case: Case) -> None:
    other = layout.Layout(**{**vars(case.layout), "build_id": "00" * 20})
    with pytest.raises(DumpError, match="not of this vmlinux"):
        walk.audit(case.image, other)


def test_a_vmlinux_of_another_architecture_is_refused(case: Case) -> None:
    (name,) = (each for each in NAMES if not each.startswith(case.layout.arch))
    other = layout.Layout.from_json((DUMPS / f"{name}.layout.json").read_text())
    with pytest.raises(DumpError, match="another machine"):
        walk.audit(case.image, other)


def test_a_dump_without_vmcoreinfo_is_refused(case: Case) -> None:
    case.image.vmcoreinfo = b""
    with pytest.raises(DumpError, match="no VMCOREINFO"):
        case.audit()


def test_a_dump_with_damaged_vmcoreinfo_is_refused(case: Case) -> None:
    case.image.vmcoreinfo = b"OSRELEASE=1\nPAGESIZE=12\n"
    with pytest.raises(DumpError, match="damaged"):
        case.audit()


def test_a_file_that_is_no_vmlinux_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "vmlinux"
    path.write_bytes(b"\x7fELF\x02\x01" + bytes(100))
    with pytest.raises(layout.DebugInfoError, match="no build ID"):
        layout.read(path)
    path.write_bytes(b"not a kernel")
    with pytest.raises(layout.DebugInfoError, match="no vmlinux"):
        layout.read(path)


def test_a_layout_of_another_format_is_refused() -> None:
    text = (DUMPS / f"{NAMES[0]}.layout.json").read_text()
    assert layout.Layout.from_json(text).arch == "x86_64"
    with pytest.raises(layout.DebugInfoError):
        layout.Layout.from_json(text.replace(f'"format": {layout.FORMAT}', '"format": 0'))
    with pytest.raises(layout.DebugInfoError):
        layout.Layout.from_json("[]")


@pytest.mark.parametrize("seed", range(12))
def test_a_dump_with_random_pages_gives_discrepancies_or_one_clear_error(case: Case, seed: int) -> None:
    rng = random.Random(seed)
    units = range(len(case.image.buffer) // memory.UNIT - 2)
    for _ in range(3):
        at = (len(case.image.buffer) - (rng.choice(units) + 1) * memory.UNIT) & ~7
        case.image.buffer[at : at + memory.UNIT] = rng.randbytes(memory.UNIT)
    clear = ""
    try:
        assert case.audit().counts.processes
    except HarnessError as error:
        clear = str(error).splitlines()[0]
    assert not clear or "damaged" in clear or "cannot be found" in clear


def test_a_process_that_does_not_exist_is_refused(case: Case) -> None:
    with pytest.raises(DumpError, match="no process 99999 "):
        case.audit(pids=[case.scene.pid, 99999])
