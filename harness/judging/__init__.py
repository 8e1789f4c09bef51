# SPDX-License-Identifier: GPL-2.0
"""What the observation of a test means: console, taint, verdict, findings."""
