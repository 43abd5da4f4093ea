# make demo   sets up, trains a small SiT on handwritten digits, writes a picture of samples, prints metrics
# make test   sets up and runs the tests
# Both need Python 3.10 or newer and make, and put everything they install into .venv.
#
# make test-lower-bounds PYTHON=python3.10
#             runs the tests with the oldest versions that requirements.txt allows, in .venv-lower-bounds

PYTHON ?= python3
VENV := .venv
DEMO := results/digits-$(shell date +%Y%m%d-%H%M%S)
LOWEST := .venv-lower-bounds
# Up to four tests at a time, one to a processor. Threads of one that wait for each other would take time from the rest.
PYTEST := -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal
test test-lower-bounds: export OMP_NUM_THREADS = 1

.PHONY: demo test test-lower-bounds setup

demo: setup
	$(VENV)/bin/python train.py --config configs/digits.yaml --output-dir $(DEMO)
	$(VENV)/bin/python demo.py --ckpt $(DEMO)

test: setup
	$(VENV)/bin/python $(PYTEST)

test-lower-bounds: $(LOWEST)/installed
	$(LOWEST)/bin/python $(PYTEST)

setup: $(VENV)/installed

# The stamp is written last: after an interruption, make installs again.
$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet --requirement requirements.txt
	touch $@

$(LOWEST)/installed: requirements.txt
	$(PYTHON) -m venv --clear $(LOWEST)
	sed -E 's/>=([^,]+),.*/==\1/' requirements.txt > $(LOWEST)/requirements.txt
	$(LOWEST)/bin/python -m pip install --quiet --requirement $(LOWEST)/requirements.txt
	touch $@
