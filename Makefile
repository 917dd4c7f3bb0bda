# Every target sets itself up. You only need Python 3.13 and make.
.DEFAULT_GOAL := help
.PHONY: help run trigger billing unit test coverage browser screenshot build release deploy-local e2e bench cost simulate soak cluster mutants check format requirements

UV_VERSION := 0.13.9
# Tests mostly wait for servers and clocks, so four processes share two cores; those of `unit` do not.
PARALLEL := --dist worksteal --numprocesses
UV := $(or $(shell command -v uv 2>/dev/null),.uv/bin/uv)
NPM := $(if $(shell command -v npm),tests/stepfunctions/node_modules)
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export PYTHONPATH := $(CURDIR)/src:$(CURDIR)

help: ## Show this list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

run: .venv/ready .env ## Run the monitor on this machine: the loop, the API on port 3001, a simulated billing service on port 4000
	@exec python -m local $(ARGS)

trigger: .venv/ready ## Check all open sessions now, through the API of the running monitor
	@exec python -m local.trigger $(ARGS)

billing: .venv/ready ## Run only the simulated billing service, e.g. ARGS="--host 0.0.0.0" for sam local
	@exec python -m local.billing $(ARGS)

unit: .venv/ready ## Run the quick tests: no database server, no npm, under 20 seconds
	pytest $(PARALLEL) 2 -m "not server and not slow" --ignore=tests/chaos --ignore=tests/local -p no:schemathesis $(ARGS)

test: .venv/ready $(NPM) ## Run the test suite
	pytest $(PARALLEL) 4

coverage: .venv/ready $(NPM) ## Show which lines and branches of src the tests miss, e.g. ARGS=tests/store
	pytest --cov $(PARALLEL) 4 $(ARGS)

browser: .venv/ready ## Test the operator's page in a browser; writes .screenshots (needs chromium)
	pytest tests/browser

screenshot: .venv/ready ## Take the README's screenshot of the page, which takes six minutes (needs chromium)
	@exec python -m tests.browser.screenshot

build: .venv/e2e ## Build the functions for deployment, with bytecode, e.g. ARGS="--config-env prod"
	@exec python -m local.package $(ARGS)

release: .venv/e2e ## Build a release in dist: archive, SBOM (CycloneDX) and checksums
	python -m local.package
	python -m local.release
	$(UV) export --frozen --quiet --no-dev --no-emit-project --format cyclonedx1.5 --output-file dist/sbom.json > /dev/null

deploy-local: .venv/e2e .emulator/ready ## Deploy to an emulated AWS on this machine and run until Ctrl-C (needs MariaDB)
	@exec python -m local.deploy $(ARGS)

e2e: .venv/e2e .emulator/ready ## Test the deployment on an emulated AWS and the functions in SAM's containers (needs Docker as root and MariaDB)
	.ci/lambda-image
	pytest --capture=no tests/e2e

bench: .venv/ready ## Measure the monitor and its alternatives side by side (installs nginx and wrk as root)
	@exec python -m bench $(ARGS)

cost: .venv/ready ## Compute the cost of a month from the template, list prices and measured passes
	@exec python -m bench.cost $(ARGS)

simulate: .venv/ready ## Simulate a million open sessions on a virtual clock: how late, how many workers
	@exec python -m bench.simulate $(ARGS)

soak: .venv/ready ## Inject random faults for ten minutes and print a report, e.g. ARGS="--minutes 3"
	@exec python -m tests.chaos.soak $(ARGS)

cluster: .venv/ready ## Run workers on Galera nodes, behind HAProxy and during schema changes (installs them as root)
	@exec python -m tests.chaos.cluster $(ARGS)

mutants: .venv/mutation ## Break each guard of the core, one at a time: does a test notice? e.g. ARGS="store/queue --jobs 2"
	@exec python -m tests.mutation $(ARGS)

# Without checkov, whose findings docs/deploy.md answers.
check: .venv/ready ## Lint, formatting, types, template, workflow, scripts
	ruff check
	ruff format --check
	mypy
	pytest --quiet tests/test_layers.py
	cfn-lint template.yaml
	zizmor --offline --quiet --persona=auditor .github
	shellcheck .ci/*

format: .venv/ready ## Format the code and fix what can be fixed automatically
	ruff check --fix
	ruff format

requirements: .venv/ready ## Write src/requirements.txt, the Lambda package's dependencies, from uv.lock
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

# The state machine's validator is a Node program. Without npm its tests are skipped.
tests/stepfunctions/node_modules: tests/stepfunctions/package-lock.json
	npm ci --silent --prefix tests/stepfunctions
	@touch $@

.env:
	cp .env.example .env
