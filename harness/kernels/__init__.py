# SPDX-License-Identifier: GPL-2.0
"""What --kernel names, and how each kind of name becomes a kernel that QEMU boots."""
