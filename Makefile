# Each target is one or two plain commands. PYTHON is any Python 3.11 or newer that TensorFlow supports.
PYTHON ?= python3.11
BIN := .venv/bin
export TF_CPP_MIN_LOG_LEVEL ?= 3

.PHONY: setup demo test test-slow prepare docs bench clean

setup: .venv/installed

.venv/installed: settings.ini setup.py pyproject.toml
	$(PYTHON) -m venv .venv && $(BIN)/python -m pip install --quiet --editable ".[jax,dev]"
	$(BIN)/python tests/check_opencv.py
	touch $@

demo: setup
	$(BIN)/python -m fcos_lite.demo

test: setup
	$(BIN)/python tests/run.py

test-slow: setup
	$(BIN)/python tests/run.py --slow

prepare: setup
	$(BIN)/nbdev-export && $(BIN)/nbdev-test --save --n-workers 2 && $(BIN)/nbdev-clean
	$(BIN)/jupyter nbconvert --to markdown nbs/index.ipynb --output-dir . --output README --log-level WARN
	sed -i.bak -E -e '0,/^```$$/s//```python/' -e 's#\]\((images/|[0-9])#](nbs/\1#g' README.md && rm README.md.bak

docs: setup
	$(BIN)/mkdocs build

bench: setup
	$(BIN)/python bench/run.py

clean:
	rm -rf .venv .venv-tfa _docs build dist *.egg-info
