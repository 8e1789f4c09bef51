# SPDX-License-Identifier: GPL-2.0
# `make run` and `make test` do all of the set-up on a fresh Debian or Ubuntu machine, and are quick when it is done.

KERNEL ?= debian:
ARCH ?=
PYTHON ?= python3
BIN := .venv/bin

.PHONY: run test lint types unit slow guest pair costs bench setup host build-host bench-host clean

# Compilers are only needed for a kernel that is neither packaged, nor a machine, nor a file or tree that exists.
built = $(if $(filter debian:% ssh:%,$(KERNEL))$(wildcard $(KERNEL)),,build-host)

run: setup $(built) ## boot a kernel and print the answer; KERNEL=debian:7.3 ARCH=arm64 KERNEL=relocate-anon choose another
	$(BIN)/pytest --kernel='$(KERNEL)' $(if $(ARCH),--arch=$(ARCH)) --answer

test: lint types unit guest pair ## every gate

lint: setup ## style, formatting, and which room may import from which
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports --no-cache
	$(BIN)/python -m tests.rows --check

types: setup ## mypy, strict
	$(BIN)/mypy

unit: setup ## the harness's own tests; those below tests/integration boot real kernels
	$(BIN)/pytest tests -m 'not builds_kernel and not debuginfo'

slow: setup build-host ## tests that compile kernels or fetch hundreds of MB
	$(BIN)/pytest tests -m 'builds_kernel or debuginfo'

guest: setup ## the guest suite on Debian's stable kernel, on both architectures
	$(BIN)/pytest --kernel=debian:6.12 --arch=x86_64 --arch=arm64 -n 2 --expect-findings

costs: setup build-host ## what moves cost with and without relocation, in instructions
	$(BIN)/pytest --kernel=unpatched --kernel=relocate-anon --icount guest_tests/test_costs.py

pair: setup build-host ## the guest suite on the reference kernel and its unpatched twin, which are built here
	$(BIN)/pytest --kernel=unpatched --kernel=relocate-anon -n 2 --expect-findings

bench: setup bench-host .venv/bench $(built) ## speed, beside virtme-ng; KERNEL=debian:7.3 ARCH=x86_64 choose another kernel
	$(BIN)/python tests/benchmark.py --kernel='$(KERNEL)' $(if $(ARCH),--arch=$(ARCH)) --suite

setup: host .venv/ready

# What only the system can provide: each line is a test, and the package that makes it pass.
host:
	@missing=; $(need); \
	need qemu-system-x86_64 qemu-system-x86; need qemu-system-aarch64 qemu-system-arm; \
	need apt-get apt; need dpkg-deb dpkg; need setpriv util-linux; need $(PYTHON) python3; \
	$(PYTHON) -c 'import ensurepip' 2>/dev/null || missing="$$missing python3-venv"; \
	[ -e /usr/share/keyrings/debian-archive-keyring.gpg ] || missing="$$missing debian-archive-keyring"; \
	$(install)

build-host: ## what building kernels takes: KERNEL=relocate-anon and the like
	@missing=; $(need); \
	need make make; need gcc gcc; need ld binutils; need bison bison; need flex flex; need bc bc; need git git; \
	need ccache ccache; \
	$(if $(filter arm64 aarch64,$(ARCH)),[ "$$(uname -m)" = aarch64 ] || need aarch64-linux-gnu-gcc gcc-aarch64-linux-gnu;) \
	$(if $(filter x86%,$(ARCH)),[ "$$(uname -m)" = x86_64 ] || need x86_64-linux-gnu-gcc gcc-x86-64-linux-gnu;) \
	header() { echo "#include <$$1>" | gcc -E - >/dev/null 2>&1 || missing="$$missing $$2"; }; \
	header gelf.h libelf-dev; header openssl/ssl.h libssl-dev; \
	$(install)

bench-host: ## what virtme-ng takes: kmod, which is not on every user's PATH, and file
	@PATH="$$PATH:/usr/sbin:/sbin"; missing=; $(need); \
	need depmod kmod; need file file; \
	$(install)

need = need() { command -v "$$1" >/dev/null || missing="$$missing $$2"; }

define install
[ -z "$$missing" ] && exit 0; \
as=; [ "$$(id -u)" = 0 ] || as="sudo -n"; \
if [ -n "$$as" ] && ! $$as true 2>/dev/null; then \
    echo "Missing packages, and no right to install them. Run: apt-get install$$missing" >&2; exit 1; \
fi; \
echo "installing$$missing"; \
$$as apt-get update -qq && \
$$as env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $$missing >/dev/null
endef

.venv/ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "Python 3.11 or later is needed: set PYTHON=python3.12, or so" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

.venv/bench: .venv/ready
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[bench]'
	@touch $@

clean: ## remove what set-up made here; caches live under ~/.cache/mremap-harness and /dev/shm
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache
