# The KTO tools. `make help` lists the targets.
#
# Everything is built with one profile (release), so that build, test and demo share one set of objects.

.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c

CARGO ?= cargo
PYTHON ?= python3
MLX_PYTHON ?= $(PYTHON)
PREFIX ?= $(HOME)/.local
DESTDIR ?=
TOOLS := kto-convert kto-tokenize kto-quantize kto-train kto-eval kto-merge
CASES = $(notdir $(patsubst %/,%,$(dir $(wildcard testdata/trl/*/meta.json))))
VERSION = $(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -1)
REVISION = $(shell git describe --always --dirty --abbrev=12 --exclude='*' 2>/dev/null || echo unknown)
TRIPLE = $(shell rustc -vV | sed -n 's/^host: //p')
BIN := target/release
DIST := target/release-dist

.PHONY: help build demo test manners faults kill-test fault-test rewrite-test power-test gpu-kernels cuda check-cuda gpu-bundle gpu-rehearsal gpu-plans check fmt fmt-check lint deny golden peers bench bench-large bench-rewrite bench-kernels bench-memory bench-data doc man completions install dist clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: ## build the six tools into target/release
	$(CARGO) build --release --workspace --bins

demo: build ## train the embedded demo model with all six tools and show what changed (ten seconds after the build)
	scripts/demo

test: ## run every test
	$(CARGO) test --release --workspace

manners: build ## exit codes, streams, kill -9, configuration and start time of all six tools; the examples
	scripts/ci-manners
	scripts/ci-examples

faults: build ## the short forms of the next four
	@if command -v $(PYTHON) >/dev/null; then \
	  for test in kill-test fault-test rewrite-test power-test; do $(PYTHON) scripts/$$test --short; done; \
	else echo "SKIPPED faults: no $(PYTHON)"; fi

kill-test: build ## 100 training runs killed at random times, kills at every system call, full disks (RUNS=, JOBS=, SEED=)
	$(PYTHON) scripts/kill-test

fault-test: build ## every system call that writes fails once, for all six tools
	$(PYTHON) scripts/fault-test

rewrite-test: build ## kto-quantize and kto-merge killed at every system call and at random times, in every form (RUNS=, JOBS=, SEED=)
	$(PYTHON) scripts/rewrite-test

power-test: build ## the power fails at every system call of a run with three checkpoints
	$(PYTHON) scripts/power-test

gpu-kernels: ## compile every GPU kernel for CUDA and Metal, no GPU needed (PyPI, 150 MB the first time)
	scripts/gpu-kernels

cuda: ## kto-train for NVIDIA GPUs as target/cuda/kto-train, with a private nvcc from PyPI (not run on a GPU yet)
	@mkdir -p target/cuda
	@# Cargo puts it where the default build is, which comes back afterwards: the same objects serve both.
	@rm -f target/cuda/default; [ ! -e $(BIN)/kto-train ] || ln $(BIN)/kto-train target/cuda/default
	eval "$$(scripts/cuda-toolkit build)"; $(CARGO) build --release -p kto-train --features cuda
	@rm -f target/cuda/kto-train; cp $(BIN)/kto-train target/cuda/kto-train
	@[ ! -e target/cuda/default ] || mv -f target/cuda/default $(BIN)/kto-train

check-cuda: cuda ## lint and link the feature cuda, and start it without a driver
	eval "$$(scripts/cuda-toolkit build)"; $(CARGO) clippy --release -p kto-kernels -p kto-kernel-checks -p kto-model -p kto-train \
	  --features kto-train/cuda,kto-kernel-checks/cuda --all-targets -- -D warnings
	eval "$$(scripts/cuda-toolkit build)"; $(CARGO) test --release -p kto-kernel-checks --features cuda --test device --no-run
	scripts/gpu/no-driver

gpu-bundle: ## target/cuda/gpu-check, what scripts/gpu-check needs on a GPU machine without Rust: under 64 MB
	scripts/gpu-check bundle

gpu-rehearsal: gpu-bundle ## try gpu-check itself: every phase on the processor with tiny models, some minutes
	scripts/gpu-check run target/cuda/gpu-check target/cuda/rehearsal --rehearse --python $(PYTHON)

gpu-plans: build ## what kto-train plans to hold on a GPU for models of 7B to 32B; no GPU needed, some minutes
	$(PYTHON) scripts/gpu/plans
	$(PYTHON) scripts/bench/report.py

check: fmt-check lint doc test manners faults demo ## everything CI does but gpu-kernels and check-cuda

fmt: ## format the sources
	$(CARGO) fmt --all

fmt-check: ## fail if the sources are not formatted
	$(CARGO) fmt --all -- --check

lint: ## clippy, warnings are errors
	$(CARGO) clippy --release --workspace --all-targets -- -D warnings

deny: ## licences and doubled crates (needs cargo-deny)
	$(CARGO) deny check licenses bans sources

golden: ## check the fixtures against TRL and transformers (PYTHON=, versions: testdata/trl/README.md)
	$(PYTHON) scripts/oracle/trl_golden.py $(CASES)
	$(PYTHON) scripts/oracle/trl_float64.py $(filter-out llama_whole,$(CASES))
	$(PYTHON) scripts/oracle/stories260k_golden.py

peers: demo ## load what the demo made in PEFT, transformers and pyarrow; share a cache with huggingface_hub (PYTHON=)
	$(PYTHON) scripts/oracle/peers.py demo-out
	$(PYTHON) scripts/check-hub.py

bench-rewrite: build ## kto-quantize and kto-merge beside bitsandbytes, mlx-lm and PEFT on a 1B-shaped model: ten minutes, 8 GB under target/bench (PYTHON=, MLX_PYTHON= for mlx-lm)
	$(PYTHON) scripts/bench/rewrite.py --rounds 5 --mlx $(MLX_PYTHON) --save
	$(PYTHON) scripts/bench/report.py

bench: build ## our step and TRL's in turn, growth, kernels, memory; 45 minutes, an idle machine (PYTHON=, BENCHMARKS.md)
	$(PYTHON) scripts/bench/compare.py allocator paired-default paired-precomputed small-memory unshared
	$(PYTHON) scripts/bench/growth.py
	$(PYTHON) scripts/bench/kernels.py
	$(PYTHON) scripts/check-memory
	$(PYTHON) scripts/bench/report.py

bench-large: build ## random NF4 models of 7B and 14B shape: 40 minutes, 15 GB under target/bench (PYTHON=)
	$(PYTHON) scripts/bench/large.py nf4-7b nf4-14b
	$(PYTHON) scripts/bench/report.py

bench-memory: build ## predicted against measured peak memory of kto-train: ten minutes (PYTHON=)
	$(PYTHON) scripts/check-memory
	$(PYTHON) scripts/bench/report.py

bench-kernels: ## every kernel against its measured floor: a minute
	$(CARGO) bench -p kto-kernels --bench kernels

bench-data: build ## kto-convert beside jq and TRL, kto-tokenize beside datasets.map, memory on 10 GB: 10 minutes, an idle machine (PYTHON=)
	$(PYTHON) scripts/bench/data.py
	$(PYTHON) scripts/bench/report.py

doc: ## API documentation into target/doc
	RUSTDOCFLAGS="-D warnings -A rustdoc::private_intra_doc_links" $(CARGO) doc --release --workspace --no-deps

man: build ## man pages into target/man
	@mkdir -p target/man
	@for tool in $(TOOLS); do $(BIN)/$$tool --generate man > target/man/$$tool.1; done

completions: build ## bash, zsh and fish completions into target/completions
	@mkdir -p target/completions
	@for tool in $(TOOLS); do \
	  $(BIN)/$$tool --generate bash > target/completions/$$tool; \
	  $(BIN)/$$tool --generate zsh > target/completions/_$$tool; \
	  $(BIN)/$$tool --generate fish > target/completions/$$tool.fish; \
	done

install: export KTO_REVISION = $(REVISION)
install: man completions ## install tools, man pages and completions under PREFIX (default ~/.local)
	install -d $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(PREFIX)/share/man/man1 \
	  $(DESTDIR)$(PREFIX)/share/bash-completion/completions $(DESTDIR)$(PREFIX)/share/zsh/site-functions \
	  $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d
	for tool in $(TOOLS); do \
	  install -s -m 755 $(BIN)/$$tool $(DESTDIR)$(PREFIX)/bin/; \
	  install -m 644 target/man/$$tool.1 $(DESTDIR)$(PREFIX)/share/man/man1/; \
	  install -m 644 target/completions/$$tool $(DESTDIR)$(PREFIX)/share/bash-completion/completions/; \
	  install -m 644 target/completions/_$$tool $(DESTDIR)$(PREFIX)/share/zsh/site-functions/; \
	  install -m 644 target/completions/$$tool.fish $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/; \
	done

dist: export KTO_REVISION = $(REVISION)
dist: ## optimized, stripped tools as target/kto-tools-VERSION-TRIPLE.tar.gz
	$(CARGO) build --profile release-dist --workspace --bins
	scripts/ci-dist "$(DIST)" "kto-tools-$(VERSION)-$(TRIPLE)" $(TOOLS)

clean: ## remove what was built
	$(CARGO) clean
	rm -rf demo-out
