# Everything a fresh machine needs is installed by these targets, into .venv and .venv-mindspore.
PYTHON ?= python3
VENV := .venv
MANIDP := $(VENV)/bin/manidp
TRAIN := $(MANIDP) train --data cifar10 --resume

FIRST ?= 0
MUTANTS ?= 20000
TORCH ?= 2.11.0
OTHER ?= python3.13
CORE := $(addprefix tests/test_,checkpoint.py ckpt.py engine.py files.py graph.py hub.py images.py macs.py reference.py \
	static.py terminal.py)

.PHONY: help run test check load api screenshot fuzz data model cards table figure support score zoo test-mindspore test-torch test-python test-ray clean

help:  ## Show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

run: $(VENV)/.base  ## Classify bundled CIFAR-10 test images, then compare with the dense network
	$(MANIDP) classify
	$(MANIDP) evaluate --beside dense-res20

test: check  ## Set up, check and run every test
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile
	$(MAKE) test-mindspore

check: $(VENV)/.dev  ## Formatting, lint, types, layers
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

data: $(VENV)/.base  ## Bring CIFAR-10 into ./cifar10 and verify it
	$(MANIDP) data cifar10

model: FIRST_DENSE = models/dense-res20/first.safetensors
model: $(VENV)/.dev data  ## Train both bundled models again (hours; goes on where it stopped)
	$(TRAIN) --out runs/dense-res20-first --recipe models/dense-res20/recipe.toml
	cp runs/dense-res20-first/model.safetensors models/dense-res20/first.safetensors
	cp runs/dense-res20-first/log.jsonl models/dense-res20/log.jsonl
	$(TRAIN) --out runs/manidp-res20-first --recipe models/manidp-res20/recipe.toml \
		--from $(FIRST_DENSE) --gates --teacher $(FIRST_DENSE)
	cp runs/manidp-res20-first/model.safetensors runs/manidp-res20-first.safetensors
	$(TRAIN) --out runs/manidp-res20-second --recipe models/manidp-res20/second.toml \
		--from runs/manidp-res20-first.safetensors --teacher runs/manidp-res20-first.safetensors --teacher $(FIRST_DENSE)
	cp runs/manidp-res20-second/model.safetensors runs/manidp-res20-second.safetensors
	$(TRAIN) --out runs/resnet-20x2-first --recipe models/resnet-20x2/recipe.toml \
		--network resnet-20x2
	$(TRAIN) --out runs/resnet-20x2-second --recipe models/resnet-20x2/second.toml \
		--from runs/resnet-20x2-first/model.safetensors
	$(TRAIN) --out runs/resnet-20x2-third --recipe models/resnet-20x2/third.toml \
		--from runs/resnet-20x2-second/model.safetensors
	cp runs/resnet-20x2-third/model.safetensors runs/resnet-20x2.safetensors
	$(TRAIN) --out runs/manidp-res20 --recipe models/manidp-res20/third.toml \
		--from runs/manidp-res20-second.safetensors --teacher runs/resnet-20x2.safetensors --teacher $(FIRST_DENSE)
	$(TRAIN) --out runs/dense-res20 --recipe models/dense-res20/second.toml \
		--from $(FIRST_DENSE) --teacher runs/resnet-20x2.safetensors
	cp runs/resnet-20x2.safetensors models/resnet-20x2/model.safetensors
	cp runs/manidp-res20/model.safetensors src/manidp/data/manidp-res20.safetensors
	cp runs/dense-res20/model.safetensors src/manidp/data/dense-res20.safetensors
	cp runs/dense-res20/log.jsonl models/dense-res20/second.jsonl
	cp runs/resnet-20x2-first/log.jsonl models/resnet-20x2/log.jsonl
	cp runs/resnet-20x2-second/log.jsonl models/resnet-20x2/second.jsonl
	cp runs/resnet-20x2-third/log.jsonl models/resnet-20x2/third.jsonl
	cp runs/manidp-res20-first/log.jsonl models/manidp-res20/log.jsonl
	cp runs/manidp-res20-second/log.jsonl models/manidp-res20/second.jsonl
	cp runs/manidp-res20/log.jsonl models/manidp-res20/third.jsonl
	$(MAKE) cards

cards: $(VENV)/.base  ## Write the bundled card of our own model, and its digests, from the bundled checkpoint
	$(VENV)/bin/python models/make_cards.py

