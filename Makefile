# Everything happens in .venv; nothing is assumed but Python 3.11 or newer with pip.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
EXTRAS := torch,jax,conformance,gemma-270m,studies,training,dev
PACKAGES := api spec backends conformance studies bench/speed choosing

# The strict editable install links files one by one, so another set of files is another install.
FILES := $(shell { cat pyproject.toml constraints.txt; find $(PACKAGES) -type f -not -name '*.pyc' | sort; } | cksum | cut -d' ' -f1)
INSTALLED := .venv/.installed-$(FILES)

export HF_HUB_OFFLINE := 1
export HF_HUB_DISABLE_PROGRESS_BARS := 1
# Whatever the environment says: a test that starts a process would compile all of Lyra anew.
export PYTHONDONTWRITEBYTECODE :=

# The tests of backends and of real models, apart from those of the suite, in parts that two cores finish together.
REAL_TESTS := tests/test_model.py tests/test_real_model.py
MODEL_TESTS := $(wildcard tests/test_jax_*.py tests/test_torch_*.py) tests/test_attention_backends.py tests/test_engines.py
OTHER_TESTS := $(filter-out $(REAL_TESTS) $(MODEL_TESTS),$(wildcard tests/test_*.py))
PIP_INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt \
	--config-settings editable_mode=strict --editable
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -P -m pytest -q -p no:cacheprovider --durations=10

# The harness's own tests ask what the harness does, and faults and mutants are compiled once each to be found wrong: not
# how fast or to which last bit JAX computes. XLA compiles for them in a fraction of the time, without its optimisations.
# The suite, models and benchmarks are compiled as users' are.
QUICK_XLA := --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false

# What depends on transformers, for the oldest version that is supported and the newest that there is. The tests above
# run with that of constraints.txt.
TRANSFORMERS_TESTS := $(filter-out %_partial.py,$(wildcard tests/test_torch_*.py)) tests/test_engines.py $(wildcard tests/test_oracle_hf*.py)
TARGET := $(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target

.PHONY: demo test test-suite test-harness test-models test-real test-oldest test-newest lint format schema faults bench performance heads clean

demo: $(INSTALLED)  ## the spec held by both backends, then one context in two frameworks
	$(BIN)/lyra conform --profile smoke
	$(BIN)/python examples/two_backends.py

test: $(INSTALLED)  ## the conformance suite's ci profile and the harness's own tests, side by side on two cores
	$(MAKE) --no-print-directory -j2 --output-sync=target test-harness test-suite test-models test-real test-oldest

test-suite: $(INSTALLED)
	$(BIN)/lyra conform --profile ci --json build/conformance.json --report build/conformance.html
	$(BIN)/lyra conform --backend torch-module --profile ci --examples 4 --only "not real" --json build/torch-module.json
	$(BIN)/lyra conform --backend jax-module --profile ci --examples 4 --only "not real" --json build/jax-module.json
	@if grep -q '"status": "vacuous"' build/conformance.json build/*-module.json; then echo 'a property of our own never met its premise'; exit 1; fi

test-harness faults mutants: export XLA_FLAGS := $(QUICK_XLA)
test-harness: $(INSTALLED)
	$(PYTEST) $(OTHER_TESTS)

test-models: $(INSTALLED)
	$(PYTEST) $(MODEL_TESTS)

# A word of a real model takes long enough without looking at every array's axes on the way.
test-real: export JAXTYPING_DISABLE := 1
test-real: $(INSTALLED)
	$(PYTEST) $(REAL_TESTS)

test-oldest: $(INSTALLED)  ## the PyTorch models with the oldest transformers that is supported
	oldest=$$($(BIN)/python -c 'from lyra.backends.torch_impl.versions import OLDEST; print(*OLDEST, 0, sep=".")') && \
	$(TARGET) build/transformers-oldest "transformers==$$oldest" && \
	export PYTHONPATH=$(CURDIR)/build/transformers-oldest && \
	$(BIN)/python -P -c "import transformers; assert transformers.__version__ == '$$oldest'" && \
	$(PYTEST) $(TRANSFORMERS_TESTS)

test-newest: $(INSTALLED)  ## the same with the newest 5.x, whatever constraints.txt says
	$(TARGET) build/transformers-newest 'transformers<6'
	PYTHONPATH=$(CURDIR)/build/transformers-newest $(PYTEST) $(TRANSFORMERS_TESTS)

lint: $(INSTALLED)  ## style, types of the public surface, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

schema: $(INSTALLED)  ## the published schemas, written again from the models
	$(BIN)/python -c 'from lyra.spec.schema import *; print(text(spec_schema()), end="")' > spec/schema.json
	$(BIN)/python -c 'from lyra.conformance.report.data import *; from lyra.spec.schema import text; \
		print(text(report_schema()), end="")' > conformance/report/schema.json

faults: $(INSTALLED)  ## every catalogued fault, injected into each backend: killed or survived
	$(BIN)/lyra faults --profile ci

mutants: $(INSTALLED)  ## every numeric module of both backends, one token changed at a time; hours
	$(PIP_INSTALL) '.[mutation]'
	$(BIN)/python bench/mutants.py --profile smoke

calibration: $(INSTALLED)  ## how far correct code is from the oracle, in σ: docs/calibration.md; half an hour
	mkdir -p build/calibration
	$(BIN)/lyra conform --profile thorough --json build/calibration/thorough.json
	$(BIN)/lyra conform --profile ci --only "real_weights or real_size" --json build/calibration/real.json
	$(BIN)/python bench/calibration.py build/calibration/thorough.json build/calibration/real.json

bench: $(INSTALLED)  ## what a context is worth on the real model, on both backends
	$(BIN)/python bench/context_value.py --backend torch
	$(BIN)/python bench/context_value.py --backend jax

performance: $(INSTALLED)  ## every row of the benchmark, and docs/performance.md with what it gave; a quarter of an hour
	mkdir -p build
	$(BIN)/lyra bench --json build/bench.json --page docs/performance.md

heads: $(INSTALLED)  ## which heads of the 270M a context is worth most to: the presets and docs/choosing.md; minutes
	$(BIN)/python bench/choose_heads.py --presets spec/presets --plot docs/images/heads.png

$(INSTALLED):
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP_INSTALL) '.[$(EXTRAS)]'
	rm -f .venv/.installed-*
	touch $@

clean:
	rm -rf .venv build .hypothesis .lyra
