# make demo: train a sigmoid and a softmax transformer on real text, write a report.   make test: lint, types, tests.
# Needs Python 3.11 or later. PYTHON=python3.12 picks one, and gets an environment of its own (.venv-python3.12).
# ARGS are the demo's: make demo ARGS="--fresh --no-bias-arm". ARGS=vision and ARGS=speech are its pairs on digits.
PYTHON ?= python3
VENV := .venv$(if $(filter-out file,$(origin PYTHON)),-$(lastword $(notdir $(PYTHON))))
PY := $(VENV)/bin/python
START := $(shell date +%s)

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-oldest tests test-long gpu lint docs clean
.NOTPARALLEL:

demo: $(VENV)/.demo$(addprefix -,$(filter vision speech,$(ARGS)))
	$(PY) -m flashsigmoid demo $(ARGS)

# the last line is pytest's own, with its own time
TESTS := -m pytest -n logical --maxprocesses 8 --dist worksteal
test: lint
	@echo "install, lint and types: $$(( $$(date +%s) - $(START) )) s; now the tests, on every core up to 8"
	$(PY) $(TESTS)

# with the oldest torch that we support, and its triton, whose interpreter needs the numpy of its time
test-oldest:
	$(MAKE) tests VENV=.venv-oldest WITH='torch==2.11.0 torchvision==0.26.0 "numpy<2.4"'

tests: $(VENV)/.test
	$(PY) $(TESTS)

test-long: $(VENV)/.test
	$(PY) -m pytest -m long --timeout 14400

# on a machine with a GPU, by its own Python with torch and triton: GPU=python3.12 PEERS="--load-library libfa3.so"
GPU ?= python3
RESULTS := benchmarks/results
BENCH = $(GPU) -m flashsigmoid bench --device cuda $(PEERS)
FAST := --peer hopper --peer triton --peer fa3 --peer 'sdpa flash' --peer 'sdpa cudnn'
EXACT := --peer 'hopper exact' --peer 'triton exact' --peer fa3 --peer 'sdpa cudnn'
KERNELS := --work forward --work backward
WORKERS := -n logical --maxprocesses 14 --maxschedchunk 1
gpu:
	$(GPU) -m pytest tests/gpu --ignore-glob '*/test_hopper*.py' $(WORKERS)
	$(GPU) -m pytest tests/gpu/test_hopper.py tests/gpu/test_hopper_packed.py --gpu-record gpu-tests-hopper.jsonl $(WORKERS)
	$(BENCH) 'lm-*-d64' 'lm-*-d64-causal' $(FAST) --peer triton-sigmoid $(KERNELS) --out $(RESULTS)/lm-d64-bfloat16.jsonl
	$(BENCH) 'lm-*-d128*' $(FAST) --peer triton-sigmoid $(KERNELS) --out $(RESULTS)/lm-d128-bfloat16.jsonl
	$(BENCH) 'lm-*-d256*' $(FAST) $(KERNELS) --out $(RESULTS)/lm-d256-bfloat16.jsonl
	$(BENCH) lm-4k-d64 lm-4k-d64-causal 'lm-16k-d64*' 'lm-4k-d128*' 'lm-16k-d128*' 'lm-4k-d256*' 'lm-16k-d256*' $(EXACT) \
	  $(KERNELS) --out $(RESULTS)/exact-bfloat16.jsonl
	$(BENCH) 'b0-*' 'wide-*' $(FAST) $(KERNELS) --out $(RESULTS)/scores-bfloat16.jsonl
	$(BENCH) gqa window varlen cross long $(FAST) $(KERNELS) --out $(RESULTS)/others-bfloat16.jsonl
	$(BENCH) 'vit-*' $(FAST) --peer triton-sigmoid --out $(RESULTS)/vit-bfloat16.jsonl
	$(BENCH) 'vit-*' $(FAST) --no-graphs --work both --out $(RESULTS)/vit-eager-bfloat16.jsonl
	$(BENCH) lm-4k-d64-alibi-causal --peer hopper --peer triton $(KERNELS) --out $(RESULTS)/alibi-bfloat16.jsonl
	$(BENCH) 'lm-1k-d128*' 'lm-4k-d128*' 'lm-16k-d128*' --peer triton --peer hopper --peer 'triton fp8' --work forward \
	  --out $(RESULTS)/fp8.jsonl
	$(BENCH) decode --out $(RESULTS)/decode-bfloat16.jsonl
	$(BENCH) lm-4k-d64 lm-4k-d128-causal lm-4k-d64-alibi-causal $(KERNELS) --out $(RESULTS)/everybody-bfloat16.jsonl
	$(GPU) -m flashsigmoid.bench.profile $(PEERS) --out $(RESULTS)/profile-bfloat16.jsonl
	$(GPU) -m flashsigmoid.report.accuracy $(RESULTS)/gpu-tests.jsonl docs/images/accuracy.png
	$(GPU) -m flashsigmoid.report.speed $(RESULTS)/lm-d128-bfloat16.jsonl docs/images/speed.png
	$(GPU) -m flashsigmoid.report.curves $(foreach n,64 128,$(RESULTS)/lm-d$(n)-bfloat16.jsonl) docs/images/curves.png
	$(GPU) -m flashsigmoid.report.tables docs/numerics.md

lint: $(VENV)/.test
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright --pythonpath $(PY)

docs: $(VENV)/.docs
	$(PY) -m mkdocs build --strict

clean:
	rm -rf .venv .venv-* build dist site

# A stamp per set of extras: installs once, and again when pyproject.toml changes. An environment that lost its Python
# or pip, or whose install was interrupted (.installing is still there), is made anew.
$(VENV)/.demo: EXTRAS := train,report
$(VENV)/.demo-vision: EXTRAS := train,report,vision
$(VENV)/.demo-speech: EXTRAS := train,report,speech
$(VENV)/.test: EXTRAS := test
$(VENV)/.docs: EXTRAS := docs

$(VENV)/.demo $(VENV)/.demo-vision $(VENV)/.demo-speech $(VENV)/.test $(VENV)/.docs: pyproject.toml
	@command -v "$(PYTHON)" >/dev/null || { echo "flashsigmoid needs Python 3.11 or later, found no $(PYTHON): install it, or name another: make PYTHON=python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else "flashsigmoid needs Python 3.11 or later, got %d.%d (%s): name another: make PYTHON=python3.12" % (v[0], v[1], sys.executable))'
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) has no venv module: install it (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@if [ -e $(VENV)/.installing ]; then echo "the last install was interrupted: making $(VENV) anew"; rm -rf $(VENV); fi
	@$(PY) -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv --clear $(VENV)
	@touch $(VENV)/.installing
	$(PY) -m pip install $(if $(WITH),$(WITH) )-e ".[$(EXTRAS)]"
	@rm $(VENV)/.installing
	@touch $@
