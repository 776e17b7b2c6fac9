# Every target starts from Python 3.11, make and git alone: it first creates .venv and installs
# the tested versions there. Nothing is installed outside .venv.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SITE := _build/html
CHINESE := _build/zh
IN_CHINESE := --config $(CHINESE)/_config.yml --path-output $(CHINESE)
PAPER := _build/latex
PYTEST := $(BIN)/pytest tests ewc_lib --doctest-modules --numprocesses auto

# The networks here are small: threads that wait for each other cost more than they give.
export OMP_NUM_THREADS ?= 1
# Kernels come from .venv.
export JUPYTER_PREFER_ENV_PATH := 1
unexport JUPYTER_PATH
# To compile what is imported, once, saves seconds of every process after the first.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help
help: ## Show this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 12

# Python compiles what it imports; to compile all that is installed would take as long again.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing the tested versions into $(VENV): about two minutes"
	@while sleep 15 &>/dev/null; do echo "... installing"; done & trap "kill $$!" EXIT; \
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[book,test,dev]'
	@touch $@

.PHONY: install
install: $(INSTALLED) ## Install what the other targets need into .venv

.PHONY: execute
execute: $(INSTALLED) ## Execute the chapters that have changed, by nbmake
	$(BIN)/python book/_ext/execution.py

.PHONY: book
book: pages ## Execute what has changed and build the book; any warning is an error
	@echo "The book: $(CURDIR)/$(SITE)/index.html"

.PHONY: pages
pages: $(INSTALLED)
	@$(BIN)/python book/_ext/sources.py || $(MAKE) --no-print-directory build

.PHONY: build
build: $(INSTALLED)
	rm -rf $(SITE) $(CHINESE)/_build/html
	$(BIN)/python book/_ext/execution.py
	$(MAKE) --no-print-directory --jobs=2 english chinese && $(BIN)/python book/_ext/chinese.py --publish \
	|| { rm -rf $(SITE); exit 1; }

# Both editions from the chapters as they were executed, side by side.
.PHONY: english
english:
	$(BIN)/jupyter-book build . -W --all --keep-going

.PHONY: chinese
chinese:
	$(BIN)/python book/_ext/chinese.py
	$(BIN)/jupyter-book build . $(IN_CHINESE) -W --all --keep-going --quiet

.PHONY: messages
messages: pages ## Bring the catalogues of the Chinese edition up to date with the pages
	$(BIN)/python book/_ext/messages.py

.PHONY: pdf
pdf: $(INSTALLED) ## Build the book as a PDF in both languages; needs XeLaTeX (see CONTRIBUTING)
	$(BIN)/jupyter-book build . --builder latex -W --all --keep-going
	$(call typeset,$(PAPER))
	$(BIN)/python book/_ext/chinese.py
	$(BIN)/jupyter-book build . $(IN_CHINESE) --builder latex -W --all --keep-going
	$(call typeset,$(CHINESE)/_build/latex)

define typeset
	max_print_line=1000 $(MAKE) --directory $(1) PDFLATEX='latexmk -xelatex -quiet -halt-on-error'
	! grep -aE '(eference|Citation) .* undefined|Missing character' $(1)/ewc_lib.log
	@echo "The book on paper: $(CURDIR)/$(1)/ewc_lib.pdf"
endef

.PHONY: test
test: lint pages ## Check the code, execute the chapters, run the tests, look at the pages
	$(PYTEST)
	@echo "All checks passed: code, chapters, pages, tests, doctests."

.PHONY: test-all
test-all: lint pages ## The same with the slow tests
	$(PYTEST) -m ""

.PHONY: coverage
coverage: pages ## Run all tests and measure which lines of the package they reach
	$(PYTEST) -m "" --cov

.PHONY: lint
lint: $(INSTALLED) ## Check style, types, import rules and metadata
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-actions .github/actions/*/action.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/b*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff

.PHONY: notebooks
notebooks: $(INSTALLED) ## Write the notebook beside each chapter
	$(BIN)/python book/_ext/notebook_pairs.py

.PHONY: figures
figures: $(INSTALLED) ## Draw the figure of the first page and the README again
	EWC_FIGURES=book/figures $(BIN)/pytest --nbmake book/foundations/ewc.ipynb

.PHONY: links
links: $(INSTALLED) ## Check the external links (needs a network)
	$(BIN)/jupyter-book build . --builder linkcheck --all

.PHONY: clean
clean: ## Remove the built book and all caches, but not .venv
	rm -rf _build .coverage .hypothesis .mypy_cache .ruff_cache
	find book ewc_lib tests -name __pycache__ -type d -prune -exec rm -rf {} +
