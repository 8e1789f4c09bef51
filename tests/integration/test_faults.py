# SPDX-License-Identifier: GPL-2.0
"""Each kind of failure gives one clear message, in time, with pytest's documented exit status."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from harness.arch import ARCHITECTURES
from tests import kernel_files
from tests.lab import KERNEL, Lab, Outcome, wait_until

#: pytest's documented exit statuses
TESTS_FAILED, INTERRUPTED, USAGE_ERROR = 1, 2, 4

#: Each test breaks its guest in a way of its own. That it runs at all shows that the one before cost it nothing.
ILL = """
    import os
    import time
    from pathlib import Path

    import pytest

    from harness.agent import protocol

    @pytest.fixture(autouse=True)
    def in_a_fresh_guest():
        Path("/tmp/used").touch(exist_ok=False)

    def log(*lines):
        for line in lines:
            with open("/dev/kmsg", "w") as kmsg:
                kmsg.write(f"<4>{line}\\n")

    @pytest.fixture
    def recorded(record_property):
        record_property("recorded", "before the panic")

    def test_panics(recorded):
        Path("/proc/sysrq-trigger").write_text("c")

    def test_warns():
        log("------------[ cut here ]------------", "WARNING: CPU: 0 PID: 1 at mm/made_up.c:7 made_up+0x1/0x2")
        log("Modules linked in:", "---[ end trace 0000000000000000 ]---")

    @pytest.mark.xfail(reason="a test may expect to fail, but not to break the kernel")
    def test_warns_and_fails_as_expected():
        log("BUG: Bad page state in process python3  pfn:12345")
        assert False

    def test_fails_and_warns():
        log("BUG: Bad page state in process python3  pfn:12345")
        assert "the test's own words" == ""

    def test_taints():
        Path("/proc/sys/kernel/tainted").write_text("512")

    @pytest.mark.guest_timeout(0.5)
    def test_never_returns():
        while True:
            time.sleep(1)

    def test_hangs():
        # Nothing but this task may run: real time without a limit, and without the server that fair tasks have.
        Path("/proc/sys/kernel/sched_rt_runtime_us").write_text("-1")
        for server in Path("/sys/kernel/debug/sched/fair_server").glob("*/runtime"):
            server.write_text("0")
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(99))
        while True:
            pass

    def test_kills_the_agent():
        os.kill(os.getpid(), 9)

    def test_resets_the_machine():
        Path("/proc/sysrq-trigger").write_text("b")

    @pytest.mark.guest_timeout(30)
    def test_floods_the_console():
        with open("/dev/ttyS0", "wb", buffering=0) as console:
            while True:
                console.write(b"\\x1b[2J" + b"x" * 4000 + b"\\n")

    def test_says_evil_things(record_property):
        record_property("\\x1b[2Jkey", "\\x1b]0;owned\\x07")
        print("\\x1b[31mprinted\\x00\\x9b2J")
        raise AssertionError("\\x1b[2J\\u202eraised")

    @pytest.fixture
    def wire():
        ports = [fd for fd in os.listdir("/proc/self/fd") if "/dev/vport" in os.path.realpath(f"/proc/self/fd/{fd}")]
        return int(min(ports, key=int))

    def test_talks_nonsense(wire):
        os.write(wire, b"\\x1b[2J login: ")

    def test_talks_out_of_turn(wire):
        os.write(wire, protocol.encode(protocol.Collected([], [])))

    def test_claims_to_be_over(wire):
        os.write(wire, protocol.encode(protocol.Finished("", 0)))

    def test_claims_success(wire):
        report = {"outcome": "passed", "when": "call", "longrepr": None, "sections": [], "user_properties": []}
        report |= {"duration": 0, "start": 0, "stop": 0}
        for message in (protocol.Report(report), protocol.Finished("", 0)):
            os.write(wire, protocol.encode(message))

    def test_reports_without_end(wire):
        os.set_blocking(wire, True)
        for _ in range(1100):
            os.write(wire, protocol.encode(protocol.Report({})))
        time.sleep(60)

    def test_is_well():
        assert Path("/proc/sys/kernel/tainted").read_text() == "0\\n"
