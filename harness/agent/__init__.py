# SPDX-License-Identifier: GPL-2.0
"""The half of the harness that runs inside the guest: it answers the host and runs pytest on its behalf.

Needs Python 3.11 or later, the standard library and pytest: no more, because boards run it too.
"""
