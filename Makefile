# Every target sets itself up: Python 3.13 and make are all that has to be there.
.DEFAULT_GOAL := help
.PHONY: help run trigger test check format

UV_VERSION := 0.13.9
UV := $(or $(shell command -v uv 2>/dev/null),.uv/bin/uv)
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export PYTHONPATH := $(CURDIR)/src:$(CURDIR)

help: ## Show this list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

run: .venv/ready .env ## Run the monitor here: the loop, the API on port 3001, a simulated billing service on port 4000
	@exec python -m local $(ARGS)

trigger: .venv/ready ## Check all open sessions now, through the running monitor's API
	@exec python -m local.trigger $(ARGS)

test: .venv/ready ## Run the test suite
	pytest

check: .venv/ready ## Lint, format, types
	ruff check
	ruff format --check
	mypy

format: .venv/ready ## Format and mend what can be mended
	ruff check --fix
	ruff format

.venv/ready: pyproject.toml uv.lock $(if $(filter .uv/%,$(UV)),.uv/bin/uv)
	$(UV) sync --frozen --quiet
	@touch $@

.uv/bin/uv:
	python3.13 -m venv .uv
	.uv/bin/pip install --quiet uv==$(UV_VERSION)

.env:
	cp .env.example .env
