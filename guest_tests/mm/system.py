# SPDX-License-Identifier: GPL-2.0
"""Which kernel this is, how it was configured, and skips that say what is missing."""

from __future__ import annotations

import errno
import functools
import gzip
import os
import platform
import re
from pathlib import Path
from typing import Final

import pytest

from guest_tests.mm import mapping, numa, syscalls

#: where to find the configuration, in this order; the harness puts the text there where it knows it
_CONFIGS: Final = (Path("/proc/config.gz"), Path("/etc/harness/config"))
#: exists on machines that tests may damage: the harness's images have it
_DISPOSABLE: Final = Path("/etc/harness")


def release() -> tuple[int, int, int]:
    """Version, patch level and sublevel of the running kernel: ``(6, 12, 107)``."""
    match = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", platform.release())
    if match is None:
        raise ValueError(f"the kernel calls itself {platform.release()!r}, which is no version")
    return int(match[1]), int(match[2]), int(match[3] or 0)


def parse_config(text: str) -> dict[str, str]:
    """The options that are set in the text of a .config, without their ``CONFIG_``."""
    pairs = (line.partition("=") for line in text.splitlines() if line.startswith("CONFIG_"))
    return {name.removeprefix("CONFIG_"): value.strip('"') for name, _, value in pairs}


@functools.cache
def kernel_config() -> dict[str, str] | None:
    """The options of the running kernel that are set, without their ``CONFIG_``; None if it is not known.

    From /proc/config.gz (CONFIG_IKCONFIG_PROC), else from the copy that the harness brought along.
    """
    for path in _CONFIGS:
        try:
            data = path.read_bytes()
        except OSError:
            continue
        return parse_config((gzip.decompress(data) if path.suffix == ".gz" else data).decode(errors="replace"))
    return None


def has_config(option: str) -> bool | None:
    """Whether ``CONFIG_<option>`` is y or m; None where the configuration is not known."""
    config = kernel_config()
    return None if config is None else config.get(option) in ("y", "m")


def require_config(*options: str) -> None:
    """Skip the test if one of the options is known to be off. Does not skip if the configuration is not known."""
    missing = [option for option in options if has_config(option) is False]
    if missing:
        wanted = ", ".join(f"CONFIG_{option}=y" for option in missing)
        pytest.skip(f"needs {wanted}: this kernel has {'it' if len(missing) == 1 else 'them'} off")


def require_kernel(version: int, patchlevel: int, reason: str) -> None:
    """Skip the test on kernels before ``version.patchlevel``.

    :param reason: what appeared there; completes "needs Linux 6.17 (…)".
    """
    if release() < (version, patchlevel, 0):
        pytest.skip(f"needs Linux {version}.{patchlevel} ({reason}), this is {platform.release()}")


def require_cpus(count: int) -> None:
    """Skip the test unless the guest has ``count`` CPUs."""
    if (os.cpu_count() or 1) < count:
        pytest.skip(f"needs {count} CPUs: give --guest-cpus={count}")


def require_nodes(count: int) -> None:
    """Skip the test unless ``count`` NUMA nodes have memory."""
    have = len(numa.nodes())
    if have < count:
        pytest.skip(f"needs {count} NUMA nodes with memory, this machine has {have}: boot with numa=fake={count}")


def require_file(path: str, config: str) -> None:
    """Skip the test if ``path`` is missing, naming the option that would bring it."""
    if not Path(path).exists():
        pytest.skip(f"needs {path}, which this kernel does not have: CONFIG_{config} brings it")


def has_vma_names() -> bool:
    """Whether anonymous memory can be named, found by a call about no memory.

    :raises OSError: if the kernel answers anything but EINVAL.
    """
    try:
        syscalls.prctl(syscalls.PR_SET_VMA, syscalls.PR_SET_VMA_ANON_NAME)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    return True


def require_vma_names() -> None:
    """Skip the test unless anonymous memory can be named."""
    if not has_vma_names():
        pytest.skip("needs CONFIG_ANON_VMA_NAME=y: this kernel has it off")


def is_disposable() -> bool:
    """Whether this is a guest of the harness, where damage that lasts until the next boot is no harm."""
    return _DISPOSABLE.is_dir()


def require_disposable() -> None:
    """Skip the test outside of the harness's own guests, because its damage lasts until the next boot."""
    if not is_disposable():
        pytest.skip(
            f"takes page frames away until the next boot: needs a guest of the harness (marked by {_DISPOSABLE})"
        )


@functools.cache
def supports_relocate() -> bool:
    """Whether mremap() knows ``MREMAP_RELOCATE_ANON``, found by a call: other kernels answer EINVAL.

    :raises OSError: if the kernel answers anything else.
    """
    scratch = mapping.map_anonymous(1).touch()
    try:
        # Same length and no fixed place: a kernel that knows the flag leaves the mapping where it is.
        flags = syscalls.MREMAP_MAYMOVE | syscalls.MREMAP_RELOCATE_ANON
        scratch.address = syscalls.mremap(scratch.address, scratch.length, scratch.length, flags)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    finally:
        scratch.unmap()
    return True
