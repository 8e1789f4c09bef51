# SPDX-License-Identifier: GPL-2.0
"""Provides guests of one kernel: clones of a template, or booted guests if that is wanted or cloning fails."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from harness.agent import protocol
from harness.deadline import Deadline
from harness.errors import GuestLost
from harness.guests.guest import Guest, Patience
from harness.guests.template import Template, TemplateError, thaw
from harness.guests.template_store import TemplateStore
from harness.host import memory
from harness.host.cache import Progress
from harness.machine import payload, qemu
from harness.machine.vm import Vm
from harness.markers import MARKERS

#: The next clone is started early only if more than this much host memory is available, in MiB.
_HEADROOM = 512


@dataclass
class Fleet:
    """The guests of one kernel, all with the same tests.

    :param machine: what they run.
    :param tests: the tests' archive.
    :param args: pytest's command line in the guest.
    :param cold: boot every guest rather than cloning.
    :param progress: told about boots, and why cloning is not possible.
    :param mutant: the mutant that is active in all of them, or "record"; empty for none.
    """

    machine: qemu.Machine
    tests: bytes
    args: list[str]
    cold: bool
    progress: Progress
    mutant: str = ""

    @classmethod
    def with_library(cls, machine: qemu.Machine, progress: Progress, mutant: str = "") -> Fleet:
        """Guests that are cloned, with the library for guest tests and the project's own tests."""
        tests = payload.tests_archive(payload.LIBRARY, MARKERS)
        return cls(machine, tests, list(payload.LIBRARY_ARGS), False, progress, mutant)

    def __post_init__(self) -> None:
        self.patience = Patience.scaled(self.machine.accelerator.slowdown)
        #: why guests are booted although they were to be cloned; empty if they are not
        self.obstacle = ""
        self._store = TemplateStore()
        self._template: Template | None = None
        self._asked = False
        self._ahead: Vm | None = None

    @property
    def slowdown(self) -> float:
        """How many times longer guest work may take than with hardware virtualisation."""
        return self.machine.accelerator.slowdown

    @property
    def origin(self) -> str:
        """How guests come into being, for reports: "clone" or "cold boot"."""
        return "clone" if self._template else "cold boot"

    def _find_template(self) -> None:
        if self.cold or self._asked:
            return
        self._asked = True
        try:
            base = self._store.base(self.machine, self.patience, self.progress)
            self._template = self._store.with_tests(base, self.tests, self.args, self.patience, self.progress)
        except TemplateError as error:
            self._give_up_cloning(error)

    def _give_up_cloning(self, error: TemplateError) -> None:
        self._template = None
        self.obstacle = f"cannot clone guests, booting each one instead: {error}"

    def fresh(self) -> tuple[Guest, protocol.Collected]:
        """A guest that has run no test, and the tests it has collected.

        :raises BootError: if the kernel does not reach the agent.
        :raises HostError: if QEMU cannot be started.
        """
        self._find_template()
        if self._template is None:
            return self._boot()
        ahead, self._ahead = self._ahead, None
        try:
            if ahead is not None:
                # A process that waited may have been killed meanwhile; that is no reason to miss a test.
                with contextlib.suppress(GuestLost):
                    return self._thaw(ahead, self._template)
            return self._thaw(self._template.clone(), self._template)
        except TemplateError as error:
            self._give_up_cloning(error)
            return self._boot()

    def _thaw(self, vm: Vm, template: Template) -> tuple[Guest, protocol.Collected]:
        assert template.collected is not None
        try:
            deadline = Deadline.after(self.patience.answer)
            thaw(vm, template.directory, deadline)
            guest = Guest(vm, self.patience)
            guest.hello(deadline, self.mutant)
        except BaseException:
            vm.close()
            raise
        return guest, template.collected

    def facts(self, guest: Guest) -> list[str]:
        """What a report says of the machine a guest ran on."""
        assert guest.vm is not None
        accelerator = self.machine.accelerator
        return [
            f"guest:   {self.origin}, {accelerator.name} ({accelerator.reason})",
            f"QEMU:    {guest.vm.qmp.version}",
            f"command: {guest.vm.child.command}",
        ]

    def start_ahead(self) -> None:
        """Start the next clone's process now, so that it is there when it is wanted."""
        if self._template is not None and self._ahead is None and memory.available() > _HEADROOM:
            self._ahead = self._template.clone()

    def close(self) -> None:
        """End what was started ahead, and let the template go."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None
        self._store.close()

    def _boot(self) -> tuple[Guest, protocol.Collected]:
        self.progress(f"booting {self.machine.arch} with {self.machine.accelerator.name}")
        vm = Vm(self.machine)
        try:
            deadline = Deadline.after(self.patience.boot)
            vm.connect(deadline)
            vm.run(deadline)
            guest = Guest(vm, self.patience)
            guest.hello(deadline, self.mutant)
            return guest, guest.collect(self.tests, self.args, Deadline.after(self.patience.boot))
        except BaseException:
            vm.close()
            raise
