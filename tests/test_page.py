# SPDX-License-Identifier: GPL-2.0
"""The HTML page of results: whole by itself, readable without scripts, and whatever a guest says is text."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from harness.report import drawing, markup, page
from harness.report.page import Kind
from harness.report.record import Item
from harness.report.runs import Run
from tests.recorded import MIXED, NEW, OLD, hostile, line, run

HOSTILE = "</pre></script><script>document.title='owned'</script><img src=x onerror=alert(1)>\"'&amp;"

SPLAT = "\n".join(
    (
        "[   12.100000] a line before",
        "[   29.471027] BUG: Bad page state in process python3  pfn:12345",
        "[   29.471100] page: refcount:0 mapcount:-1 mapping:0000000000000000 index:0x0 pfn:0x12345",
        "[   29.471300] Call Trace:",
        "[   29.471400]  <TASK>",
        "[   29.471500]  dump_stack_lvl+0x5d/0x80",
        "[   29.471600]  </TASK>",
        "[   30.000000] usb 1-1: a line after",
        "[   30.000001] usb 1-1: another",
    )
)

BEFORE = """\
carve-out 0x3fd340000000-0x3fd340028000, 40 pages of 4 kB
  from page 0: 0x3fd340000000-0x3fd340003000 rw-p: Size 12 kB; ac mg mr mw rd sd wr
    pages 0 to 1: swap type 0 offset 0x4006 soft_dirty
    page 2: none soft_dirty
  from page 3: 0x3fd340003000-0x3fd340038000 ---s /dev/zero (deleted): Size 212 kB; me mr ms"""

AFTER = """\
carve-out 0x3fd340000000-0x3fd340028000, 40 pages of 4 kB
  from page 0: 0x3fd340000000-0x3fd340001000 rw-p: Size 4 kB; ac mg mr mw rd sd wr
    page 0: pfn 0x5c34 soft_dirty
  from page 10: 0x3fd34000a000-0x3fd34000b000 rw-p: Size 4, KSM 4 kB; ac mg mr mw rd sd wr
    page 10: pfn 0x5c34 soft_dirty"""

MEMORY = {
    "memory under test before the first move": BEFORE,
    "moves": "mremap(0x3fd340001000, 0x1000, 0x1000, 0x3, 0x3fd34000a000) = 0x3fd34000a000",
    "memory under test at the failure": AFTER,
}


class Parsed(HTMLParser):
    """What a browser would make of a page, as far as the tests ask."""

    VOID = ("meta", "br", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        assert not self.open, f"these are never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes.append((tag, {name: value or "" for name, value in attrs}))
        assert not any(name.startswith("on") or name in ("href", "src") for name, _ in attrs), f"{tag}: {attrs}"
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"{tag} is closed out of turn"

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text += data

    def having(self, name: str) -> list[dict[str, str]]:
        """The attributes of the elements that have one of this name."""
        return [attributes for _, attributes in self.attributes if name in attributes]


def drawn(recorded: Run) -> Parsed:
    return Parsed(page.text(recorded))


def failed(*sections: tuple[str, str]) -> Item:
    return line("test_fails", "failed", "lost a page", sections=sections)


# --- what it shows ---------------------------------------------------------------------------------------------------


def test_each_outcome_is_of_its_kind() -> None:
    assert {item.test.partition("::")[2]: page.kind(item) for item in MIXED} == {
        "test_passes": Kind.PASSED,
        "test_lacks": Kind.LACKING,
        "test_fails[1]": Kind.FAILED,
        "test_skips": Kind.SKIPPED,
        "test_shows": Kind.FINDING,
        "test_fixed": Kind.FAILED,
        "test_misses": Kind.MISSED,
        "test_breaks": Kind.FAILED,
    }
    assert page.kind(None) is Kind.NONE


def test_a_page_is_whole_by_itself() -> None:
    parsed = drawn(run(*MIXED, *(replace(item, label=NEW.label) for item in MIXED[:3]), kernels=(OLD, NEW)))
    assert parsed.tags.count("script") == 1
    assert "link" not in parsed.tags
    ids = [each["id"] for each in parsed.having("id")]
    assert len(ids) == len(set(ids))


def test_kernels_comparison_failures_and_tests_are_shown() -> None:
    new = [line("test_passes", "failed", "it broke", NEW), line("test_fails[1]", kernel=NEW)]
    text = drawn(run(*MIXED, *new, kernels=(OLD, NEW))).text
    for each in (
        OLD.release,
        OLD.provenance,
        f"{NEW.label} compared with {OLD.label}",
        "1 fixed, 1 regressed, 6 not compared",
        "passed → failed",
        "it broke",
        "run it again",
        "finding x does not show on 6.12.1",
        "known finding (kpageflags-ksm)",
        "guest_tests/test_b.py",
    ):
        assert each in text


def test_a_run_that_was_cut_short_says_so_first() -> None:
    text = drawn(run(line("test_one"), status=None)).text
    assert text.index("Tests are missing") < text.index("Kernels")


def test_what_the_probes_found_is_ticked_and_crossed() -> None:
    def walk(probe: str, kernel: str, **more: object) -> Item:
        found = {"found": 4, "places": 4, "lost": [], "inconclusive": "", "evidence": "pfn 0x1 -> pfn 0x2"}
        value = {"step": "walk", "probe": probe, **(more if "missing" in more else {**found, **more})}
        return replace(line(f"test_walk[{probe}]", properties=(("question", value),)), label=kernel)

    items = [
        walk("move_pages", OLD.label),
        walk("move_pages", NEW.label, found=3, lost=["164:0x1000"]),
        walk("idle_bitmap", OLD.label, missing="needs CONFIG_IDLE_PAGE_TRACKING"),
        walk("damon", NEW.label, found="many"),
    ]
    text = drawn(run(*items, kernels=(OLD, NEW))).text
    assert "✓ 4 of 4" in text
    assert "✗ 3 of 4" in text
    assert "? needs CONFIG_IDLE_PAGE_TRACKING" in text
    assert "many" not in text, "what a guest recorded is checked before use"


def test_the_console_is_open_and_marked_at_the_splat() -> None:
    text = page.text(run(failed(("kernel console", SPLAT), ("machine", "QEMU"))))
    (marked,) = re.findall(r"<mark>(.*?)</mark>", text, re.S)
    assert marked.startswith("[   29.471027] BUG: Bad page state")
    assert "dump_stack_lvl" in marked
    assert "a line before" not in marked
    assert "another" not in marked
    assert "<details open><summary>kernel console</summary>" in text
    assert "<details><summary>machine</summary>" in text


@pytest.mark.parametrize("text", ["", "nothing", SPLAT, f"{SPLAT}\n{SPLAT}", SPLAT.split("\n", 1)[1]])
def test_marking_a_console_loses_nothing(text: str) -> None:
    assert Parsed(f"<pre>{markup.highlighted(text)}</pre>").text == text


def test_evidence_is_left_out_when_the_page_is_full_and_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "_MOST_EVIDENCE", 100)
    text = drawn(run(failed(("machine", "x" * 99)), replace(failed(("machine", "y" * 99)), test="a.py::test_z"))).text
    assert ("x" * 99 in text) != ("y" * 99 in text)
    assert "The record has it" in text


# --- filters ---------------------------------------------------------------------------------------------------------


def test_every_filter_has_its_rule_and_something_to_hide() -> None:
    text = page.text(run(*MIXED, line("test_passes", kernel=NEW), kernels=(OLD, NEW)))
    boxes = set(re.findall(r'<input type="checkbox" id="([\w-]+)"', text))
    assert boxes == {
        *("show-failed", "show-missed", "show-finding", "show-skipped", "show-lacking", "show-passed"),
        *("show-kernel-0", "show-kernel-1", "only-changed"),
    }
    for each in boxes - {"only-changed"}:
        (hidden,) = re.findall(rf"body:has\(#{each}:not\(:checked\)\) \.([\w-]+) ", text)
        assert re.search(rf'class="[^"]*\b{hidden}\b', text) or hidden == "is-passed", f"{each} hides nothing"


def test_a_test_is_shown_as_the_worst_that_it_did() -> None:
    rows = drawn(run(line("test_one"), line("test_one", "failed", kernel=NEW), kernels=(OLD, NEW))).attributes
    (row,) = [attributes for tag, attributes in rows if tag == "tr" and "data-test" in attributes]
    assert row["class"] == "is-failed changed"


def test_only_the_script_of_the_page_may_run() -> None:
    text = page.text(run(*MIXED))
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-")
    assert "script-src" not in "".join(markup.head("no script"))


# --- memory ----------------------------------------------------------------------------------------------------------


def cells(sections: dict[str, str]) -> list[tuple[str, str]]:
    """Place and text of what is drawn of pages."""
    found = re.findall(
        r'<div class="page[^"]*" style="grid-area: ([\d /]+)[^>]*>([^<]*)<', "".join(drawing.drawing(sections))
    )
    return [(place.strip(), text) for place, text in found]


def test_memory_is_drawn_before_and_after_with_the_same_columns() -> None:
    text = "".join(drawing.drawing(MEMORY))
    assert text.count('class="memory"') == 2
    assert re.findall(r'class="number"[^>]*>(\d+)<', text) == ["0", "1", "2", "10"] * 2
    assert text.index("before the first move") < text.index("mremap(") < text.index("at the failure")
    assert cells(MEMORY) == [
        ("3 / 1 / 4 / 3", "swap"),
        ("3 / 3 / 4 / 4", "none"),
        ("3 / 1 / 4 / 2", "0x5c34"),
        ("3 / 4 / 4 / 5", "0x5c34"),
    ]


def test_pages_that_share_a_frame_have_one_colour() -> None:
    hues = re.findall(r"--hue: (\d+)", "".join(drawing.drawing(MEMORY)))
    assert len(hues) == 2
    assert len(set(hues)) == 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        "carve-out",
        "    page 1: pfn 0x1",
        "carve-out 0x0-0x1, 1 pages of 4 kB\n    page 1: pfn 0x1",
        f"{BEFORE.splitlines()[0]}\n  from page 5: 0x0-0x1 rw-p: x\n    pages 4 to 2: none",
        f"{BEFORE.splitlines()[0]}\n  from page 0: 0x0-0x1 rw-p: x\n    page 0:      ",
        f"{BEFORE.splitlines()[0]}\n  from page 0: 0x0-0x1 ---s: x\n    page 0: none",
    ],
)
def test_text_of_another_form_is_not_drawn(text: str) -> None:
    assert "memory" not in "".join(drawing.drawing({"memory under test at the failure": text}))


def test_a_drawing_of_much_memory_is_bounded_and_quick() -> None:
    lines = [BEFORE.splitlines()[0], "  from page 0: 0x0-0x1 rw-p: x"]
    lines += [f"    pages {number} to 999999999: pfn 0x{number:x}" for number in range(2000)]
    text = "".join(drawing.drawing({"memory under test at the failure": "\n".join(lines)}))
    assert text.count('class="number"') == 64


# --- hostile guests --------------------------------------------------------------------------------------------------


def hostile_run() -> Run:
    raw = line(
        f"guest_tests/{HOSTILE}.py::{HOSTILE}",
        "failed",
        HOSTILE,
        finding=HOSTILE,
        sections=((HOSTILE, HOSTILE), ("kernel console", f"BUG: {HOSTILE}\nBUG: Bad page state in process {HOSTILE}")),
        properties=(("question", {"step": "walk", "probe": HOSTILE, "missing": HOSTILE}),),
    )
    kernel = replace(OLD, label=HOSTILE, release=HOSTILE, provenance=HOSTILE, accelerator=HOSTILE)
    memory = f"{BEFORE.splitlines()[0]}\n  from page 0: 0x0-0x1 rw-p: {HOSTILE}\n    page 0: {HOSTILE}"
    more = failed(("memory under test at the failure", memory), ("moves", HOSTILE))
    return run(raw, replace(raw, label=HOSTILE), more, *hostile(), kernels=(OLD, kernel), status=None)


def test_whatever_a_guest_says_is_text() -> None:
    parsed = drawn(hostile_run())
    assert "img" not in parsed.tags
    assert parsed.tags.count("script") == 1
    assert parsed.text.count(HOSTILE) >= 12
    assert {"style", "class"} >= {
        name for tag, attributes in parsed.attributes if tag == "div" for name in attributes if name != "title"
    }


def test_text_that_is_not_escaped_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "escape", lambda text: text)
    with pytest.raises(AssertionError):
        test_whatever_a_guest_says_is_text()


@pytest.fixture
def browser(tmp_path: Path) -> Callable[[str], str]:
    """Gives what a browser has made of a page after its scripts ran."""
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("no chromium on PATH")

    def show(text: str) -> str:
        (tmp_path / "page.html").write_text(text)
        options: Sequence[str] = ("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'user'}")
        command = [program, *options, "--dump-dom", f"file://{tmp_path / 'page.html'}"]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout

    return show


def test_in_a_browser_the_search_runs_and_nothing_of_a_guest_does(browser: Callable[[str], str]) -> None:
    shown = browser(page.text(hostile_run()))
    assert "<title>Test results</title>" in shown
    assert re.search(r'<input type="search" id="search"[^>]*aria-label="search for a test">', shown)


def test_in_a_browser_a_script_that_got_through_does_not_run(
    browser: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "escape", lambda text: text)
    text = page.text(hostile_run())
    assert "<script>document.title='owned'</script>" in text
    assert "<title>Test results</title>" in browser(text)
    without = re.sub(r"<meta http-equiv=[^>]*>", "", text).replace("alert(1)", "0")  # nobody would answer an alert
    assert "<title>owned</title>" in browser(without), "only the policy keeps it from running"
