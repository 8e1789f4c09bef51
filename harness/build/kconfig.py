# SPDX-License-Identifier: GPL-2.0
"""Kernel configurations: merges fragments, and explains options that could not be set.

``make olddefconfig`` silently drops values that an option cannot have. So each value of the fragments is looked up in
the resulting ``.config``. If it differs, the Kconfig files are read to find the condition that is not met.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from harness.errors import ConfigError, UsageError


@dataclass(frozen=True)
class Setting:
    """One line of a fragment: an option and its value."""

    #: without ``CONFIG_``
    symbol: str
    #: in the form of a ``.config``: ``y``, ``m``, ``n``, a number, or a string in quotes
    value: str
    #: the name of the fragment
    origin: str

    def __str__(self) -> str:
        return f"CONFIG_{self.symbol}={self.value}"


def parse_fragment(text: str, origin: str) -> list[Setting]:
    """The settings of a fragment in order. A comment may follow a value.

    :param origin: the name of the fragment for messages.
    :raises UsageError: for a line that is neither a setting nor a comment.
    """
    settings = []
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if found := re.fullmatch(r'CONFIG_(\w+)=("(?:[^"\\]|\\.)*"|[^\s#"]+)(?:\s+#.*)?', line):
            settings.append(Setting(found[1], found[2], origin))
        elif found := re.fullmatch(r"# CONFIG_(\w+) is not set", line):
            settings.append(Setting(found[1], "n", origin))
        elif line and not line.startswith("#"):
            raise UsageError(f"{origin} line {number} is neither CONFIG_…=… nor a comment: {line!r}")
    return settings


@dataclass(frozen=True)
class MergedFragments:
    """The settings of several fragments. The last value of each symbol is used."""

    settings: Mapping[str, Setting]
    #: settings that a later one replaced, each with the later one, in order
    redefined: tuple[tuple[Setting, Setting], ...]

    @property
    def text(self) -> str:
        """The settings as a file for ``KCONFIG_ALLCONFIG``, sorted, so that equal settings give equal text."""
        return "".join(f"{setting}\n" for _, setting in sorted(self.settings.items()))


def merge(settings: Iterable[Setting]) -> MergedFragments:
    """Merge settings as the kernel's ``scripts/kconfig/merge_config.sh`` does."""
    merged: dict[str, Setting] = {}
    redefined = []
    for setting in settings:
        before = merged.get(setting.symbol)
        if before and before.value != setting.value:
            redefined.append((before, setting))
        merged[setting.symbol] = setting
    return MergedFragments(merged, tuple(redefined))


def check(merged: MergedFragments, config: Mapping[str, str], source: Path, srcarch: str) -> None:
    """Check that the complete configuration has every setting of the fragments.

    :param config: values by symbol, without ``CONFIG_``; symbols that are not set are absent.
    :param source: the kernel source, whose Kconfig files are read to explain differences.
    :param srcarch: the name of the architecture's directory below ``arch/``.
    :raises ConfigError: names each symbol with another value, and the dependency that is not met.
    """
    lost = [each for each in merged.settings.values() if config.get(each.symbol, "n") != each.value]
    if not lost:
        return
    definitions = KconfigFiles.read(source, srcarch)
    reasons = [
        f"{each} from {each.origin} became {config.get(each.symbol, 'n')}: {definitions.explain(each, config)}"
        for each in lost
    ]
    count = f" (and {len(lost) - 1} more)" if len(lost) > 1 else ""
    raise ConfigError("\n".join([f"this source cannot have the configuration{count}: {reasons[0]}", *reasons[1:]]))


@dataclass
class KconfigEntry:
    """One ``config`` or ``menuconfig`` entry; a symbol may have several."""

    symbol: str
    #: conditions that must all be met: its own, and those of the menus and ``if`` blocks around it
    depends: list[str] = field(default_factory=list)
    #: the condition of its prompt, empty for none; None for a symbol without prompt, which only others can select
    prompt: str | None = None
    #: it belongs to a choice, in which only one option can be y
    in_choice: bool = False


