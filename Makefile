# `make serve` and `make test` are all one needs. Everything lands below this folder:
# .venv (the environment), .venv-clients and .venv-clients.d (other people's clients, for tests),
# .venv-trainers (mlx-lm, for slow tests),
# .venv-swift (an S3 server, for tests), .data (the demo).

PYTHON ?= python3
CONFIG ?= configs/dev-cpu.yaml
PORT ?= 8000
INSTALL = .venv/bin/python -m pip install --quiet --disable-pip-version-check

.PHONY: serve test coverage slow clients chaos lint bench lock

serve: .venv/demo.stamp
	@exec .venv/bin/reef serve --config $(CONFIG) --port $(PORT)

test: .venv/dev.stamp .venv-clients/stamp .venv-swift/stamp
	.venv/bin/pytest -n 2 --dist loadgroup --no-loadscope-reorder

# Apart from `test`: it makes the tests a quarter slower.
coverage: .venv/dev.stamp .venv-clients/stamp .venv-swift/stamp
	.venv/bin/pytest --cov --cov-report=term

# What `test` leaves out: every client, made-up requests, sanitizers, long walks.
slow: .venv/dev.stamp .venv-clients/stamp .venv-swift/stamp .venv-schemathesis/stamp \
		.venv-trainers/stamp clients
	.venv/bin/pytest -m slow

# An environment for each client of tests/clients/*/: 2.5 GB, guidellm's torch included.
clients: $(patsubst tests/clients/%/requirements.txt,.venv-clients.d/%/stamp,\
	$(wildcard tests/clients/*/requirements.txt))

# Hostile requests, then faults of every kind under load: about half an hour.
chaos: .venv/dev.stamp .venv-swift/stamp
	.venv/bin/python -m tests.chaos.fuzz
	.venv/bin/python -m tests.chaos.fuzz --tenants --count 2000
	.venv/bin/python -m tests.chaos.deaths
	.venv/bin/python -m tests.chaos.storm

lint: .venv/dev.stamp
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/pyright
	.venv/bin/clang-format --dry-run -Werror engine/backends/native/src/*

bench: .venv/dev.stamp
	@.venv/bin/reef bench

# Resolve all versions anew; pyproject.toml says which are wanted.
lock: | .venv/bin/python
	.venv/bin/python scripts/lock.py

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/demo.stamp: pyproject.toml requirements.lock | .venv/bin/python
	$(INSTALL) -c requirements.lock -e '.[demo]'
	@touch $@

.venv/dev.stamp: pyproject.toml requirements.lock | .venv/bin/python
	$(INSTALL) -c requirements.lock -e '.[dev]'
	@touch $@

# The clients live apart, so that what they pull in cannot reach the server's environment.
.venv-clients/stamp: tests/clients/requirements.txt
	$(PYTHON) -m venv .venv-clients
	.venv-clients/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

.venv-clients.d/%/stamp: tests/clients/%/requirements.txt
	@echo "installing $*"
	@$(PYTHON) -m venv --clear $(@D)
	@$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

# So do trainers. The package mlx-cpu has some of mlx's files, which must not be the last ones.
.venv-trainers/stamp: tests/trainers/requirements.txt
	$(PYTHON) -m venv --clear .venv-trainers
	.venv-trainers/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	.venv-trainers/bin/python -m pip install --quiet --disable-pip-version-check \
		--force-reinstall --no-deps $$(grep ^mlx== $<)
	@touch $@

# So does what makes up requests.
.venv-schemathesis/stamp: tests/schemathesis/requirements.txt
	$(PYTHON) -m venv .venv-schemathesis
	.venv-schemathesis/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

# The S3 server lives apart too.
.venv-swift/stamp: tests/swift/requirements.txt
	$(PYTHON) -m venv .venv-swift
	.venv-swift/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@
