# SPDX-License-Identifier: GPL-2.0
"""The markers of guest tests, as pytest registers them on the host and in guests."""

from __future__ import annotations

MARKERS = (
    "shared_guest: this test leaves nothing behind, so that its guest may run the next such test",
    "guest_timeout(seconds): how long the test may take with hardware virtualisation; scaled for emulation",
    "storm: races for as long as --race-seconds says, in addition to the time of any test",
    "icount: counts instructions, and is left out without --icount",
    "explore: runs programs of the explorer, and is left out without --explore",
    "kselftest: runs a test of upstream, and is left out without --kselftest",
    "question: part of the answer that --answer gives",
    "finding(name, match): shows a kernel bug that harness/judging/findings.toml describes, by failing with a message "
    "that contains match",
)