@dataclass
class KconfigFiles:
    """The definitions in the Kconfig files of one architecture."""

    symbols: dict[str, list[KconfigEntry]] = field(default_factory=dict)
    #: for each symbol, the symbols that select it, each with its condition (empty for none)
    selected_by: dict[str, list[tuple[str, str]]] = field(default_factory=dict)

    @classmethod
    def read(cls, source: Path, srcarch: str) -> KconfigFiles:
        """Read ``Kconfig`` and all files that it includes.

        :param srcarch: the name of the architecture's directory below ``arch/``.
        """
        definitions = cls()
        _Reader(source, {"SRCARCH": srcarch}, definitions).read("Kconfig", [])
        return definitions

    def explain(self, setting: Setting, config: Mapping[str, str]) -> str:
        """Why a symbol has another value than a setting asks for, as the end of a sentence."""
        entries = self.symbols.get(setting.symbol, [])
        if not entries:
            return "this source has no such option"
        selectors = [
            f"{by} ({config[by]})"
            for by, condition in self.selected_by.get(setting.symbol, [])
            if config.get(by) in ("y", "m") and evaluate(condition, config)
        ]
        if setting.value in ("n", "m") and selectors:
            return f"it is selected by {', '.join(selectors)}"
        unmet = [_unmet(entry.depends, config) for entry in entries]
        if all(unmet):
            return "it depends on " + ", or ".join(unmet)
        prompts = [entry.prompt for entry in entries if entry.prompt is not None]
        if not prompts:
            users = ", ".join(by for by, _ in self.selected_by.get(setting.symbol, [])[:5])
            return "it cannot be set directly" + (f"; it is selected by {users}" if users else "")
        if not any(evaluate(prompt, config) for prompt in prompts):
            return "it can be set only with " + ", or ".join(_unmet([prompt], config) for prompt in prompts)
        if any(entry.in_choice for entry in entries):
            return "another option of the same choice was taken"
        return "its dependencies are met; the value may be out of range, or another option may force a default"


def _unmet(conditions: Sequence[str], config: Mapping[str, str]) -> str:
    """The conditions that are not met, each with the values of its symbols; empty if all are met."""
    parts = [part for condition in conditions for part in _conjuncts(condition)]
    return " && ".join(_with_values(part, config) for part in dict.fromkeys(parts) if not evaluate(part, config))


def _conjuncts(expression: str) -> list[str]:
    """The operands of the outermost ``&&``."""
    parts: list[list[str]] = [[]]
    depth = 0
    for token in _tokens(expression):
        depth += (token == "(") - (token == ")")
        if depth == 0 and token == "||":
            return [_joined(_tokens(expression))]
        if depth == 0 and token == "&&":
            parts.append([])
        else:
            parts[-1].append(token)
    return [_joined(part) for part in parts]


def _joined(tokens: Sequence[str]) -> str:
    return re.sub(r"(?<=[(!]) | (?=\))", "", " ".join(tokens))


def _with_values(part: str, config: Mapping[str, str]) -> str:
    symbols = [token for token in _tokens(part) if re.fullmatch(r"[A-Z0-9_]*[A-Z_][A-Z0-9_]*", token)]
    values = ", ".join(f"{symbol}={config.get(symbol, 'n')}" for symbol in dict.fromkeys(symbols))
    shown = f"({part})" if "||" in part and not part.startswith("(") else part
    return f"{shown} [{values}]" if values else shown


_TOKEN = re.compile(r'"[^"]*"|\'[^\']*\'|&&|\|\||!=|<=|>=|[()!=<>]|\$\([^)]*\)|[\w-]+')


def _tokens(expression: str) -> list[str]:
    return _TOKEN.findall(expression)


def evaluate(expression: str, config: Mapping[str, str]) -> int:
    """The value of a Kconfig expression: 0 for n, 1 for m, 2 for y (Documentation/kbuild/kconfig-language.rst).

    Expressions that are not understood, such as a preprocessor function, count as y, so that they are not reported.
    """
    tokens = _tokens(expression)
    return _Expression(tokens, config).disjunction() if tokens else 2


