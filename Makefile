# Every target sets itself up: Python 3.13 and make are all that has to be there.
.DEFAULT_GOAL := help
.PHONY: help run trigger billing test browser screenshot build deploy-local e2e bench cost simulate soak mutants check format requirements

UV_VERSION := 0.13.9
UV := $(or $(shell command -v uv 2>/dev/null),.uv/bin/uv)
NPM := $(if $(shell command -v npm),tests/stepfunctions/node_modules)
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export PYTHONPATH := $(CURDIR)/src:$(CURDIR)

help: ## Show this list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

run: .venv/ready .env ## Run the monitor here: the loop, the API on port 3001, a simulated billing service on port 4000
	@exec python -m local $(ARGS)

trigger: .venv/ready ## Check all open sessions now, through the running monitor's API
	@exec python -m local.trigger $(ARGS)

billing: .venv/ready ## Run the simulated billing service alone, e.g. ARGS="--host 0.0.0.0" for sam local
	@exec python -m local.billing $(ARGS)

test: .venv/ready $(NPM) ## Run the test suite
	pytest

browser: .venv/ready ## Look at the operator's page in every state; screenshots in .screenshots (needs chromium)
	pytest tests/browser

screenshot: .venv/ready ## Take the README's picture of the page, in six minutes (needs chromium)
	@exec python -m tests.browser.screenshot

build: .venv/e2e ## Build the functions for a deployment, with bytecode, e.g. ARGS="--config-env prod"
	@exec python -m local.package $(ARGS)

deploy-local: .venv/e2e .emulator/ready ## Deploy onto an emulated AWS on this machine (needs a MariaDB), until Ctrl-C
	@exec python -m local.deploy $(ARGS)

e2e: .venv/e2e .emulator/ready ## Build with SAM, deploy onto an emulated AWS, run in SAM's containers (needs root's Docker and a MariaDB)
	.ci/lambda-image
	pytest --capture=no tests/e2e

bench: .venv/ready ## Measure this and what would otherwise be run, side by side (installs nginx and wrk as root)
	@exec python -m bench $(ARGS)

cost: .venv/ready ## What a month costs, computed from the template, list prices and measured passes
	@exec python -m bench.cost $(ARGS)

simulate: .venv/ready ## A million open sessions on a virtual clock: how late, how many workers
	@exec python -m bench.simulate $(ARGS)

# Not checkov: of its twelve findings here one is wrong (the queue is encrypted, by SQS's own key), and
# the others are KMS keys for what holds no secret, a second dead-letter queue, and a cache for health.
soak: .venv/ready ## Ten minutes of faults drawn at random, with a report, e.g. ARGS="--minutes 3"
	@exec python -m tests.chaos.soak $(ARGS)

mutants: .venv/mutation ## Break each guard of the core, one at a time: does a test notice? e.g. ARGS="store/queue --jobs 2"
	@exec python -m tests.mutation $(ARGS)

check: .venv/ready ## Lint, format, types, template, workflow, scripts
	ruff check
	ruff format --check
	mypy
	cfn-lint template.yaml
	zizmor --offline --quiet --persona=auditor .github
	shellcheck .ci/*

format: .venv/ready ## Format and mend what can be mended
	ruff check --fix
	ruff format

requirements: .venv/ready ## Write src/requirements.txt, what goes into the Lambda package, from uv.lock
	$(UV) export --frozen --quiet --no-dev --no-emit-project --no-header --no-annotate -o src/requirements.txt

.venv/ready: pyproject.toml uv.lock $(if $(filter .uv/%,$(UV)),.uv/bin/uv)
	$(UV) sync --frozen --quiet
	@touch $@

# SAM, and the mutation tester, beside the rest; `--inexact` keeps what the other one has installed.
.venv/e2e .venv/mutation: .venv/ready
	$(UV) sync --frozen --quiet --inexact --group $(@F)
	@touch $@

.emulator/ready: pyproject.toml uv.lock $(if $(filter .uv/%,$(UV)),.uv/bin/uv)
	UV_PROJECT_ENVIRONMENT=.emulator $(UV) sync --frozen --quiet --only-group emulator
	@touch $@

.uv/bin/uv:
	python3.13 -m venv .uv
	.uv/bin/pip install --quiet uv==$(UV_VERSION)

# The state machine's validator is a Node program; without npm its tests are passed over.
tests/stepfunctions/node_modules: tests/stepfunctions/package-lock.json
	npm ci --silent --prefix tests/stepfunctions
	@touch $@

.env:
	cp .env.example .env
