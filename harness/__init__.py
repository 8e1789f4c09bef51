# SPDX-License-Identifier: GPL-2.0
"""Boots Linux kernels under QEMU and judges what they do to anonymous memory.

The map of the modules stands in ``CONTRIBUTING.md``.

PYTEST_DONT_REWRITE: the ``harness`` command imports this package before it starts pytest, which would warn that it
cannot rewrite the package's assertions any more.
"""

__version__ = "0.1.0"
