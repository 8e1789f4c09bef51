# SPDX-License-Identifier: GPL-2.0
"""What we need of the host: processes, directories, memory, the terminal."""
