# Each target is one or two plain commands. PYTHON is any Python 3.11 or newer that TensorFlow supports.
PYTHON ?= python3.11
BIN := .venv/bin
export TF_CPP_MIN_LOG_LEVEL ?= 3

# COCO is a folder in COCO's layout: train2017/, val2017/, annotations/. person-gpu installs JAX with CUDA
COCO ?= coco
MINUTES ?= 14
PERSON := $(BIN)/python -u -m fcos_lite.train --data $(COCO) --recipe long --image-size 384 --scale-init 1 --ltrb-bias 0 --in-memory
ON_GPU := KERAS_BACKEND=jax $(PERSON) --precision mixed_bfloat16 --workers 8 --evaluate-every 0

.PHONY: setup demo test test-slow prepare docs lab bench person person-gpu person-rehearsal clean

setup: .venv/installed

# pip compiles all it installs: where Python may not write bytecode (PYTHONDONTWRITEBYTECODE), every process would else compile TensorFlow anew
.venv/package: settings.ini setup.py pyproject.toml
	$(PYTHON) -m venv .venv && $(BIN)/python -m pip install --quiet --editable .
	$(BIN)/python tools/check_opencv.py
	touch $@

.venv/installed: .venv/package
	$(BIN)/python -m pip install --quiet --editable ".[jax,mlflow,export,dev]"
	$(BIN)/python tools/check_opencv.py
	touch $@

# the demo needs the package alone, not what tests, notebooks and exports need besides
demo: .venv/package
	$(BIN)/python -m fcos_lite.demo

test: setup
	$(BIN)/python tools/run_tests.py

test-slow: setup
	$(BIN)/python tools/run_tests.py --slow

prepare: setup
	$(BIN)/nbdev-export && $(BIN)/nbdev-test --save --n-workers 2 && $(BIN)/nbdev-clean && $(BIN)/python tools/restore_unchanged_outputs.py
	$(BIN)/jupyter nbconvert --to markdown nbs/index.ipynb --output-dir . --output README --log-level WARN
	sed -i.bak -E -e '1,/^```$$/s/^```$$/```python/' -e '/^```$$/N' -e '/^```\n#\| echo: false/,/^```/d' -e 's#\]\((images/|tutorials/|book/|reference/)#](nbs/\1#g' -e 's#\]\(\.\./#](#g' README.md && cat -s README.md > README.md.bak && mv README.md.bak README.md

docs: setup
	$(BIN)/mkdocs build

lab: setup
	$(BIN)/python -m pip install --quiet jupyterlab
	$(BIN)/jupyter lab nbs/book

bench: setup
	$(BIN)/python bench/run.py

person: setup
	$(PERSON) --evaluate-every 10 --out runs/person

person-gpu: setup
	$(BIN)/python -m pip install --quiet --editable ".[jax_cuda]"
	$(BIN)/python -c "import jax, sys; jax.default_backend() == 'gpu' or sys.exit('person-gpu: JAX sees no GPU here; on a CPU take: make person')"
	$(ON_GPU) --minutes $(MINUTES) --out runs/person-gpu
	$(BIN)/python -m fcos_lite.evaluate --weights runs/person-gpu --data $(COCO) --out runs/person-gpu-evaluation

person-rehearsal: setup
	$(PERSON) --limit 64 --batch-size 8 --epochs 1 --out runs/rehearsal-cpu --force
	$(ON_GPU) --limit 64 --batch-size 8 --image-size 64 --minutes 2 --out runs/rehearsal-gpu --force
	$(BIN)/python -m fcos_lite.evaluate --weights runs/rehearsal-gpu --data $(COCO) --limit 64 --out runs/rehearsal-gpu-evaluation --force

clean:
	rm -rf .venv .venv-tfa _docs build dist *.egg-info
