# SPDX-License-Identifier: GPL-2.0
"""The agent: the part of the harness that runs inside the guest, answers the host, and runs pytest.

It needs only Python 3.11 or later and pytest, because it also runs on boards.
"""
