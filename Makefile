# Everything starts here: `make demo` and `make test` work from a fresh clone with python3 (3.11-3.13), venv and make.
# PYTHON=…  another interpreter            ARGS=…  passed on to what is run (make serve ARGS="--decode 2")

PYTHON ?= python3
ARGS ?=
# Most tests wait for timers and other processes: more of them at a time than there are cores.
TEST_PROCESSES ?= 3
DATA ?= ../shared/data
SHAREGPT := $(DATA)/workloads/sharegpt_distserve_opt_poisson16rps.csv.gz
A100 := $(DATA)/measured/distserve/profiler-a100-80g.distserve.json
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := __init__.py cluster decode_worker kernels kvtransfer prefill_worker router tests

# The bound in pyproject.toml, to try what is on disk first: a configured wheel folder (PIP_FIND_LINKS) may hold a CPU
# build, where the index would send gigabytes of CUDA. Without such a folder the try fails at once and nothing is lost.
TORCH := $(shell sed -n 's/^ *"\(torch[^"]*\)".*/\1/p' pyproject.toml)

# The GPU targets want torch, triton, pytest and hypothesis; the engine's files also what Tandem depends on.
GPU_PYTHON_VERSION ?= 3.12
GPU_WHEELS := $(wildcard gpu-wheels/*.whl)
GPU_PEER := $(if $(GPU_WHEELS),gpu-deps/flashinfer)
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))

.PHONY: test-gpu bench-gpu gpu-deps gpu-flashinfer fuzz peers peers-served help venv dev demo serve test soak faults paper lint fmt type proto clean

help:
	@echo "make demo    install, start a local cluster, answer a prompt, measure a short load, stop"
	@echo "make serve   the same cluster, staying up"
	@echo "make test    install with test tools, run the whole suite in TEST_PROCESSES=3 (ARGS=\"-k word tests/unit\")"
	@echo "make lint    ruff, import-linter, mypy"
	@echo "make soak    many requests while workers are killed: minutes"
	@echo "make faults  every fault at every state of the handoff, longer than in the suite: minutes"
	@echo "make paper   what the papers claim, measured with this engine (DATA=../shared/data): half an hour at most"
	@echo "make fuzz    every parser against made-up input, FUZZ_SECONDS=60 each (ARGS=\"--seconds 10 gguf yaml\")"
	@echo "make peers   ours beside vLLM, llama.cpp and transformers, which go to ~/.cache/tandem/peers: an hour"
	@echo "make peers-served   the rate that vLLM's server keeps, and ours: an hour"
	@echo "make test-gpu bench-gpu   kernels and engine on a GPU, with GPU_PYTHON=…: nine minutes (without: interpreted; nothing measured)"
	@echo "make fmt     format     make type  mypy     make proto  regenerate protobuf code     make clean"

venv: $(VENV)/.installed
dev: $(VENV)/.installed-dev

demo: venv
	$(BIN)/tandem demo $(ARGS)

serve: venv
	$(BIN)/tandem serve $(ARGS)

test: dev
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadgroup --no-loadscope-reorder $(ARGS)

# Long: 20,000 requests on the paced device, 1,000 on the real model, with cancellations and kills all the while.
soak: dev
	$(BIN)/python tests/soak/soak.py --requests 20000 $(ARGS)
	$(BIN)/python tests/soak/soak.py --requests 1000 --device cpu --kill-every-s 12 --concurrency 8 $(ARGS)

# Minutes each: claims of the papers that this engine is measured by; DATA names the folder of traces and profiles.
paper: dev
	$(BIN)/python -m pytest tests/paper
	$(BIN)/tandem bench replay --data $(DATA)/measured/distserve --ablate --costs
	$(BIN)/tandem bench kv-waste --dataset-path $(SHAREGPT)
	timeout 480 $(BIN)/tandem bench batching --dataset-path $(DATA)/workloads/azure2023_conv.csv.gz --profile $(A100)
	timeout 900 $(BIN)/tandem bench disaggregation --dataset-path $(SHAREGPT) --profile $(A100) --max-minutes 12 $(ARGS)

faults: dev
	TANDEM_FAULTS_SWEEP=1 $(BIN)/python -m pytest tests/faults $(ARGS)

# The peers' own environments are made outside the repository, the first time in a quarter of an hour.
peers: dev
	$(BIN)/python tests/peers/run.py $(ARGS)

peers-served: dev
	$(BIN)/python tests/peers/serve.py $(ARGS)

fuzz: dev
	@$(BIN)/python -c 'import atheris' 2>/dev/null || $(PIP) install --quiet -e '.[fuzz]' || \
	  echo "atheris cannot be installed here: inputs are drawn without a guide"
	$(BIN)/python tests/fuzz/run.py $(ARGS)

# Files of tests and benchmarks in processes of their own, four to five minutes each (ARGS="--only sampling"); what came
# of them goes to $OUT or gpu-results. In one call, failing tests do not keep benchmarks from running.
test-gpu: $(GPU_PEER)
	$(GPU_PYTHON) tests/gpu/run.py tests $(ARGS)

bench-gpu: $(GPU_PEER)
	$(GPU_PYTHON) tests/gpu/run.py bench $(ARGS)

# Ahead of the tests, beside which it compiles its kernels; without it, nothing is held against it.
gpu-deps/flashinfer: $(GPU_WHEELS)
	-$(GPU_PYTHON) -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target gpu-deps \
	  $(GPU_WHEELS) && touch $@

ifneq ($(filter bench-gpu,$(MAKECMDGOALS)),)
MAKEFLAGS += --keep-going
endif

# For a GPU machine that reaches no package index: what its Python lacks beside torch, triton and numpy, 45 MB in a folder
# that tests/gpu/run.py puts on the path.
gpu-deps: $(VENV)/.created
	$(PIP) install --quiet --upgrade --no-compile --target $@ --python-version $(GPU_PYTHON_VERSION) --only-binary=:all: \
	  --no-deps pytest iniconfig pluggy packaging pygments hypothesis sortedcontainers attrs \
	  gguf tqdm msgpack safetensors 'xxhash<5' pyyaml uvloop tokenizers 'grpcio<2' 'protobuf<7' typing_extensions httptools orjson \
	  grpcio-health-checking==1.74.0 grpcio-reflection==1.74.0 grpcio-status==1.74.0 googleapis-common-protos
	-find $@ -name '*.so' -exec strip --strip-unneeded {} +

# What kernels are held against, as wheels (17 MB, over 100 unpacked): `test-gpu` there unpacks them, and compiles them
# beside the tests, with the machine's nvcc and ninja: minutes.
gpu-flashinfer: $(VENV)/.created
	$(PIP) download --quiet --dest gpu-wheels --python-version $(GPU_PYTHON_VERSION) --implementation cp \
	  --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
	  --only-binary=:all: --no-deps flashinfer-python==0.6.13 'apache-tvm-ffi>=0.1.9,<0.2'

lint: dev .typing/tandem
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/lint-imports
	$(BIN)/mypy

fmt: dev
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

type: dev .typing/tandem
	$(BIN)/mypy

proto: dev
	$(BIN)/python -m tandem.cluster.proto.generate

clean:
	rm -rf $(VENV) .typing build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .fuzz gpu-deps gpu-wheels gpu-results

# mypy wants the folder above the files to be named like the package.
.typing/tandem:
	mkdir -p .typing && ln -sfn .. $@

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo "Tandem needs Python 3.11, 3.12 or 3.13; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." >&2; \
	  echo "Name another interpreter: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@echo "Creating $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "'$(PYTHON) -m venv' failed: on Debian and Ubuntu it is in the package python3-venv." >&2; exit 1; }
	@touch $@

$(VENV)/.installed: $(VENV)/.created pyproject.toml
	@echo "Installing Tandem into $(VENV): minutes on a fresh machine, torch and Ray are large"
	@$(PIP) install --quiet --no-index --no-deps "$(TORCH)" 2>/dev/null && echo "torch: from a wheel on disk" || true
	$(PIP) install --progress-bar on -e '.[all]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "Installing what tests and checks need"
	$(PIP) install --progress-bar on -e '.[dev]'
	@touch $@
