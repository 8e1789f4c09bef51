# SPDX-License-Identifier: GPL-2.0
"""A guest as seen from inside, on each architecture, and runs with pytest's usual options."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest

from harness.arch import ARCHITECTURES, Architecture
from harness.report import results
from tests.lab import KERNEL, Lab, Outcome, run_own_tests

INSIDE = """
    import os
    import platform
    import sys
    from pathlib import Path

    import pytest

    def test_says_who_it_is(record_property):
        record_property("release", platform.release())
        record_property("machine", platform.machine())

    def test_has_two_nodes_with_memory():
        nodes = sorted(Path("/sys/devices/system/node").glob("node[0-9]*"))
        assert len(nodes) == 2
        for node in nodes:
            assert int((node / "meminfo").read_text().split("MemTotal:")[1].split()[0]) > 100_000

    def test_has_swap():
        assert len(Path("/proc/swaps").read_text().splitlines()) == 2

    def test_has_the_memory_controller():
        assert "memory" in Path("/sys/fs/cgroup/cgroup.controllers").read_text().split()

    def test_has_the_devices():
        bound = {link.name for driver in Path("/sys/bus/virtio/drivers").iterdir() for link in driver.glob("virtio*")}
        assert len(bound) >= 2, "virtio-serial and virtio-rng"
        assert Path("/sys/class/misc/hw_random").exists() or Path("/dev/hwrng").exists()

    def test_is_root_and_has_nobody_else():
        assert os.geteuid() == 0
        assert os.listdir("/sys/class/net") == ["lo"]

    def test_knows_its_kernels_configuration():
        assert "CONFIG_KSM=y" in Path("/etc/harness/config").read_text().splitlines()

    def test_uses_the_library():
        from guest_tests.mm import syscalls
        assert syscalls.__file__.startswith("/harness/tests/guest_tests/mm/")

    def test_runs_the_hosts_pytest(record_property):
        record_property("pytest", pytest.__version__)
"""


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_a_guest_has_what_tests_of_memory_management_need(lab: Lab, architecture: Architecture) -> None:
    if shutil.which(architecture.qemu) is None:
        pytest.skip(f"{architecture.qemu} is not installed")
    lab.write("test_inside.py", INSIDE)
    # Shared, to save clones: these look and do not touch.
    outcome = lab.run(f"--arch={architecture}", "--isolate=kernel")
    assert outcome.status == 0, outcome.output
    assert len(outcome.cases) == INSIDE.count("def test_")
    said = outcome["test_says_who_it_is"].properties
    assert said["machine"] == architecture.machine
    assert said["release"] == said["kernel"]
    assert said["arch"] == architecture.name
    assert said["guest"] == "clone"
    assert outcome["test_runs_the_hosts_pytest"].properties["pytest"] == pytest.__version__


# ----------------------------------------------------------------------------------------------------------------------
# Like any pytest run

MIXED = """
    import pytest

    pytestmark = pytest.mark.shared_guest

    def test_passes():
        pass

    def test_fails():
        two = 2
        assert 1 == two

    @pytest.mark.parametrize("size", [1, "two words", "a-b"])
    def test_is_parametrised(size):
        pass

    def test_skips():
        pytest.skip("the guest's own reason")

    @pytest.mark.skip(reason="by a marker")
    def test_is_skipped():
        pass

    @pytest.mark.xfail(reason="known", strict=True)
    def test_fails_as_expected():
        assert False

    def test_has_no_fixture(nowhere):
        pass

    @pytest.fixture
    def leaves():
        yield
        raise RuntimeError("teardown")

    def test_breaks_in_teardown(leaves):
        pass

    class TestGroup:
        @pytest.fixture(scope="class")
        def once(self):
            return []

        def test_first(self, once):
            once.append(1)

        def test_second(self, once):
            assert once == [1]
"""


@pytest.fixture
def mixed(lab: Lab) -> Lab:
    lab.write("test_mixed.py", MIXED)
    return lab


@pytest.fixture(scope="module")
def whole(lab: Lab) -> Outcome:
    """One run of everything."""
    lab.write("test_mixed.py", MIXED)
    return lab.run("-ra", "-o", "cache_dir=.cache")


def test_every_outcome_is_reported_as_pytest_would(whole: Outcome) -> None:
    assert whole.status == 1
    (summary,) = [line for line in whole.output.splitlines() if line.startswith("====") and " in " in line]
    for part in ("1 failed", "7 passed", "2 skipped", "1 xfailed", "2 errors"):
        assert part in summary


def test_ids_name_the_kernel_and_keep_the_parameters(whole: Outcome) -> None:
    ids = [case.parameters for case in whole.cases if case.name == "test_is_parametrised"]
    assert ids == [f"{KERNEL}-{arch}-{size}" for size in ("1", "two words", "a-b") for arch in [ids[0].split("-")[1]]]


def test_skips_carry_the_guests_reason(whole: Outcome) -> None:
    assert whole["test_skips"].message == "the guest's own reason"
    assert whole["test_is_skipped"].message == "by a marker"
    assert "the guest's own reason" in whole.said("SKIPPED [1] checks/test_mixed.py")


def test_a_failure_shows_the_rewritten_assertion_and_the_place_in_our_tree(whole: Outcome) -> None:
    text = whole["test_fails"].text
    assert "assert 1 == two" in text
    assert "E       assert 1 == 2" in text
    assert "checks/test_mixed.py:" in text
    assert "/harness/tests" not in text


def test_verdicts_are_those_of_kcidb(whole: Outcome) -> None:
    words = whole.verdicts
    assert words["test_passes"] == "PASS"
    assert words["test_fails"] == "FAIL"
    assert words["test_skips"] == "SKIP"
    assert words["test_has_no_fixture"] == "ERROR"
    assert words["test_breaks_in_teardown"] == "ERROR"


def test_last_failed_runs_what_failed(mixed: Lab, whole: Outcome) -> None:
    assert whole.cases
    again = mixed.run("--lf", "-o", "cache_dir=.cache")
    assert {case.name for case in again.cases} == {"test_fails", "test_has_no_fixture", "test_breaks_in_teardown"}


def test_the_first_failure_may_end_the_run(mixed: Lab) -> None:
    outcome = mixed.run("-x")
    assert outcome.status == 1
    assert [case.name for case in outcome.cases] == ["test_passes", "test_fails"]
    assert mixed.left_over() == []


def test_nothing_boots_to_collect(mixed: Lab) -> None:
    outcome = mixed.run("--collect-only", "-q", env={"PATH": "/nonexistent"})
    assert outcome.status == 0
    assert f"checks/test_mixed.py::test_passes[{KERNEL}-" in outcome.output


def test_a_node_id_selects_one_test_on_one_kernel(mixed: Lab, whole: Outcome) -> None:
    parameters = next(case.parameters for case in whole.cases if case.name == "test_passes")
    outcome = mixed.run(f"checks/test_mixed.py::test_passes[{parameters}]")
    assert outcome.status == 0
    assert [case.name for case in outcome.cases] == ["test_passes"]


def test_selecting_nothing_is_said_by_the_status(mixed: Lab) -> None:
    assert mixed.run("-k", "no_such_test").status == 5


def test_two_kernels_run_side_by_side_by_keyword_and_marker(mixed: Lab) -> None:
    outcome = mixed.run("-k", "passes or skips", "-m", "shared_guest", "--kernel=debian:7.3")
    assert outcome.status == 0, outcome.output
    seen = [(case.name, case.properties["kernel"][:4], case.parameters.split("-")[0]) for case in outcome.cases]
    assert sorted(seen) == [
        ("test_passes", "6.12", "debian:6.12"),
        ("test_passes", "7.3.", "debian:7.3"),
        ("test_skips", "6.12", "debian:6.12"),
        ("test_skips", "7.3.", "debian:7.3"),
    ]


def test_a_plain_move_lacks_nothing_on_a_kernel_without_relocation(tmp_path: Path) -> None:
    test = "guest_tests/test_merge.py::test_after_unfaulted"
    outcome = run_own_tests(tmp_path / "junit.xml", f"--kernel={KERNEL}", test)
    assert outcome.status == 0, outcome.output
    lacking = {case.parameters.rpartition("-")[2]: results.LACKS in case.properties for case in outcome.cases}
    assert lacking == {"plain": False, "must": True}


def test_workers_share_the_work_and_the_template(mixed: Lab) -> None:
    if importlib.util.find_spec("xdist") is None:
        pytest.skip("pytest-xdist is not installed")
    outcome = mixed.run("-n", "2", "-k", "passes or fails")
    assert outcome.status == 1, outcome.output
    assert outcome.verdicts == {"test_passes": "PASS", "test_fails": "FAIL", "test_fails_as_expected": "SKIP"}
    assert {case.properties["guest"] for case in outcome.cases} == {"clone"}
    assert mixed.machines() == {}
    assert mixed.left_over() == []