"""

#: The tests in which the agent, not the kernel, misbehaves.
HOSTILE = (
    "test_talks_nonsense",
    "test_talks_out_of_turn",
    "test_claims_to_be_over",
    "test_claims_success",
    "test_reports_without_end",
)


@pytest.fixture(scope="module")
def ill(lab: Lab) -> Outcome:
    """One run of all the ill-behaved tests."""
    lab.write("test_ill.py", ILL)
    return lab.run("-p", "no:cacheprovider")


def test_a_run_with_ill_tests_goes_on_to_its_end(ill: Outcome) -> None:
    assert ill.status == TESTS_FAILED
    assert len(ill.cases) == ILL.count("def test_")
    wanted = {case.name: "MISS" if case.name in HOSTILE else "FAIL" for case in ill.cases} | {"test_is_well": "PASS"}
    assert ill.verdicts == wanted


@pytest.mark.parametrize(
    ("test", "line"),
    [
        ("test_panics", "guest lost (panic): the kernel panicked"),
        ("test_warns", "the kernel complained during this test: WARNING in made_up"),
        ("test_warns_and_fails_as_expected", "the kernel complained during this test: BUG: Bad page state"),
        ("test_fails_and_warns", "the kernel complained during this test: BUG: Bad page state"),
        ("test_taints", "the kernel tainted itself during this test, without a word on the console: W=warn"),
        ("test_never_returns", "guest lost (test timeout): the test did not end in time"),
        ("test_hangs", "guest lost (hang): no heartbeat for"),
        ("test_kills_the_agent", "guest lost (agent died)"),
        ("test_resets_the_machine", "guest lost (reset): the machine ended by itself"),
        ("test_floods_the_console", "guest lost (console flood): the console grew beyond 2 MiB"),
        ("test_talks_nonsense", "infrastructure: the agent sent something that is not a message: expected a frame"),
        ("test_talks_out_of_turn", "infrastructure: the agent sent an unexpected message 'collected'"),
        ("test_claims_to_be_over", "infrastructure: the agent reported setup of a test, where setup, call, teardown"),
        (
            "test_claims_success",
            "infrastructure: the agent reported setup, call of a test, where setup, call, tear",
        ),
        ("test_reports_without_end", "infrastructure: the agent sent more than 1023 reports of one test"),
    ],
)
def test_the_first_line_says_what_happened(ill: Outcome, test: str, line: str) -> None:
    assert line in ill[test].text.partition("\n")[0]


def test_evidence_holds_console_machine_and_the_command_to_run_it_again(ill: Outcome) -> None:
    shown = ill.output.partition("test_panics[")[2].partition("test_warns[")[0]
    assert "Kernel panic - not syncing: sysrq triggered crash" in shown
    assert "sysrq_handle_crash" in shown
    assert "command: /" in shown
    assert "qemu-system-" in shown
    assert re.search(r"^QEMU:    \d+\.\d+\.\d+", shown, re.MULTILINE), shown
    again = f"pytest --kernel={KERNEL} --arch={ill['test_panics'].properties['arch']} 'checks/test_ill.py::test_panics["
    assert again in shown


def test_a_test_that_never_returns_leaves_its_python_traceback(ill: Outcome) -> None:
    shown = ill.output.partition("___ test_never_returns[")[2].partition("___ test_hangs[")[0]
    assert "in test_never_returns" in shown


def test_what_a_test_recorded_survives_its_guest(ill: Outcome) -> None:
    assert ill["test_panics"].properties["recorded"] == "before the panic"


def test_a_test_that_fails_besides_keeps_its_own_words(ill: Outcome) -> None:
    assert "The test itself failed as well" in ill["test_fails_and_warns"].text
    assert "the test's own words" in ill["test_fails_and_warns"].text


def test_text_from_a_guest_reaches_no_terminal_and_no_xml_unescaped(ill: Outcome, lab: Lab) -> None:
    assert not set("\x1b\x07\x00\x9b\u202e") & set(ill.output)
    assert not set("\x1b\x07\x00\x9b\u202e") & set((lab.root / "junit.xml").read_text())
    assert r"\x1b[2J\u202eraised" in ill["test_says_evil_things"].text
    assert r"\x1b[31mprinted\x00\x9b2J" in ill.output
    assert ill["test_says_evil_things"].properties[r"\x1b[2Jkey"] == r"\x1b]0;owned\x07"


def test_every_report_says_which_kernel_and_what_kind_of_guest(ill: Outcome) -> None:
    for case in ill.cases:
        assert case.properties["kernel"].startswith("6.12."), case
        assert case.properties["arch"] in ("x86_64", "arm64")
        assert case.properties["accelerator"] in ("kvm", "tcg")
        assert case.properties["guest"] == "clone"


def test_a_run_leaves_nothing_behind(ill: Outcome, lab: Lab) -> None:
    assert ill.cases
    assert lab.machines() == {}
    assert lab.left_over() == []


SLEEPER = """
    import time

    def test_sleeps():
        time.sleep(300)

    def test_is_well():
        pass
