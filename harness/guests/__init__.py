# SPDX-License-Identifier: GPL-2.0
"""The machines that run tests: guests in virtual machines, cloned or booted, and boards reached over SSH."""
