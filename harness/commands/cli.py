# SPDX-License-Identifier: GPL-2.0
"""The ``harness`` command.

Exit status: 0 all is well, 1 it is not, 2 the command line makes no sense. ``harness shell`` passes on the status of
the command it ran, ``harness test`` that of pytest. ``harness bisect``, ``harness bisect-step``, ``harness explore``,
``harness matrix`` and ``harness mutants`` say in their help what theirs mean.
"""

from __future__ import annotations

import argparse
import atexit
import os
import signal
import sys
from collections.abc import Sequence

from harness import options
from harness.errors import HarnessError, UsageError
from harness.host.terminal import ProgressLine


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    :param argv: arguments without the program's name; None takes the process's own.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["test"]:  # all that follows is pytest's: argparse would stop at the first option
        from harness.commands import test

        return test.run(words[1:])
    try:
        chosen = _parser().parse_args(words)
    except SystemExit as left:
        raise SystemExit(_wrong_request(words) if left.code == 2 else left.code) from None
    if argv is None:
        # Whoever limits the time of a command ends it so: it shall say what it has until then, as after Ctrl-C.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        status = _COMMANDS[chosen.command_name](chosen)
        sys.stdout.flush()
        return status
    except UsageError as error:
        print(f"harness: {error}", file=sys.stderr)
        return 2
    except HarnessError as error:
        print(f"harness: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # Whoever read the output has seen enough. Python would complain once more when it flushes it at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130


def _wrong_request(words: Sequence[str]) -> int:
    """The exit status for a wrong command line. argparse's 2 would say that a matrix was interrupted."""
    if words[:1] == ["matrix"]:
        from harness.commands import matrix

        return matrix.WRONG_REQUEST
    if words[:1] == ["bisect-step"]:  # and here that a commit is bad
        from harness.report import state  # takes pytest along, which --help does without

        return state.WRONG_REQUEST
    return 2


def _parser() -> argparse.ArgumentParser:
    from harness import __version__
    from harness.commands import audit, bisect, cache, explore, kernels, matrix, mutants, report, userland

    parser = argparse.ArgumentParser(
        prog="harness",
        description="Linux kernels in virtual machines. Tests are run by: harness test --kernel=SPEC, "
        "or pytest --kernel=SPEC",
    )
    commands = parser.add_subparsers(dest="command_name", metavar="COMMAND", required=True)
    checks = commands.add_parser("doctor", help="say what works on this host, what is missing, and how to get it")
    checks.add_argument("--json", action="store_true", help="print it as JSON")
    commands.add_parser("test", help="run pytest with all that follows; with --kernel=SPEC it runs guest tests")
    audit.add_to(commands)
    bisect.add_to(commands)
    cache.add_to(commands)
    explore.add_to(commands)
    kernels.add_to(commands)
    matrix.add_to(commands)
    mutants.add_to(commands)
    report.add_to(commands)
    userland.add_to(commands)
    shell = commands.add_parser(
        "shell",
        help="open a shell, or run a command, in the very environment the tests run in",
        description="Opens a shell in a fresh guest with the tests unpacked, or runs COMMAND there.",
        epilog="One word of COMMAND is a line for the guest's shell; several arrive as they are.",
    )
    options.KERNEL.declare(shell.add_argument, action="store", required=True)
    options.ARCH.declare(shell.add_argument, action="store", default=None)
    for option in options.MACHINE:
        option.declare(shell.add_argument)
    shell.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND", help="to run instead of a shell")
    for each in (parser, *commands.choices.values()):
        each.add_argument("--version", action="version", version=f"mremap-harness {__version__}")
    return parser


def _doctor(chosen: argparse.Namespace) -> int:
    from harness.commands import doctor

    return doctor.main(as_json=chosen.json)


def _shell(chosen: argparse.Namespace) -> int:
    from harness import arch
    from harness.build import posted
    from harness.commands import shell
    from harness.kernels import grammar, kernel

    (text,) = posted.named([chosen.kernel])
    spec = grammar.parse(text, arch.find(chosen.arch) if chosen.arch else None)
    if isinstance(spec, kernel.SshSpec):
        raise UsageError(f"{spec} is no virtual machine: log in with: ssh -p {spec.port} {spec.user}@{spec.host}")
    command = chosen.command[1:] if chosen.command[:1] == ["--"] else chosen.command
    # Without a terminal, stderr belongs to the command that runs in the guest.
    progress = ProgressLine.on(sys.stderr, only_terminal=True)
    return shell.shell(spec, options.MachineOptions.of(vars(chosen)), command, progress)


def _audit(chosen: argparse.Namespace) -> int:
    from harness.commands import audit

    return audit.run(chosen, _progress())


def _bisect(chosen: argparse.Namespace) -> int:
    from harness.commands import bisect

    return bisect.run(chosen, _progress())


def _bisect_step(chosen: argparse.Namespace) -> int:
    from harness.commands import bisect

    return bisect.run_step(chosen, _progress())


def _cache(chosen: argparse.Namespace) -> int:
    from harness.commands import cache

    return cache.run(chosen)


def _kernels(chosen: argparse.Namespace) -> int:
    from harness.commands import kernels

    return kernels.run(chosen, _progress())


def _explore(chosen: argparse.Namespace) -> int:
    from harness.commands import explore

    # Its progress is for somebody who watches: what it finds goes to stdout.
    progress = ProgressLine.on(sys.stderr, only_terminal=True)
    atexit.register(progress.clear)
    return explore.run(chosen, progress)


def _matrix(chosen: argparse.Namespace) -> int:
    from harness.commands import matrix

    return matrix.run(chosen, _progress())


def _mutants(chosen: argparse.Namespace) -> int:
    from harness.commands import mutants

    return mutants.run(chosen, _progress())


def _report(chosen: argparse.Namespace) -> int:
    from harness.commands import report

    return report.run(chosen)


def _userland(chosen: argparse.Namespace) -> int:
    from harness.commands import userland

    return userland.run(chosen, _progress())


def _progress() -> ProgressLine:
    line = ProgressLine.on(sys.stderr)
    atexit.register(line.clear)
    return line


_COMMANDS = {
    "audit": _audit,
    "bisect": _bisect,
    "bisect-step": _bisect_step,
    "cache": _cache,
    "doctor": _doctor,
    "explore": _explore,
    "kernels": _kernels,
    "matrix": _matrix,
    "mutants": _mutants,
    "report": _report,
    "shell": _shell,
    "userland": _userland,
}


if __name__ == "__main__":
    sys.exit(main())
