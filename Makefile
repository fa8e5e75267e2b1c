# Two commands: `make demo` runs the main job on bundled weights and real images, `make test` runs the tests.
# Each sets up .venv the first time; run again, they install nothing unless pyproject.toml changed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TIMM_TESTS := $(VENV)/timm-sdist

PORT ?= 8000

.PHONY: demo test slow-tests timm-tests coverage lint render docs page clean

demo: $(VENV)/.installed-demo
	@echo "==> the bundled rotnet_nin on the sample images"
	@$(BIN)/python -m rotation_ssl.demo -o demo.png

# a process for each processor, with a thread each: most tests are too small to share one among several
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadfile

test: $(VENV)/.installed-dev lint
	@echo "==> tests (ROTATION_SSL_DATA=$${ROTATION_SSL_DATA:-, not set: tests that need whole data sets skip})"
	@$(PYTEST) -m "not slow"

# what takes minutes: models compiled and exported, training killed at many moments, several processes
slow-tests: $(VENV)/.installed-dev
	@echo "==> slow tests"
	@$(PYTEST) -m slow

coverage: $(VENV)/.installed-dev
	@echo "==> which lines the tests run"
	@$(PYTEST) -m "not slow" --cov --cov-report=term:skip-covered

lint: $(VENV)/.installed-dev
	@echo "==> ruff, mypy and codespell"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/codespell

# timm's own per-model tests, from the sdist of the installed timm, on our models
timm-tests: $(VENV)/.installed-dev
	@echo "==> timm's own tests on the models of rotation_ssl"
	@rm -rf $(TIMM_TESTS) && mkdir -p $(TIMM_TESTS)
	@version=$$($(BIN)/python -c "import timm; print(timm.__version__)") && \
	    $(BIN)/python -m pip download --quiet --no-deps --no-binary timm \
	        --dest $(TIMM_TESTS) "timm==$$version" && \
	    tar -xzf $(TIMM_TESTS)/timm-$$version.tar.gz -C $(TIMM_TESTS) --strip-components=1
	@cd $(TIMM_TESTS) && PYTHONPATH="$(CURDIR)/tests" "$(CURDIR)/$(BIN)/python" -m pytest -q -p timm_plugin \
	    --rootdir=. -c /dev/null -k rotnet tests/test_models.py

# the tables of MODEL_CARD.md, README.md, docs/ and the studies, and the metrics of the manifest, from the result rows
render: $(VENV)/.installed-dev
	@$(BIN)/python -m training publish render

# the documentation site, build/docs/index.html; a warning, such as a link that leads nowhere, is an error
docs: $(VENV)/.installed-docs
	@echo "==> the documentation site: build/docs/index.html"
	@$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going -c docs -d build/doctrees . build/docs

# the page of docs/try, which runs the network in the browser; it needs npm
page: $(VENV)/.installed-onnx
	@echo "==> building the page in build/page"
	@$(BIN)/python -m training page --output build/page
	@echo "==> the page is at http://127.0.0.1:$(PORT)/ (Ctrl-C stops; another port: make page PORT=8001)"
	@$(BIN)/python -m http.server $(PORT) --bind 127.0.0.1 --directory build/page

clean:
	rm -rf $(VENV) build dist demo.png .coverage

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or later is needed: PYTHON=python3.12, for example, chooses one" \
	    if sys.version_info < (3, 10) else 0)'
	@echo "==> making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/.installed-demo: pyproject.toml | $(BIN)/python
	@echo "==> installing rotation-ssl into $(VENV) (torch is large: the first time takes minutes)"
	@$(BIN)/python -m pip install --quiet --editable '.[demo]'
	@touch $@

$(VENV)/.installed-docs: pyproject.toml | $(BIN)/python
	@echo "==> installing rotation-ssl with the docs extra into $(VENV) (torch is large: the first time takes minutes)"
	@$(BIN)/python -m pip install --quiet --editable '.[docs]'
	@touch $@ $(VENV)/.installed-demo

$(VENV)/.installed-onnx: pyproject.toml | $(BIN)/python
	@echo "==> installing rotation-ssl with the onnx extra into $(VENV) (torch is large: the first time takes minutes)"
	@$(BIN)/python -m pip install --quiet --editable '.[demo,onnx]'
	@touch $@ $(VENV)/.installed-demo

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	@echo "==> installing rotation-ssl with the dev extra into $(VENV) (torch is large: the first time takes minutes)"
	@$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@ $(VENV)/.installed-demo $(VENV)/.installed-docs $(VENV)/.installed-onnx
