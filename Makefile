# Everything a person or CI runs. `make demo` and `make test` set up what they need.
PYTHON ?= python3
VOCAB := .venv-vocab
TRAIN := .venv-train
PIP_INSTALL := -m pip install --disable-pip-version-check --quiet

.PHONY: help envs demo serve lint test clean

help:
	@echo 'make envs    build $(VOCAB) and $(TRAIN), again only when a requirements file changed'
	@echo 'make demo    the six stages on the shipped corpus, five completions and one POST'
	@echo 'make serve   serve the demo model on http://127.0.0.1:5005'
	@echo 'make lint    ruff and mypy'
	@echo 'make test    lint and every test, each in the environment it belongs to'
	@echo 'make clean   remove what the stages and the tests wrote; the environments stay'

envs: $(VOCAB)/.built $(TRAIN)/.built

$(VOCAB)/.built: requirements-vocab.txt requirements-dev.txt
$(TRAIN)/.built: requirements-train.txt requirements-dev.txt

# The stamp is written last: an interrupted installation is started again.
.venv-%/.built:
	$(PYTHON) -m venv --clear .venv-$*
	.venv-$*/bin/python $(PIP_INSTALL) -r requirements-$*.txt -r requirements-dev.txt
	touch $@
