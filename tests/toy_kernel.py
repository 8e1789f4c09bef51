# SPDX-License-Identifier: GPL-2.0
"""A kernel source of six files. Its Makefile does what the builder needs of the real one, in a tenth of a second."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.kernel_files import bzimage, fill

MAKEFILE = """\
OBJECTS := $(patsubst %.c,$(O)/%.o,$(wildcard mm/*.c))
allnoconfig:
	sed -n 's/^\\(CONFIG_.*\\)=n$$/# \\1 is not set/; /CONFIG_LOST=/d; p' $(O)/$(KCONFIG_ALLCONFIG) > $(O)/.config
olddefconfig:
	@echo configured >> $(O)/../../configured
bzImage: $(OBJECTS)
	mkdir -p $(O)/arch/x86/boot $(O)/include/config
	cat image $(OBJECTS) > $(O)/arch/x86/boot/bzImage
	echo 9.1.2-toy > $(O)/include/config/kernel.release
	echo > $(O)/System.map
	@echo linked by $(CC) >> $(O)/../../compiled
$(O)/%.o: %.c
	@mkdir -p $(@D)
	@echo "  CC      $*.o"; echo "$*" >> $(O)/../../compiled
	@! grep -q BROKEN $< || { echo "$<:1:1: error: BROKEN is no C"; exit 1; }
	cp $< $@
"""
FILES: dict[str, bytes | str] = {
    "Makefile": MAKEFILE,
    "Kconfig": 'config LOST\n\tbool "Lost"\n\tdepends on NEVER\n',
    "Kbuild": "",
    "image": bzimage(),
    "mm/mremap.c": "".join(f"line {number}\n" for number in range(1, 41)),
    "mm/ksm.c": "merge\n",
    ".gitignore": "*.o\n",
}
#: changes lines 3 and 33 of mm/mremap.c
PATCH = """\
Subject: [PATCH] move

---
diff --git a/mm/mremap.c b/mm/mremap.c
--- a/mm/mremap.c
+++ b/mm/mremap.c
@@ -2,3 +2,3 @@
 line 2
-line 3
+patched 3
 line 4
@@ -32,3 +32,3 @@
 line 32
-line 33
+patched 33
 line 34
"""
#: stand in for what a build runs, so that the tests need none of it
PROGRAMS = {
    "gcc": 'case "$1" in --version) echo "gcc (toy) ${TOY:-1}";; esac',
    "ld": "echo ld 1",
    **dict.fromkeys(("bison", "flex", "bc"), "exit 0"),
}


def lay_out(path: Path) -> Path:
    """The source in a directory."""
    fill({path / name: content for name, content in FILES.items()})
    return path


def git(path: Path, *args: str) -> str:
    identity = [f"{kind}_{what}=x@localhost" for kind in ("GIT_AUTHOR", "GIT_COMMITTER") for what in ("NAME", "EMAIL")]
    env = {**os.environ, **dict(each.split("=") for each in identity), "GIT_CONFIG_GLOBAL": "/dev/null"}
    return subprocess.run(["git", *args], cwd=path, env=env, check=True, capture_output=True, text=True).stdout.strip()


def repository(path: Path) -> Path:
    """The source in a repository, committed and tagged v1."""
    lay_out(path)
    git(path, "init", "--quiet")
    git(path, "add", ".")
    git(path, "commit", "--quiet", "-m", "toy")
    git(path, "tag", "v1")
    return path


def programs(directory: Path) -> Path:
    """A directory for PATH with :data:`PROGRAMS`."""
    for name, text in PROGRAMS.items():
        path = directory / name
        fill({path: f"#!/bin/sh\n{text}\n"})
        path.chmod(0o755)
    return directory
