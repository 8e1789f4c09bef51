# SPDX-License-Identifier: GPL-2.0
"""Each template is made once, also if several runs want it. Clones do not change it, and damage is detected."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.agent import protocol
from harness.deadline import Deadline
from harness.errors import BootError, GuestLost, LostCondition
from harness.guests import template
from harness.guests.guest import Guest, Patience
from harness.guests.template import Template
from harness.guests.template_store import TemplateStore
from harness.host.cache import sha256, silent
from harness.kernels import grammar, kernel
from harness.machine import payload, provision
from harness.machine.qemu import Machine
from harness.options import MachineOptions
from tests.lab import KERNEL

#: makes or finds the base template, and says which
MAKER = f"""
import sys
from pathlib import Path
from harness.guests.guest import Patience
from harness.guests.template_store import TemplateStore
from harness.host.cache import silent
from harness.kernels import grammar
from harness.machine import provision
from harness.options import MachineOptions
_, machine = provision.provision(grammar.parse({KERNEL!r}), MachineOptions(), silent)
told = []
store = TemplateStore(Path(sys.argv[1]))
template = store.base(machine, Patience.scaled(machine.accelerator.slowdown), told.append)
print("made" if told else "found", template.directory.name)
"""


@pytest.fixture(scope="module")
def machine() -> Machine:
    spec = grammar.parse(KERNEL)
    assert isinstance(spec, kernel.BootSpec)
    return provision.provision(spec, MachineOptions(), silent)[1]


@pytest.fixture(scope="module")
def patience(machine: Machine) -> Patience:
    return Patience.scaled(machine.accelerator.slowdown)


@pytest.fixture(scope="module")
def root() -> Iterator[Path]:
    """A store of our own, cold, on the file system of the real one."""
    place = Path(tempfile.mkdtemp(prefix="clones-", dir=TemplateStore().root.parent))
    yield place
    shutil.rmtree(place)


@pytest.fixture(scope="module")
def made_by_two(root: Path, machine: Machine) -> list[str]:
    """What two runs say that began at the same time with nothing there."""
    assert machine  # fetched: the race is about the template
    runs = [
        subprocess.Popen([sys.executable, "-c", MAKER, str(root)], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    return sorted(run.communicate(timeout=400)[0].strip() for run in runs)


@pytest.fixture
def base(made_by_two: list[str], root: Path, machine: Machine, patience: Patience) -> Iterator[Template]:
    assert made_by_two
    store = TemplateStore(root)
    told: list[str] = []
    yield store.base(machine, patience, told.append)
    assert told == [], "the template was there"
    store.close()


def thawed(base: Template, patience: Patience) -> Guest:
    vm = base.clone()
    deadline = Deadline.after(patience.answer)
    template.thaw(vm, base.directory, deadline)
    guest = Guest(vm, patience)
    guest.hello(deadline)
    return guest


def test_of_two_runs_that_want_one_template_one_makes_it(made_by_two: list[str]) -> None:
    (found, found_key), (made, made_key) = (line.split() for line in made_by_two)
    assert (found, made) == ("found", "made")
    assert found_key == made_key


def test_clones_run_side_by_side_and_one_that_is_killed_takes_no_other_along(
    base: Template, patience: Patience
) -> None:
    one, two = thawed(base, patience), thawed(base, patience)
    with one.vm, two.vm:
        assert one.ready is not None
        assert two.ready is not None
        assert one.ready.release == two.ready.release == base.ready.release
        one.vm.child.kill()
        with pytest.raises(GuestLost) as caught:
            one.collect(b"", [], Deadline.after(patience.answer))
        assert caught.value.condition is LostCondition.QEMU_DIED
        assert two.hello(Deadline.after(patience.answer)).uptime >= two.ready.uptime


def test_a_paused_guest_takes_no_time_and_goes_on_where_it_stood(base: Template, patience: Patience) -> None:
    guest = thawed(base, patience)
    with guest.vm:
        guest.pause()
        stood = processor_time(guest.vm.child.pid)
        time.sleep(2)
        assert processor_time(guest.vm.child.pid) - stood < 0.05
        with pytest.raises(BootError, match="silent"):
            guest.hello(Deadline.after(0.5))
        guest.resume()
        assert guest.ready is not None
        uptime = guest.hello(Deadline.after(patience.answer)).uptime
        assert uptime < guest.ready.uptime + 1.9, "its clock went on while it was paused"


def processor_time(pid: int) -> float:
    """Seconds that a process has run."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def test_a_clone_never_writes_to_its_template(base: Template, patience: Patience, tmp_path: Path) -> None:
    before = template._stamp(base.directory), [sha256(path) for path in base.ram]
    (tmp_path / "checks").mkdir()
    (tmp_path / "checks" / "test_writes.py").write_text(
        "def test_writes():\n    assert len(bytearray(b'x' * (64 << 20))) == 64 << 20\n"
    )
    guest = thawed(base, patience)
    with guest.vm:
        tests = payload.tests_archive(tmp_path / "checks", [])
        collected = guest.collect(tests, ["checks"], Deadline.after(patience.boot))
        assert collected.nodeids == ["checks/test_writes.py::test_writes"], collected.errors
        run = protocol.Run(collected.nodeids[0], "", "m1")
        *reports, finished = guest.run(run, Deadline.after(patience.test))
        assert isinstance(finished, protocol.Finished)
        assert [report["outcome"] for report in reports if isinstance(report, dict)] == ["passed"] * 3
    assert (template._stamp(base.directory), [sha256(path) for path in base.ram]) == before


def test_an_agent_whose_tests_cannot_be_collected_says_so(base: Template, patience: Patience, tmp_path: Path) -> None:
    (tmp_path / "checks").mkdir()
    (tmp_path / "checks" / "test_broken.py").write_text("import no_such_module\n")
    guest = thawed(base, patience)
    with guest.vm:
        tests = payload.tests_archive(tmp_path / "checks", [])
        collected = guest.collect(tests, ["checks"], Deadline.after(patience.boot))
    assert collected.nodeids == []
    (error,) = collected.errors
    assert error.startswith("checks/test_broken.py: ")
    assert "no_such_module" in error


def test_a_template_of_another_user_is_not_trusted(root: Path, machine: Machine, patience: Patience) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a directory away")
    foreign = root / "foreign"
    foreign.mkdir()
    os.chown(foreign, 65534, 65534)
    with pytest.raises(template.TemplateError, match="belongs to another user"):
        TemplateStore(foreign).base(machine, patience, silent)


def test_a_damaged_template_is_made_again(base: Template, machine: Machine, patience: Patience, root: Path) -> None:
    """Last, because it takes the others' template away."""
    os.truncate(base.ram[1], 4096)
    told: list[str] = []
    store = TemplateStore(root)
    again = store.base(machine, patience, told.append)
    assert told == [f"booting {machine.arch} once with {machine.accelerator.name}, for a template"]
    assert again.ram[1].stat().st_size == (machine.memory << 20) // len(again.ram)
    guest = thawed(again, patience)
    with guest.vm:
        assert guest.ready is not None
    store.close()
