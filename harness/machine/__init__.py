# SPDX-License-Identifier: GPL-2.0
"""Virtual machines: QEMU, its accelerator, its protocol, and what a guest boots from."""
