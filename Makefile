# Each target is a line that a person could type. `make demo` and `make test` need Python 3.11 only.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
PY     := .venv/bin/python
SITES  ?= 4
# Tests of a file share models and federations: a file stays with one worker. On two cores a third
# one computes while others wait.
SHARED := -n 3 --dist loadfile --no-loadscope-reorder
SLOWEST := --durations=15 --durations-min=10
PIP    := $(PY) -m pip install --quiet --disable-pip-version-check --constraint requirements.lock
BUNDLE ?= bundle
# The hub of tests/hub: another FastAPI than Flower's, so a Python and a lock of its own.
OLAH   := .venv/olah/bin/python
CPU    := -f compose.yaml -f docker/compose.cpu.yaml

.PHONY: install lock demo test lint test-faults drill test-gpu test-containers images bundle up down clean

install: .venv/.installed

.venv/.installed: pyproject.toml requirements.lock tests/hub/requirements.lock
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(v < (3, 11) and "Python 3.11 or newer is needed, this is %d.%d; make PYTHON=/path/to/python3.11" % v)'
	@echo "installing into .venv: 2 GB, a minute or more; once"
	@test -x $(PY) || $(PYTHON) -m venv .venv
	@$(PIP) -e '.[node,eval,dev]'
	@test -x $(OLAH) || $(PYTHON) -m venv .venv/olah
	@$(OLAH) -m pip install --quiet --disable-pip-version-check --no-deps -r tests/hub/requirements.lock
	@touch $@

# All packages of all extras, in exact versions. What is locked stays as long as pyproject.toml
# allows it; newer: make lock UPGRADE='-P pytest', or UPGRADE=--upgrade for all. The uv that
# resolves is Flower's own; torch is the index's build, a folder of wheels (UV_FIND_LINKS) is not asked.
lock:
	@test -x $(PY) || $(PYTHON) -m venv .venv
	@$(PIP) uv
	@$(PY) -m uv pip compile --quiet --universal --python-version 3.11 --all-extras $(UPGRADE) \
		--no-emit-package pip --custom-compile-command 'make lock' -o requirements.lock pyproject.toml
	@$(PY) -m uv pip compile --quiet --universal --python-version 3.11 --group olah $(UPGRADE) \
		--custom-compile-command 'make lock' -o tests/hub/requirements.lock
	@git --no-pager diff --unified=0 -- requirements.lock tests/hub/requirements.lock

# SuperLink and SuperNodes as processes: a real run in minutes. make demo SITES=20 ARGS='--data FILE'
demo: install
	$(PY) -m superlink.onehost --sites $(SITES) $(ARGS)

test: install
	$(PY) -m pytest $(SHARED)

lint: install
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# Real federations (processes) under attack and failure, and a real hub: a quarter of an hour on two
# cores.
test-faults: install
	$(PY) -m pytest $(SHARED) $(SLOWEST) -m faults tests/federation tests/hub

# Faults, one after the other, in one run that has to end as if nothing had been; prints a table.
drill: install
	$(PY) -m tests.federation.drill $(ARGS)

# Needs an NVIDIA GPU.
test-gpu: install
	CUDA_VISIBLE_DEVICES=$${CUDA_VISIBLE_DEVICES:-0} $(PY) -m pytest -m gpu

# Needs a Docker engine with compose v2; starts all 20 SuperNodes on the CPU.
test-containers: install
	$(PY) -m pytest -n 3 --dist loadscope $(SLOWEST) -m docker tests/containers

images:
	docker compose --profile eval build

# For a host that reaches nothing but the SuperLink: the images of SuperNode and evaluation, the base
# models that `prepare` has made here, the questions that `fetch` has brought, checksums. Never over
# another one.
bundle:
	mkdir $(BUNDLE)
	docker compose $(CPU) run --rm -T --no-deps prepare tar -C /models -c . > $(BUNDLE)/models.tar
	docker compose $(CPU) run --rm -T --no-deps eval pack > $(BUNDLE)/benchmarks.tar
	docker save --output $(BUNDLE)/images.tar \
		fedllm-medical/supernode:$${TAG:-0.1.0} fedllm-medical/eval:$${TAG:-0.1.0}
	cd $(BUNDLE) && sha256sum benchmarks.tar images.tar models.tar > SHA256SUMS

up:
	docker compose up

down:
	docker compose $(CPU) --profile eval down

clean:
	rm -rf .venv .demo .mypy_cache .pytest_cache .ruff_cache .hypothesis
