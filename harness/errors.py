# SPDX-License-Identifier: GPL-2.0
"""Everything that can go wrong on the host side, named by condition rather than by cause.

::

    HarnessError
    ├── UsageError            the request makes no sense; pytest exits 4
    │   └── SpecError         a --kernel that names nothing, or not what it seems
    ├── HostError             this host lacks something: a program, space, a permission
    ├── FetchError            a package could not be had, or was not what it was signed to be
    ├── BuildError            a kernel could not be built: its source does not compile
    │   ├── PatchError        a patch that does not apply
    │   └── ConfigError       an option that was asked for and did not stick
    ├── BootError             a machine never reached the agent
    ├── GuestLost             a running guest stopped answering: see GuestLost.condition
    ├── ProtocolError         the guest said something that is not the protocol
    └── DeadlineExceeded      a wait ended without what was waited for

None of these is ever a verdict about the kernel by itself: the runner decides what a lost guest means for the test
that was running, and says so.

Messages are sentences that say what happened and what to do next. The first line stands alone: it is all that a
terse reporter shows. Details (a console tail, a command line) follow on further lines.
"""

from __future__ import annotations

from enum import StrEnum


class HarnessError(Exception):
    """Base of all errors raised on purpose by this package."""


class UsageError(HarnessError):
    """The request makes no sense; nothing was started."""


class SpecError(UsageError):
    """A kernel specification names nothing, or something that is not a kernel."""


class HostError(HarnessError):
    """The host lacks something that the request needs."""


class FetchError(HarnessError):
    """A package could not be fetched, or its bytes are not those its signature vouches for."""


class BuildError(HarnessError):
    """A kernel could not be built from its source, patches and configuration."""


class PatchError(BuildError):
    """A patch is damaged, or does not apply to the source it was given for."""


class ConfigError(BuildError):
    """An option that a kernel must have, or must not have, cannot be set that way in its source."""


class BootError(HarnessError):
    """A machine was started but its kernel never reached the agent."""


class LostCondition(StrEnum):
    """How a running guest was lost."""

    #: the kernel panicked (pvpanic event or console)
    PANIC = "panic"
    #: the machine reset or powered off without being asked to
    RESET = "reset"
    #: the agent process is gone although the kernel runs
    AGENT_DIED = "agent died"
    #: no heartbeat: nothing in the guest is scheduled any more
    HANG = "hang"
    #: the kernel is alive but the test did not end before its deadline
    TEST_TIMEOUT = "test timeout"
    #: QEMU itself ended
    QEMU_DIED = "QEMU died"
    #: a machine that is no VM cannot be reached any more, for whatever reason
    CONNECTION_LOST = "connection lost"
    #: the console grew beyond its limit
    CONSOLE_FLOOD = "console flood"


class GuestLost(HarnessError):
    """A running guest cannot be used any more.

    :param condition: how it was lost.
    :param message: a sentence with what was seen.
    """

    def __init__(self, condition: LostCondition, message: str) -> None:
        super().__init__(message)
        #: how the guest was lost
        self.condition = condition


class ProtocolError(HarnessError):
    """The guest sent bytes that are not the protocol; it may be broken or hostile."""


class DeadlineExceeded(HarnessError):
    """A wait ended without what was waited for."""
