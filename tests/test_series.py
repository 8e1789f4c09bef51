# SPDX-License-Identifier: GPL-2.0
"""Patches are read in the formats that git and b4 write."""

from __future__ import annotations

import base64
import hashlib
import quopri
from pathlib import Path

import pytest

from harness.build.series import load, patchset_hash
from harness.errors import SpecError
from tests.kernel_files import fill

DIFF = """\
diff --git a/mm/toy.c b/mm/toy.c
--- a/mm/toy.c
+++ b/mm/toy.c
@@ -1,2 +1,2 @@
-int a = 1;
+int a = 2;
 int b;
@@ -30,2 +30,2 @@ int f(void)
-int y;
+int z;
 int x;
"""
MAIL = "From: A <a@x>\nSubject: [PATCH {number}/2] mm: é\n{more}\nFrom here on, words.\n---\n\n{diff}-- \n2.39.5\n"
POSTMARK = "From 0123456789abcdef Mon Sep 17 00:00:00 2001\n"
COVER = "From: A <a@x>\nSubject: [PATCH 0/2] mm\n\nWords.\n\n mm/toy.c | 2 +-\n"


def mail(number: int, more: str = "", diff: str = DIFF) -> str:
    return MAIL.format(number=number, more=more, diff=diff)


def test_a_plain_diff_is_a_patch(tmp_path: Path) -> None:
    fill({tmp_path / "fix.diff": DIFF})
    (patch,) = load(tmp_path / "fix.diff")
    assert (patch.name, patch.raw, patch.diff) == ("fix.diff", DIFF.encode(), DIFF.encode())


def test_a_directory_is_taken_in_the_order_of_names_without_its_cover_letter(tmp_path: Path) -> None:
    fill({tmp_path / name: POSTMARK + mail(1) for name in ("0002-b.patch", "0001-a.patch", "0010-c.patch")})
    fill({tmp_path / "0000-cover-letter.patch": POSTMARK + COVER, tmp_path / "README": DIFF})
    assert [patch.name for patch in load(tmp_path)] == ["0001-a.patch", "0002-b.patch", "0010-c.patch"]


def test_an_mbox_is_split_into_messages(tmp_path: Path) -> None:
    fill({tmp_path / "v2.mbx": "".join(POSTMARK + each + "\n" for each in (COVER, mail(1), mail(2)))})
    patches = load(tmp_path / "v2.mbx")
    assert [patch.name for patch in patches] == [
        "message 2 of v2.mbx ([PATCH 1/2] mm: é)",
        "message 3 of v2.mbx ([PATCH 2/2] mm: é)",
    ]
    assert all(patch.raw.startswith(POSTMARK.encode()) for patch in patches)


@pytest.mark.parametrize(
    ("encoding", "encode"),
    [("quoted-printable", quopri.encodestring), ("base64", base64.encodebytes), ("Base64", base64.encodebytes)],
)
def test_a_transfer_encoding_is_undone(tmp_path: Path, encoding: str, encode: object) -> None:
    assert callable(encode)
    body = encode(DIFF.encode()).decode()
    head = "From: A <a@x>\nSubject: x\nMIME-Version: 1.0\nContent-Type: text/plain; charset=utf-8\n"
    fill({tmp_path / "x.eml": f"{head}Content-Transfer-Encoding: {encoding}\n\n{body}"})
    (patch,) = load(tmp_path / "x.eml")
    assert patch.diff == DIFF.encode()


def test_what_holds_no_diff_is_refused(tmp_path: Path) -> None:
    fill({tmp_path / "x.mbx": POSTMARK + COVER, tmp_path / "empty/README": "x"})
    with pytest.raises(SpecError, match=r"x\.mbx holds no diff"):
        load(tmp_path / "x.mbx")
    with pytest.raises(SpecError, match=r"empty holds no \.patch, .* file with a diff"):
        load(tmp_path / "empty")


def test_the_digest_is_that_of_kcidb(tmp_path: Path) -> None:
    fill({tmp_path / "1.patch": mail(1), tmp_path / "2.patch": mail(2)})
    digests = [hashlib.sha256((tmp_path / f"{number}.patch").read_bytes()).hexdigest() for number in (1, 2)]
    assert (
        patchset_hash(load(tmp_path)) == hashlib.sha256("".join(f"{each}\n" for each in digests).encode()).hexdigest()
    )
    assert patchset_hash(load(tmp_path)[::-1]) != patchset_hash(load(tmp_path))
    assert patchset_hash([]) == ""


def test_a_hunk_is_named_by_its_number(tmp_path: Path) -> None:
    fill({tmp_path / "fix.diff": DIFF})
    (patch,) = load(tmp_path / "fix.diff")
    assert patch.hunk("mm/toy.c", 30) == "hunk 2 of 2 of mm/toy.c (line 30)"
    assert patch.hunk("mm/other.c", 30) == "the hunk at line 30 of mm/other.c"
