# make demo   sets up, trains a small SiT on handwritten digits, writes a picture of samples, prints metrics
# make test   sets up and runs the tests
# Both need Python 3.10 or newer and make, and put everything they install into .venv.

PYTHON ?= python3
VENV := .venv
DEMO := results/digits-$(shell date +%Y%m%d-%H%M%S)

.PHONY: demo test setup

demo: setup
	$(VENV)/bin/python train.py --config configs/digits.yaml --output-dir $(DEMO)
	$(VENV)/bin/python demo.py --ckpt $(DEMO)

test: setup
	$(VENV)/bin/python -m pytest

setup: $(VENV)/installed

# The stamp is written last: after an interruption, make installs again.
$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet --requirement requirements.txt
	touch $@