table: $(VENV)/.dev data  ## Measure beside other runtimes on all test images; write the README's table (25 minutes, machine idle)
	mkdir -p build
	$(MANIDP) freeze models/static-res20/model.safetensors --no-statistics -o build/static-res20.safetensors
	$(MANIDP) bench --data cifar10 --dense dense-res20 --dense build/static-res20.safetensors \
		--rounds 7 --growth --out benchmarks/bench.json --plot docs/speed.png
	$(VENV)/bin/python benchmarks/render_readme.py

figure: $(VENV)/.dev data  ## Draw the README's picture from the bundled model and all test images
	mkdir -p build
	$(MANIDP) report build/report.html --data cifar10 --overview docs/overview.png

$(VENV)/.base: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.base
	$(VENV)/bin/python -m pip install --quiet torch==2.13.0
	$(VENV)/bin/python -m pip install --quiet --editable '.[torch,bench,dev]'
	touch $@

support: $(VENV)/.dev .venv-mindspore/.ready  ## Write docs/support.md, which backend runs which op, from what they do
	PYTHONPATH=tests $(VENV)/bin/python -m conformance.support
	PYTHONPATH=tests .venv-mindspore/bin/python -m conformance.support

fuzz: $(VENV)/.dev  ## Try many more mutants of every kind of file than the tests do: FIRST=0 MUTANTS=20000
	PYTHONPATH=tests nice $(VENV)/bin/python -m hostile.campaign $(FIRST) $(MUTANTS)

load: $(VENV)/.dev data  ## Our server beside the same server around ONNX Runtime, under load that does not wait (4 minutes, machine idle)
	$(VENV)/bin/python benchmarks/load.py --out benchmarks/load.json
	$(VENV)/bin/python benchmarks/render_load.py

api: $(VENV)/.dev  ## Try the server's description against the server, with schemathesis
	$(VENV)/bin/python -m pip install --quiet 'schemathesis>=4'
	set -e; $(MANIDP) serve --port 8765 --no-log & server=$$!; trap 'kill $$server' EXIT; \
	until curl --silent --fail http://127.0.0.1:8765/v2/health/ready; do sleep 1; kill -0 $$server; done; \
	$(VENV)/bin/schemathesis run http://127.0.0.1:8765/openapi.json

screenshot: $(VENV)/.dev  ## Take the README's picture of the server's page; needs Debian's chromium
	$(VENV)/bin/python docs/make_screenshot.py

test-mindspore: .venv-mindspore/.ready  ## The tests that need MindSpore, in its own environment (numpy < 2)
	.venv-mindspore/bin/python -m pytest tests/with_mindspore tests/training

.venv-mindspore/.ready: pyproject.toml
	$(PYTHON) -m venv .venv-mindspore
	.venv-mindspore/bin/python -m pip install --quiet --editable '.[mindspore]' 'pytest>=9'
	touch $@

test-torch:  ## The tests of torch and ONNX with another torch: TORCH=2.11.0
	$(PYTHON) -m venv .venv-torch
	.venv-torch/bin/python -m pip install --quiet torch==$(TORCH)
	.venv-torch/bin/python -m pip install --quiet --editable '.[torch,onnx,plots]' 'pytest>=9' 'hypothesis>=6.120'
	.venv-torch/bin/python -m pytest tests/with_torch tests/training tests/test_onnx.py

score: $(VENV)/.dev data  ## Images a second of `manidp score` beside a DataLoader with ONNX Runtime (machine idle)
	$(VENV)/bin/python benchmarks/score.py

zoo: $(VENV)/.dev  ## The engine beside ONNX Runtime on well-known networks; ONLY=mobilenet-v2: one; GATED=1: at half, too (5 minutes, machine idle)
	PYTHONPATH=tests/with_torch $(VENV)/bin/python benchmarks/dense_zoo.py $(ONLY) $(if $(GATED),--gated) --out build/zoo.json

test-ray: $(VENV)/.dev  ## Test `manidp score --ray` on Ray's workers on this machine
	$(VENV)/bin/python -m pip install --quiet --editable '.[score,ray]'
	MANIDP_TEST_RAY=1 $(VENV)/bin/python -m pytest tests/with_ray

test-python:  ## What needs no framework, with another Python: OTHER=python3.13
	$(OTHER) -m venv .venv-python
	.venv-python/bin/python -m pip install --quiet --editable . 'pytest>=9' 'hypothesis>=6.120'
	.venv-python/bin/python -m pytest $(CORE)

clean:  ## Remove the environments and caches
	rm -rf $(VENV) .venv-mindspore .venv-torch .venv-python .mypy_cache .ruff_cache .pytest_cache .hypothesis
