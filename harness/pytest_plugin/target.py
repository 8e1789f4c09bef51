# SPDX-License-Identifier: GPL-2.0
"""One kernel of a run: what ``--kernel`` named, prepared to give out guests."""

from __future__ import annotations

import shlex
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from harness.arch import Architecture
from harness.errors import HarnessError, UsageError
from harness.guests.source import GuestSource
from harness.host.cache import Progress
from harness.kernels.kernel import BootSpec, Kernel, Spec, SshSpec
from harness.machine import provision
from harness.machine.qemu import Machine
from harness.options import MachineOptions

if TYPE_CHECKING:  # few runs audit, and drgn takes a third of a second to import
    from harness.audit.live import Auditor


class Target(ABC):
    """What tests run on.

    :param spec: as it was parsed.
    :param progress: told about what takes long.
    """

    #: why it cannot be used, once that is known
    broken: HarnessError | None = None

    def __init__(self, spec: Spec, progress: Progress) -> None:
        self.spec = spec
        self.progress = progress

    @property
    def label(self) -> str:
        """Names it in test ids; unique in a run."""
        return self.spec.label

    @property
    @abstractmethod
    def arch(self) -> Architecture | None:
        """Its architecture; None while nobody knows."""

    @property
    def kernel(self) -> Kernel | None:
        """The kernel; None if it is not known: a board's, or one that could not be had."""
        return None

    @property
    def machine(self) -> Machine | None:
        """The virtual machine's description; None for a board, or if the kernel could not be had."""
        return None

    @property
    def again(self) -> str:
        """The start of a command line that names this kernel once more."""
        arch = f" --arch={self.arch}" if self.arch else ""
        return f"pytest --kernel={shlex.quote(self.spec.text)}{arch}"

    @abstractmethod
    def prepare(self) -> None:
        """Fetch what is needed now. Errors other than a wrong request are kept in :attr:`broken`, for the tests.

        :raises UsageError: if there is no such kernel.
        """

    @abstractmethod
    def source(self, tests: bytes, args: list[str], *, cold: bool) -> GuestSource:
        """What gives out its guests; only after :meth:`prepare`.

        :param tests: the tests' archive.
        :param args: pytest's command line in the guests.
        :param cold: boot every guest instead of cloning.
        """

    @abstractmethod
    def auditor(self) -> Auditor:
        """What audits its guests' memory, or says why that cannot be done; only after :meth:`prepare`."""


class VirtualTarget(Target):
    """A kernel that is booted in virtual machines.

    :param options: about the machines.
    """

    spec: BootSpec

    def __init__(self, spec: BootSpec, options: MachineOptions, progress: Progress) -> None:
        super().__init__(spec, progress)
        self._options = options
        self._prepared: tuple[Kernel, Machine] | None = None

    @property
    def arch(self) -> Architecture:
        """See :class:`Target`."""
        return self.spec.arch

    @property
    def kernel(self) -> Kernel | None:
        """See :class:`Target`."""
        return self._prepared[0] if self._prepared else None

    @property
    def machine(self) -> Machine | None:
        """See :class:`Target`."""
        return self._prepared[1] if self._prepared else None

    def prepare(self) -> None:
        """See :class:`Target`."""
        if self._prepared or self.broken:
            return
        try:
            self._prepared = provision.provision(self.spec, self._options, self.progress)
        except UsageError:
            raise
        except HarnessError as error:
            self.broken = error

    def source(self, tests: bytes, args: list[str], *, cold: bool) -> GuestSource:
        """See :class:`Target`."""
        from harness.guests.fleet import Fleet

        assert self._prepared is not None
        return Fleet(self._prepared[1], tests, args, cold, self.progress, self._options.mutant)

    def auditor(self) -> Auditor:
        """See :class:`Target`."""
        from harness.audit import live

        assert self._prepared is not None
        return live.auditor(self._prepared[0], self._options, self.progress)


class BoardTarget(Target):
    """A machine that runs already and is reached by SSH."""

    spec: SshSpec

    @property
    def arch(self) -> Architecture | None:
        """See :class:`Target`."""
        return self.spec.arch

    def prepare(self) -> None:
        """See :class:`Target`. A board is connected to when the first test needs it."""

    def source(self, tests: bytes, args: list[str], *, cold: bool) -> GuestSource:
        """See :class:`Target`. A board is never booted here, so ``cold`` means nothing."""
        from harness.guests.board import BoardFleet

        return BoardFleet(self.spec, tests, args, self.progress)

    def auditor(self) -> Auditor:
        """See :class:`Target`."""
        from harness.audit.live import Auditor

        return Auditor("the memory of a machine that is reached by SSH cannot be read")


def targets(specs: list[BootSpec | SshSpec], options: MachineOptions, progress: Progress) -> dict[str, Target]:
    """The targets of a run by label, in the order of the command line.

    :raises UsageError: if an option makes no sense for one of them.
    """
    found: dict[str, Target] = {}
    for spec in specs:
        if isinstance(spec, BootSpec):
            found[spec.label] = VirtualTarget(spec, options, progress)
        elif options.icount:
            raise UsageError("--icount needs a virtual machine, whose clock can count: leave out ssh:// kernels")
        elif options.mutant:
            raise UsageError("--mutant needs kernels that are built here: leave out ssh:// kernels")
        elif options.kselftest:
            raise UsageError("--kselftest brings programs along in the initramfs: leave out ssh:// kernels")
        else:
            found[spec.label] = BoardTarget(spec, progress)
    return found