"""


def test_a_killed_qemu_is_no_verdict_about_the_kernel_and_the_rest_runs(lab: Lab) -> None:
    lab.write("test_sleeper.py", SLEEPER)
    run = lab.start()
    wait_until(lambda: lab.running() and len(lab.machines()) == 2, "a test to run and the next guest to be ready")
    for pid in lab.machines():  # the guest in use, and the one that was started ahead of its turn
        os.kill(pid, signal.SIGKILL)
    outcome = lab.finish(run)
    assert outcome.status == TESTS_FAILED
    assert outcome.verdicts == {"test_sleeps": "MISS", "test_is_well": "PASS"}
    assert outcome["test_sleeps"].outcome == "error"
    assert "infrastructure: QEMU ended with status -9" in outcome["test_sleeps"].message + outcome["test_sleeps"].text


def test_ctrl_c_ends_the_run_and_all_its_guests(lab: Lab) -> None:
    lab.write("test_sleeper.py", SLEEPER)
    run = lab.start()
    wait_until(lab.running, "the test to begin")
    run.send_signal(signal.SIGINT)
    outcome = lab.finish(run)
    assert outcome.status == INTERRUPTED, outcome.output
    assert "KeyboardInterrupt" in outcome.output
    assert lab.machines() == {}
    assert lab.left_over() == []


def test_a_killed_run_leaves_no_qemu_behind(lab: Lab) -> None:
    lab.write("test_sleeper.py", SLEEPER)
    run = lab.start()
    wait_until(lab.running, "the test to begin")
    run.kill()
    run.communicate()
    wait_until(lambda: not lab.machines(), "the kernel to end QEMU with its parent", seconds=10)
    for path in lab.tmp.iterdir():  # nobody was left to remove these; the next run does, see test_rundir
        shutil.rmtree(path)


TWO = """
    def test_one():
        pass

    def test_two():
        pass
