# SPDX-License-Identifier: GPL-2.0
"""Fragments merge as the kernel's own script merges them, and a lost option is explained."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.build.kconfig import KconfigFiles, Setting, check, evaluate, merge, parse_fragment
from harness.errors import ConfigError, UsageError
from tests.kernel_files import fill

KCONFIG = """\
mainmenu "Toy"
source "mm/Kconfig"
source "arch/$(SRCARCH)/Kconfig"
osource "nowhere/Kconfig"
"""
MM = """\
menu "Memory"
	depends on MMU

config KSM
	bool "Same page merging"
	depends on SYSFS
	help
		select NOTHING: this is prose, and
		config NOT_AN_OPTION is, too.

config CHECK
	bool "Check pages"
	depends on DEBUG_VM && (ARCH_HAS_CHECK || !EXPERT) \\
		&& KSM
	select HELPER if KSM

config HELPER
	bool

config TUNED
	bool "Tuned" if EXPERT
	default y

if NUMA
config BALANCE
	bool "Balance"
endif
endmenu

choice
	prompt "Pages"
config PAGES_4K
	bool "4K"
config PAGES_64K
	bool "64K"
endchoice
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    fill(
        {
            tmp_path / "Kconfig": KCONFIG,
            tmp_path / "mm/Kconfig": MM,
            tmp_path / "arch/x86/Kconfig": "config MMU\n\tdef_bool y\n",
        }
    )
    return tmp_path


def why(tree: Path, asked: str, **config: str) -> str:
    symbol, value = asked.split("=")
    return KconfigFiles.read(tree, "x86").explain(Setting(symbol, value, "a.config"), {"MMU": "y", **config})


# Fragments


def test_a_fragment_is_settings_with_comments() -> None:
    text = '# why\nCONFIG_A=y\nCONFIG_B=17   # how many\n# CONFIG_C is not set\nCONFIG_D="a # b"  # text\n\n'
    assert [str(each) for each in parse_fragment(text, "x")] == [
        "CONFIG_A=y",
        "CONFIG_B=17",
        "CONFIG_C=n",
        'CONFIG_D="a # b"',
    ]


def test_a_line_that_is_no_setting_is_refused_with_its_number() -> None:
    with pytest.raises(UsageError, match=r"^base line 2 is neither CONFIG_…=… nor a comment: 'KSM=y'$"):
        parse_fragment("CONFIG_A=y\nKSM=y\n", "base")


def test_the_last_value_wins_and_a_change_of_mind_is_reported() -> None:
    merged = merge(
        [*parse_fragment("CONFIG_A=y\nCONFIG_B=n\n", "one"), *parse_fragment("CONFIG_B=y\nCONFIG_A=y\n", "two")]
    )
    assert merged.text == "CONFIG_A=y\nCONFIG_B=y\n"
    assert [(str(a), a.origin, str(b), b.origin) for a, b in merged.redefined] == [
        ("CONFIG_B=n", "one", "CONFIG_B=y", "two")
    ]


def test_the_order_of_fragments_that_agree_makes_no_difference() -> None:
    one, two = parse_fragment("CONFIG_A=y\n", "one"), parse_fragment("CONFIG_B=y\n", "two")
    assert merge([*one, *two]).text == merge([*two, *one]).text


# What did not stick


def test_what_stuck_is_not_complained_about(tree: Path) -> None:
    check(merge(parse_fragment("CONFIG_KSM=y\nCONFIG_NUMA=n\n", "x")), {"KSM": "y"}, tree, "x86")


def test_a_lost_option_names_the_dependency_that_is_not_met(tree: Path) -> None:
    wanted = merge(parse_fragment("CONFIG_KSM=y\n", "base.config"))
    with pytest.raises(ConfigError) as caught:
        check(wanted, {"MMU": "y"}, tree, "x86")
    assert str(caught.value) == (
        "this source cannot have the configuration: "
        "CONFIG_KSM=y from base.config became n: it depends on SYSFS [SYSFS=n]"
    )


def test_every_lost_option_is_listed(tree: Path) -> None:
    wanted = merge(parse_fragment("CONFIG_KSM=y\nCONFIG_NOPE=y\n", "x"))
    with pytest.raises(ConfigError) as caught:
        check(wanted, {"MMU": "y"}, tree, "x86")
    first, second = str(caught.value).splitlines()
    assert first.startswith("this source cannot have the configuration (and 1 more): CONFIG_KSM=y")
    assert second == "CONFIG_NOPE=y from x became n: this source has no such option"


@pytest.mark.parametrize(
    ("asked", "config", "says"),
    [
        ("KSM=y", {"MMU": "n", "SYSFS": "y"}, "it depends on MMU [MMU=n]"),
        ("CHECK=y", {"KSM": "y", "DEBUG_VM": "y", "EXPERT": "y"},
         "it depends on (ARCH_HAS_CHECK || !EXPERT) [ARCH_HAS_CHECK=n, EXPERT=y]"),
        ("CHECK=y", {"EXPERT": "n"}, "it depends on DEBUG_VM [DEBUG_VM=n] && KSM [KSM=n]"),
        ("BALANCE=y", {}, "it depends on NUMA [NUMA=n]"),
        ("HELPER=n", {"CHECK": "y", "KSM": "y"}, "it is selected by CHECK (y)"),
        ("HELPER=y", {}, "it cannot be set directly; it is selected by CHECK"),
        ("TUNED=n", {}, "it can be set only with EXPERT [EXPERT=n]"),
        ("PAGES_64K=y", {}, "another option of the same choice was taken"),
        ("NOT_AN_OPTION=y", {}, "this source has no such option"),
        ("KSM=n", {"SYSFS": "y"},
         "its dependencies are met; the value may be out of range, or another option may force a default"),
    ],
)  # fmt: skip
def test_the_reason_is_found_in_the_kconfig_files(tree: Path, asked: str, config: dict[str, str], says: str) -> None:
    assert why(tree, asked, **config) == says


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("", 2), ("A", 2), ("M", 1), ("NO", 0), ("!M", 1), ("!A", 0), ("A && M", 1), ("NO || M", 1),
        ("(A || NO) && !NO", 2), ('TEXT = "x y"', 2), ("A != y", 0), ("NUMBER >= 10", 2), ("NUMBER < 10", 0),
        ("NO && A || A", 2), ("$(success,true) && A", 2),
    ],
)  # fmt: skip
def test_expressions_have_three_values(expression: str, value: int) -> None:
    assert evaluate(expression, {"A": "y", "M": "m", "TEXT": '"x y"', "NUMBER": "12"}) == value
