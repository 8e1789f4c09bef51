# SPDX-License-Identifier: GPL-2.0
"""The exceptions of the host side.

::

    HarnessError
    ├── UsageError            the options or arguments are wrong; pytest exits with status 4
    │   └── SpecError         a --kernel does not name a kernel
    ├── HostError             this host lacks a program, disk space, or a permission
    ├── FetchError            a package could not be fetched, or its digest or signature is wrong
    ├── BuildError            a kernel could not be built
    │   ├── PatchError        a patch does not apply
    │   └── ConfigError       an option cannot have the value that was asked for
    ├── BootError             a machine was started, but its agent never answered
    ├── GuestLost             a running guest cannot be used any more: see GuestLost.condition
    ├── ProtocolError         the guest sent bytes that are not a message of the protocol
    └── DeadlineExceeded      a wait ended without what was waited for

None of these is a verdict about a kernel. When a guest is lost, :mod:`harness.judging.verdict` decides what that means
for the test that was running.

Messages are sentences that say what happened and what to do next. The first line must be complete by itself, because
a short report shows only that line. Details, such as the end of the console log, follow on further lines.
"""

from __future__ import annotations

from enum import StrEnum


class HarnessError(Exception):
    """Base class of all errors that the harness raises on purpose."""


class UsageError(HarnessError):
    """The options or arguments are wrong; nothing was started."""


class SpecError(UsageError):
    """A ``--kernel`` does not name a kernel, or names one for another architecture."""


class HostError(HarnessError):
    """The host lacks a program, disk space, or a permission."""


class FetchError(HarnessError):
    """A package could not be fetched, or its digest or signature is wrong."""


class BuildError(HarnessError):
    """A kernel could not be built from its source, patches and configuration."""


class PatchError(BuildError):
    """A patch is damaged, or does not apply to its source."""


class ConfigError(BuildError):
    """An option cannot have the value that a configuration fragment asks for."""


class BootError(HarnessError):
    """A machine was started, but its agent never answered."""


class LostCondition(StrEnum):
    """How a running guest was lost."""

    #: the kernel panicked (pvpanic event or console)
    PANIC = "panic"
    #: the machine reset or powered off by itself
    RESET = "reset"
    #: the agent process ended, but the kernel runs
    AGENT_DIED = "agent died"
    #: there is no heartbeat: the guest does not schedule processes any more
    HANG = "hang"
    #: the kernel is alive, but the test did not end before its deadline
    TEST_TIMEOUT = "test timeout"
    #: the QEMU process ended
    QEMU_DIED = "QEMU died"
    #: the SSH connection to a board ended, for an unknown reason
    CONNECTION_LOST = "connection lost"
    #: the guest wrote more to the console than the limit
    CONSOLE_FLOOD = "console flood"


class GuestLost(HarnessError):
    """A running guest cannot be used any more.

    :param condition: how it was lost.
    :param message: a sentence that says what was observed.
    """

    def __init__(self, condition: LostCondition, message: str) -> None:
        super().__init__(message)
        #: how the guest was lost
        self.condition = condition


class ProtocolError(HarnessError):
    """The guest sent bytes that are not a message of the protocol."""


class DeadlineExceeded(HarnessError):
    """A wait ended without what was waited for."""
