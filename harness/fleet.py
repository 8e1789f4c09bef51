# SPDX-License-Identifier: GPL-2.0
"""Gives out guests of one kernel: clones of a template, or cold boots where asked for or where cloning fails."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from harness import qemu
from harness.agent import protocol
from harness.cache import Progress
from harness.deadline import Deadline
from harness.guest import Guest, Patience
from harness.template import Store, Template, TemplateError, thaw
from harness.vm import Vm

#: MiB of host memory that must stay available for a clone to be started ahead of its turn.
_HEADROOM = 512


@dataclass
class Fleet:
    """The guests of one kernel, all with the same tests.

    :param machine: what they run.
    :param tests: the tests' archive.
    :param args: pytest's command line in the guest.
    :param cold: boot every guest rather than cloning.
    :param progress: told about boots, and why cloning is not possible.
    """

    machine: qemu.Machine
    tests: bytes
    args: list[str]
    cold: bool
    progress: Progress

    def __post_init__(self) -> None:
        self.patience = Patience.scaled(self.machine.accelerator.slowdown)
        self._ahead: Vm | None = None

    @property
    def origin(self) -> str:
        """How guests come into being, for reports: "clone" or "cold boot"."""
        return "clone" if self._template else "cold boot"

    @cached_property
    def _template(self) -> Template | None:
        if self.cold:
            return None
        store = Store()
        try:
            base = store.base(self.machine, self.patience, self.progress)
            return store.with_tests(base, self.tests, self.args, self.patience, self.progress)
        except TemplateError as error:
            self.progress(f"cannot clone guests, booting each one instead: {error}")
            return None

    def fresh(self) -> tuple[Guest, protocol.Collected]:
        """A guest that has run no test, and the tests it has collected.

        :raises BootError: if the kernel does not reach the agent.
        :raises HostError: if QEMU cannot be started.
        """
        if self._template is None:
            return self._boot()
        vm, self._ahead = self._ahead or self._template.clone(), None
        try:
            deadline = Deadline.after(self.patience.answer)
            thaw(vm, self._template.directory, deadline)
            guest = Guest(vm, self.patience)
            guest.hello(deadline)
        except BaseException:
            vm.close()
            raise
        assert self._template.collected is not None
        return guest, self._template.collected

    def start_ahead(self) -> None:
        """Start the next clone's process now, so that it is there when it is wanted."""
        if self._template is not None and self._ahead is None and available_memory() > _HEADROOM:
            self._ahead = self._template.clone()

    def close(self) -> None:
        """End what was started ahead."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def _boot(self) -> tuple[Guest, protocol.Collected]:
        self.progress(f"booting {self.machine.arch} with {self.machine.accelerator.name}")
        vm = Vm(self.machine)
        try:
            deadline = Deadline.after(self.patience.boot)
            vm.connect(deadline)
            vm.run(deadline)
            guest = Guest(vm, self.patience)
            guest.hello(deadline)
            return guest, guest.collect(self.tests, self.args, Deadline.after(self.patience.boot))
        except BaseException:
            vm.close()
            raise


def available_memory() -> int:
    """MiB of memory the host can hand out without swapping (MemAvailable)."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) // 1024
    return 0