class _Expression:
    """A recursive descent parser that evaluates an expression."""

    def __init__(self, tokens: Sequence[str], config: Mapping[str, str]) -> None:
        self._tokens = [*tokens, ""]
        self._config = config

    def disjunction(self) -> int:
        value = self._conjunction()
        while self._take("||"):
            value = max(value, self._conjunction())
        return value

    def _conjunction(self) -> int:
        value = self._operand()
        while self._take("&&"):
            value = min(value, self._operand())
        return value

    def _operand(self) -> int:
        if self._take("!"):
            return 2 - self._operand()
        if self._take("("):
            value = self.disjunction()
            self._take(")")
            return value
        left = self._tokens.pop(0) if self._tokens[0] else ""
        operator = self._tokens[0]
        if operator in ("=", "!=", "<", ">", "<=", ">="):
            self._tokens.pop(0)
            return 2 if _compare(self._value(left), operator, self._value(self._tokens.pop(0))) else 0
        if left.startswith("$("):
            return 2
        return {"y": 2, "m": 1}.get(self._value(left), 0)

    def _value(self, token: str) -> str:
        if token[:1] in ("'", '"'):
            return token[1:-1]
        if token in ("y", "m", "n") or re.fullmatch(r"-?\d+|0x[0-9a-fA-F]+", token):
            return token
        return self._config.get(token, "n").strip('"')

    def _take(self, token: str) -> bool:
        if self._tokens[0] == token:
            self._tokens.pop(0)
            return True
        return False


def _compare(left: str, operator: str, right: str) -> bool:
    if operator in ("=", "!="):
        return (left == right) == (operator == "=")
    try:
        a, b = int(left, 0), int(right, 0)
    except ValueError:
        return False
    return {"<": a < b, ">": a > b, "<=": a <= b, ">=": a >= b}[operator]


class _Reader:
    """Reads the dependencies in Kconfig files; defaults, ranges and help texts are skipped."""

    def __init__(self, source: Path, variables: Mapping[str, str], definitions: KconfigFiles) -> None:
        self._source = source
        self._variables = variables
        self._into = definitions

    def read(self, name: str, around: Sequence[list[str]]) -> None:
        """Read one file.

        :param around: the conditions of each block around the line that includes the file.
        """
        try:
            text = (self._source / name).read_text(errors="replace")
        except OSError:
            return  # included by "osource", or a file of another architecture
        #: the keyword that opened each block, and its conditions
        blocks: list[tuple[str, list[str]]] = [("source", each) for each in around]
        entry: KconfigEntry | None = None
        for line in _lines(text):
            keyword, _, rest = line.strip().partition(" ")
            rest = rest.strip()
            match keyword:
                case "config" | "menuconfig":
                    entry = KconfigEntry(rest, in_choice=any(kind == "choice" for kind, _ in blocks))
                    entry.depends = [condition for _, conditions in blocks for condition in conditions]
                    self._into.symbols.setdefault(rest, []).append(entry)
                case "menu" | "choice" | "if":
                    blocks.append((keyword, [rest] if keyword == "if" else []))
                    entry = None
                case "endmenu" | "endchoice" | "endif":
                    blocks.pop()
                    entry = None
                case "comment":
                    entry = KconfigEntry("")  # takes the "depends on" of the comment
                case "source" | "osource" | "rsource" | "orsource":
                    path = re.sub(r"\$\((\w+)\)", lambda m: self._variables.get(m[1], ""), rest.strip('"'))
                    inside = str(Path(name).parent / path) if keyword.endswith("rsource") else path
                    self.read(inside, [conditions for _, conditions in blocks])
                    entry = None
                case "depends":
                    condition = rest.removeprefix("on").strip()
                    (entry.depends if entry else blocks[-1][1] if blocks else []).append(condition)
                case "visible":
                    pass
                case "select" if entry:
                    target, _, condition = rest.partition(" if ")
                    self._into.selected_by.setdefault(target.strip(), []).append((entry.symbol, condition.strip()))
                case "prompt" | "bool" | "tristate" | "string" | "int" | "hex" if entry and rest[:1] in ('"', "'"):
                    entry.prompt = rest[rest.rindex(rest[0]) + 1 :].strip().removeprefix("if").strip()


def _lines(text: str) -> Iterator[str]:
    """The lines of a Kconfig file with continuations joined, and without comments and help texts."""
    help_indent: int | None = None
    waiting = False
    for line in text.replace("\\\n", " ").expandtabs().splitlines():
        stripped = line.strip()
        indent = len(line) - len(line.lstrip())
        if not stripped:
            continue
        if waiting:
            help_indent, waiting = indent, False
        if help_indent is not None and indent >= help_indent > 0:
            continue
        help_indent = None
        if stripped in ("help", "---help---"):
            waiting = True
        elif not stripped.startswith("#"):
            yield re.sub(r'\s+#[^"]*$', "", stripped)