"""


@pytest.fixture
def two(lab: Lab) -> Lab:
    lab.write("test_two.py", TWO)
    return lab


@pytest.mark.parametrize(
    ("kernel", "line"),
    [
        ("nonsense:", "unknown kernel 'nonsense:'"),
        ("no/such/file", "there is no file or directory no/such/file"),
        ("debian:99", "99"),
        ("noise", "noise"),
        ("cut", "cut"),
        ("arm64", "is a kernel for arm64, but --arch=x86_64 was asked for"),
    ],
)
def test_what_is_no_kernel_is_a_usage_error_of_one_line(two: Lab, kernel: str, line: str) -> None:
    (two.root / "noise").write_bytes(os.urandom(1 << 16))
    (two.root / "cut").write_bytes(kernel_files.bzimage()[:700])
    (two.root / "arm64").write_bytes(kernel_files.image())
    outcome = two.run("--arch=x86_64", kernel=kernel)
    assert outcome.status == USAGE_ERROR
    assert line in outcome.said("ERROR: ")
    assert "Traceback" not in outcome.output
    assert outcome.cases == []


def test_an_unknown_architecture_is_a_usage_error(two: Lab) -> None:
    outcome = two.run("--arch=vax")
    assert outcome.status == USAGE_ERROR
    known = ", ".join(map(str, ARCHITECTURES))
    assert f"unknown architecture 'vax': use one of {known}" in outcome.said("ERROR: ")


def test_an_image_that_only_starts_like_a_kernel_is_refused_in_qemus_own_words(two: Lab) -> None:
    image = two.root / "hollow"
    image.write_bytes(kernel_files.bzimage())
    outcome = two.run(kernel=str(image))
    assert outcome.status == TESTS_FAILED
    assert outcome["test_one"].verdict == "MISS"
    assert "infrastructure: QEMU did not start: qemu" in outcome["test_one"].text


@pytest.mark.parametrize(
    ("append", "evidence"),
    [
        ("rdinit=/nonexistent root=/dev/nothing", "Kernel panic - not syncing"),
        ("initcall_blacklist=virtio_pci_driver_init", "no virtio-serial port is called harness.agent"),
    ],
)
def test_a_kernel_that_never_reaches_its_agent_is_told_once_with_its_last_words(
    two: Lab, append: str, evidence: str
) -> None:
    outcome = two.run(f"--append={append}")
    assert outcome.status == TESTS_FAILED
    assert outcome.verdicts == {"test_one": "MISS", "test_two": "MISS"}
    assert outcome["test_one"].outcome == "error"
    assert "infrastructure: the guest never reached its agent: " in outcome["test_two"].message
    assert evidence in outcome["test_one"].text
    assert evidence not in outcome["test_two"].text
    assert outcome.output.count("ERROR at setup of") == 1
    assert "1 error, 1 not run in" in outcome.output
    assert two.machines() == {}
    assert two.left_over() == []


def test_a_host_without_qemu_is_told_what_to_install(two: Lab, tmp_path: Path) -> None:
    for directory in os.environ["PATH"].split(os.pathsep):
        for program in Path(directory).glob("*"):
            link = tmp_path / program.name
            if not program.name.startswith("qemu-") and not link.is_symlink():
                link.symlink_to(program)
    outcome = two.run(env={"PATH": str(tmp_path)})
    assert outcome.status == TESTS_FAILED
    assert outcome.verdicts == {"test_one": "MISS", "test_two": "MISS"}
    assert "is not installed: install it with: apt-get install qemu-system-" in outcome["test_one"].text


def test_no_network_and_nothing_cached_says_so(two: Lab, tmp_path: Path) -> None:
    nowhere = "http://127.0.0.1:9/debian"  # the discard port: nobody listens
    outcome = two.run(f"--debian-mirror={nowhere}", env={"XDG_CACHE_HOME": str(tmp_path)})
    assert outcome.status == TESTS_FAILED
    assert outcome.verdicts == {"test_one": "MISS", "test_two": "MISS"}
    assert "infrastructure: " in outcome["test_one"].text
    assert nowhere in outcome["test_one"].text


def private_mounts() -> list[str]:
    """The command that gives what it runs mounts of its own."""
    command = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--user", "--map-root-user"])]
    if subprocess.run([*command, "true"], check=False, capture_output=True).returncode != 0:
        pytest.skip("needs unshare --mount, which this host does not permit")
    return command


def test_a_full_disk_says_where_and_what_to_do(two: Lab, tmp_path: Path) -> None:
    mount = f'mount -t tmpfs -o size=256k none {tmp_path} && exec "$0" "$@"'
    outcome = two.run(env={"XDG_CACHE_HOME": str(tmp_path)}, wrapper=[*private_mounts(), "sh", "-c", mount])
    assert outcome.status == TESTS_FAILED
    assert "is on a full file system: make room there, or set XDG_CACHE_HOME" in outcome["test_one"].text
    assert list(tmp_path.iterdir()) == []


def test_a_full_template_store_costs_speed_and_one_line(two: Lab) -> None:
    # A smaller one would not be used at all: guests would be kept on disk.
    mount = 'mount -t tmpfs -o size=1100m none /dev/shm && fallocate -l 1040m /dev/shm/somebodys && exec "$0" "$@"'
    outcome = two.run("-k", "test_one", wrapper=[*private_mounts(), "sh", "-c", mount])
    assert outcome.status == 0
    assert outcome["test_one"].properties["guest"] == "cold boot"
    assert "harness: cannot clone guests, booting each one instead: /dev/shm/" in outcome.said("cannot clone")
    assert "has no room for 640 MiB of guest memory" in outcome.said("cannot clone")


def test_a_template_store_that_fills_up_meanwhile_costs_no_more(two: Lab) -> None:
    """Somebody takes the room after it was counted: QEMU dies of it, by SIGBUS, in the middle of the boot."""
    mount = (
        "mount -t tmpfs -o size=1100m none /dev/shm && fallocate -l 420m /dev/shm/somebodys && "
        "{ until ls /dev/shm/*/*.new/ram0; do sleep 0.05; done; fallocate -l 650m /dev/shm/more; } "
        '>/dev/null 2>&1 & exec "$0" "$@"'
    )
    outcome = two.run("-k", "test_one", wrapper=[*private_mounts(), "sh", "-c", mount])
    assert outcome.status == 0
    assert outcome["test_one"].properties["guest"] == "cold boot"
    assert "filled up while guest memory was written there" in outcome.said("cannot clone")


def test_without_a_kernel_guest_tests_do_not_touch_the_host(two: Lab) -> None:
    outcome = two.run(kernel="")
    assert outcome.status == 0
    assert {case.outcome for case in outcome.cases} == {"skipped"}
    assert "give --kernel" in outcome["test_one"].message


def test_a_guest_that_cannot_collect_a_test_says_why(lab: Lab) -> None:
    source = """
        import os
        assert not os.path.exists("/harness"), "only on the host"
        def test_x():
            pass
    """
    path = lab.write("test_split.py", source)
    outcome = lab.run(path)
    assert outcome.status == TESTS_FAILED
    assert outcome["test_x"].verdict == "MISS"
    assert "was collected on the host but not in the guest" in outcome["test_x"].message
    assert "only on the host" in outcome["test_x"].text
