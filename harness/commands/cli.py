# SPDX-License-Identifier: GPL-2.0
"""The ``harness`` command: what is not a test run. Tests are run by ``pytest --kernel=…``.

Exit status: 0 all is well, 1 it is not, 2 the command line makes no sense; ``harness shell`` passes on that of the
command it ran.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from harness.errors import HarnessError, UsageError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    :param argv: arguments without the program's name; None takes the process's own.
    """
    parser = _parser()
    options = parser.parse_args(argv)
    try:
        return _COMMANDS[options.command_name](options)
    except UsageError as error:
        print(f"harness: {error}", file=sys.stderr)
        return 2
    except HarnessError as error:
        print(f"harness: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    from harness.commands import audit

    parser = argparse.ArgumentParser(
        prog="harness", description="Linux kernels in virtual machines. Tests are run by: pytest --kernel=SPEC"
    )
    commands = parser.add_subparsers(dest="command_name", metavar="COMMAND", required=True)
    commands.add_parser("doctor", help="say what works on this host, what is missing, and how to get it")
    audit.add_to(commands)
    shell = commands.add_parser(
        "shell",
        help="open a shell, or run a command, in the very environment the tests run in",
        description="Opens a shell in a fresh guest with the tests unpacked, or runs COMMAND there.",
        epilog="One word of COMMAND is a line for the guest's shell; several arrive as they are.",
    )
    shell.add_argument("--kernel", required=True, metavar="SPEC", help="debian:VERSION, a build tree, an image, a .deb")
    shell.add_argument("--arch", metavar="ARCH", help="x86_64 or arm64, where the kernel leaves it open")
    shell.add_argument("--append", default="", metavar="PARAMS", help="more for the kernel's command line")
    shell.add_argument("--guest-memory", type=int, default=640, metavar="MIB", help="default: 640")
    shell.add_argument("--guest-cpus", type=int, default=1, metavar="N", help="default: 1")
    shell.add_argument("--debian-mirror", default="", metavar="URI", help="default: the one the host's apt uses")
    shell.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND", help="to run instead of a shell")
    return parser


def _doctor(_options: argparse.Namespace) -> int:
    from harness.commands import doctor

    return doctor.main()


def _shell(options: argparse.Namespace) -> int:
    from harness import arch
    from harness.commands import shell
    from harness.kernels import grammar, kernel
    from harness.machine.provision import Options

    spec = grammar.parse(options.kernel, arch.find(options.arch) if options.arch else None)
    if isinstance(spec, kernel.SshSpec):
        raise UsageError(f"{spec} is no machine of ours: log in with: ssh -p {spec.port} {spec.user}@{spec.host}")
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    about = Options(options.append, options.guest_memory, options.guest_cpus, options.debian_mirror)
    return shell.shell(spec, about, command, _progress)


def _audit(options: argparse.Namespace) -> int:
    from harness.commands import audit

    return audit.run(options, _progress)


def _progress(message: str) -> None:
    """Tell a person, and nobody else, what takes so long."""
    if sys.stderr.isatty():
        print(f"harness: {message}", file=sys.stderr)


_COMMANDS = {"audit": _audit, "doctor": _doctor, "shell": _shell}


if __name__ == "__main__":
    sys.exit(main())
