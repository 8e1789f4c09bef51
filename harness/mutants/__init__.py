# SPDX-License-Identifier: GPL-2.0
"""``harness mutants``: which deliberate bugs the guest tests notice."""
