# SPDX-License-Identifier: GPL-2.0
"""What is told of a run beyond each test: kernels compared, costs, the answer in words."""
