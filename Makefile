# The commands of the README. PYTHON is the interpreter the environment is made with, VENV where it goes, and
# GPU (cuda, metal, vulkan) what llama.cpp is built for; without it, for the CPU.
PYTHON ?= python3
VENV ?= .venv
GPU ?=
export VENV

.PHONY: help install personalize test check clean

help:
	@echo "make install       install only; GPU=cuda, metal or vulkan builds llama.cpp for that"
	@echo "make personalize   install, learn from examples/feedback.jsonl, answer three unseen questions"
	@echo "make test          everything that CI checks: format, lint, types, tests"
	@echo "make check         format, lint and types only"
	@echo "make clean         remove the environment and what the demo learnt"

install:
	@$(PYTHON) scripts/install.py "$(VENV)" default-base $(if $(GPU),--gpu=$(GPU))

personalize:
	@$(PYTHON) scripts/install.py "$(VENV)" default-base
	@scripts/personalize_demo

test:
	@$(PYTHON) scripts/install.py "$(VENV)" default-base onnx export test
	@scripts/test

check:
	@$(PYTHON) scripts/install.py "$(VENV)" default-base onnx export test
	@scripts/check

clean:
	rm -rf "$(VENV)" .cache
