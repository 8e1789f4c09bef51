# SPDX-License-Identifier: GPL-2.0
"""What runs tests: guests in virtual machines, cloned or booted, and machines reached by SSH."""
