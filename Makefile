# SPDX-License-Identifier: GPL-2.0
# `make run` and `make test` do all of the set-up on a fresh Debian or Ubuntu machine, and are quick when it is done.

KERNEL ?= debian:
ARCH ?=
PYTHON ?= python3
BIN := .venv/bin

.PHONY: run test lint types unit slow small guest pair sample kselftest explore matrix mutants costs bench soak setup host build-host unit-host bench-host clean

# Compilers are only needed for a kernel that is neither packaged, nor a machine, nor a file or tree that exists.
built = $(if $(filter debian:% ssh:%,$(KERNEL))$(wildcard $(KERNEL)),,build-host)

run: setup $(built) ## boot a kernel and print the answer; KERNEL=debian:7.3 ARCH=arm64 KERNEL=relocate-anon choose another
	$(BIN)/pytest --kernel='$(KERNEL)' $(if $(ARCH),--arch=$(ARCH)) --answer

test: lint types unit small guest pair sample kselftest ## every gate

lint: setup ## style, formatting, and which room may import from which
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports --no-cache
	$(BIN)/python -m tests.rows --check
	$(BIN)/python -m tests.findings_page --check
	$(BIN)/python -m tests.mutants_page --check

types: setup ## mypy, strict
	$(BIN)/mypy

unit: setup unit-host ## the harness's own tests; those below tests/integration boot real kernels
	$(BIN)/pytest tests -m 'not builds_kernel and not debuginfo' -n 2 --dist=worksteal

slow: setup build-host ## tests that compile kernels or fetch hundreds of MB
	$(BIN)/pytest tests -m 'builds_kernel or debuginfo'

guest: setup ## the guest suite on Debian's stable kernel, on both architectures
	$(BIN)/pytest --kernel=debian:6.12 --arch=x86_64 --arch=arm64 -n 2 --expect-findings --explore=200

costs: setup build-host ## what moves cost with and without relocation, in instructions
	$(BIN)/pytest --kernel=unpatched --kernel=relocate-anon --icount guest_tests/test_costs.py

pair: setup build-host ## the guest suite on the reference kernel and its unpatched twin, which are built here
	$(BIN)/pytest --kernel=unpatched --kernel=relocate-anon -n 2 --expect-findings --explore=200

sample: setup build-host ## some of the mutants, at least one of each kind: every one of them must be noticed
	$(BIN)/harness mutants --kernel=relocate-anon --sample

kselftest: setup build-host ## upstream's own tests of merging, the reverse map and mremap(), on the reference kernel
	$(BIN)/pytest --kernel=relocate-anon --kselftest=merge --kselftest=rmap --kselftest=mremap_dontunmap

bench: setup bench-host .venv/bench $(built) ## speed, beside virtme-ng; KERNEL=debian:7.3 ARCH=x86_64 choose another kernel
	$(BIN)/python tests/benchmark.py --kernel='$(KERNEL)' $(if $(ARCH),--arch=$(ARCH)) --suite

small: setup ## some guest tests on the oldest, the stable and the newest Debian kernel, on both architectures
	$(BIN)/harness matrix --group=small --again

explore: setup ## a minute of programs made by chance, on Debian's stable kernel
	$(BIN)/harness explore --kernel=debian:6.12 --minutes=1 --seed=1

matrix: setup ## the guest suite on many kernels; what is kept from an earlier run is not run again
	$(BIN)/harness matrix --html=matrix.html

mutants: setup build-host ## the guest tests against deliberate bugs: which do they notice?
	$(BIN)/harness mutants --kernel=unpatched --kernel=relocate-anon --html=mutants.html

soak: setup ## the guest suite twenty times, in random order, under load; hours without KVM
	@missing=$$($(requirements) soak) || exit; $(install)
	$(BIN)/python -m tests.soak

setup: host .venv/ready

# What only the system can provide stands in one table, which any Python 3 can read.
requirements = $(PYTHON) -I harness/host/requirements.py $(if $(ARCH),--arch=$(ARCH))

host: ## what running guests takes
	@missing=; command -v $(PYTHON) >/dev/null || missing=python3; $(install)
	@missing=$$($(PYTHON) -I harness/host/requirements.py setup guests) || exit; $(install)

build-host: ## what building kernels takes: KERNEL=relocate-anon and the like
	@missing=$$($(requirements) build) || exit; $(install)

unit-host: ## what the harness's own tests take
	@missing=$$($(requirements) build unit) || exit; $(install)

bench-host: ## what the benchmark's peer takes
	@missing=$$($(requirements) bench) || exit; $(install)

define install
[ -z "$$missing" ] && exit 0; \
command -v apt-get >/dev/null || { \
    echo "This host has no apt-get. Install what these Debian packages hold in its own way: $$missing." >&2; \
    echo "Guests run without apt and dpkg too: pip install . and ask harness doctor what to bring." >&2; exit 1; }; \
as=; [ "$$(id -u)" = 0 ] || as="sudo -n"; \
if [ -n "$$as" ] && ! $$as true 2>/dev/null; then \
    echo "Missing packages, and no right to install them. Run: apt-get install $$missing" >&2; exit 1; \
fi; \
echo "installing $$missing"; \
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
	rm -rf .venv build matrix.html mutants.html *.egg-info .pytest_cache .mypy_cache .ruff_cache
