# SPDX-License-Identifier: GPL-2.0
"""Each test gets a fresh guest: no test sees what another did to its kernel, in any order."""

from __future__ import annotations

import shutil
import time

import pytest

from tests.lab import Lab, Outcome

#: Each test looks for what the others leave, then leaves it: a poisoned page, KSM's knobs, taint, files, processes.
DIRTY = """
    import mmap
    import os
    import random
    import subprocess
    import time
    import uuid
    from pathlib import Path

    import pytest

    KSM = Path("/sys/kernel/mm/ksm/run")
    TAINTED = Path("/proc/sys/kernel/tainted")
    MADV_HWPOISON = 100

    def poisoned():
        return int(Path("/proc/meminfo").read_text().partition("HardwareCorrupted:")[2].split()[0])

    def assert_pristine():
        assert KSM.read_text() == "0\\n"
        assert TAINTED.read_text() == "0\\n"
        assert poisoned() == 0
        assert not Path("/tmp/left").exists()
        assert "sleep" not in {path.read_text().strip() for path in Path("/proc").glob("[0-9]*/comm")}

    def soil():
        if (child := os.fork()) == 0:  # poison costs the process its life
            page = mmap.mmap(-1, mmap.PAGESIZE)
            page[0] = 1
            page.madvise(MADV_HWPOISON)
            os._exit(0)
        os.waitpid(child, 0)
        assert poisoned() > 0
        KSM.write_text("2")
        TAINTED.write_text("64")  # taint bit 6, for user space to set: no damage, so no verdict
        assert TAINTED.read_text() == "64\\n"
        Path("/tmp/left").touch()
        subprocess.Popen(["/bin/busybox", "sleep", "1000"])

    @pytest.mark.parametrize("turn", range(3))
    def test_soils_its_guest(turn, record_property):
        record_property("urandom", os.urandom(16).hex())
        record_property("random", random.random())
        record_property("uuid", str(uuid.uuid4()))
        record_property("time", time.time())
        record_property("monotonic", time.monotonic())
        assert_pristine()
        soil()

    def test_fails():
        assert_pristine()
        soil()
        assert False

    def test_skips():
        assert_pristine()
        soil()
        pytest.skip("on purpose")

    @pytest.mark.shared_guest
    def test_shares_one():
        assert_pristine()
        Path("/tmp/shared").touch()

    @pytest.mark.shared_guest
    def test_shares_two():
        assert_pristine()
        assert Path("/tmp/shared").exists(), "test_shares_one ran in another guest"

    def test_shares_nothing():
        assert not Path("/tmp/shared").exists()
"""

EXPECTED = {
    "test_soils_its_guest": "PASS",
    "test_fails": "FAIL",
    "test_skips": "SKIP",
    "test_shares_one": "PASS",
    "test_shares_two": "PASS",
    "test_shares_nothing": "PASS",
}


@pytest.fixture(scope="module")
def forwards(lab: Lab) -> Outcome:
    lab.write("test_dirty.py", DIRTY)
    return lab.run()


def test_nothing_a_test_leaves_is_there_for_the_next(forwards: Outcome) -> None:
    assert forwards.verdicts == EXPECTED
    assert "assert False" in forwards["test_fails"].message, "it failed where it was meant to, behind all the looking"


def test_the_order_of_tests_does_not_matter(lab: Lab, forwards: Outcome) -> None:
    lab.write("test_dirty.py", DIRTY)
    backwards = lab.run("-k", "not shares_", env={"LAB_ORDER": "backwards"})
    independent = [case.name for case in forwards.cases if "shares_" not in case.name]
    assert [case.name for case in backwards.cases] == independent[::-1]
    assert backwards.verdicts == {name: forwards.verdicts[name] for name in independent}


def test_clones_are_different_in_randomness_and_alike_in_time(forwards: Outcome) -> None:
    clones = [case.properties for case in forwards.cases if case.name == "test_soils_its_guest"]
    assert len(clones) == 3
    for source in ("urandom", "random", "uuid"):
        assert len({clone[source] for clone in clones}) == 3, source
    monotonic = [float(clone["monotonic"]) for clone in clones]
    assert max(monotonic) - min(monotonic) < 60, "all went on from the same moment of the same boot"


def test_a_clones_wall_clock_is_the_hosts(lab: Lab) -> None:
    source = """
        import time
        def test_time(record_property):
            record_property("time", time.time())
    """
    lab.write("test_time.py", source)
    before = time.time()
    outcome = lab.run()
    told = float(outcome["test_time"].properties["time"])
    assert before - 2 <= told <= time.time() + 2


def test_cold_boots_give_the_same_verdicts(lab: Lab, forwards: Outcome) -> None:
    lab.write("test_dirty.py", DIRTY)
    cold = lab.run("--cold", "-k", "fails or skips")
    assert cold.verdicts == {name: forwards.verdicts[name] for name in ("test_fails", "test_skips")}
    assert {case.properties["guest"] for case in cold.cases} == {"cold boot"}
    assert {case.properties["guest"] for case in forwards.cases} == {"clone"}


@pytest.mark.parametrize(("isolate", "found"), [("kernel", ["0", "1", "2", "3"]), ("module", ["0", "1", "0", "1"])])
def test_isolation_may_be_relaxed(lab: Lab, isolate: str, found: list[str]) -> None:
    source = """
        from pathlib import Path
        import pytest

        @pytest.mark.parametrize("turn", range(2))
        def test_counts(turn, record_property):
            count = len(list(Path("/tmp").glob("turn*")))
            record_property("found", count)
            Path(f"/tmp/turn{count}").touch()
    """
    lab.write("test_b.py", source)
    shutil.copy(lab.root / "checks" / "test_b.py", lab.root / "checks" / "test_c.py")
    outcome = lab.run(f"--isolate={isolate}")
    assert [case.properties.get("found") for case in outcome.cases] == found, outcome.output
