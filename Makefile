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
	@echo 'make lint    ruff, mypy and the direction of imports'
	@echo 'make test    lint and every test, each in the environment it belongs to'
	@echo 'make clean   remove the demo and the caches; your models and the environments stay'

envs: $(VOCAB)/.built $(TRAIN)/.built

$(VOCAB)/.built: requirements-vocab.txt requirements-dev.txt
$(TRAIN)/.built: requirements-train.txt requirements-dev.txt

# The stamp is written last: an interrupted installation is started again.
.venv-%/.built:
	$(PYTHON) -m venv --clear .venv-$*
	.venv-$*/bin/python $(PIP_INSTALL) -r requirements-$*.txt -r requirements-dev.txt
	touch $@

# The demo keeps to its own folder: it touches nothing of a run of yours.
DEMO := demo
DEMO_CONTEXT ?= 孩子
# One document a piece, so that the first window of each begins where a completion does, at a document's beginning.
DEMO_TOKENS := --num_pieces 400 --min_length 50
DEMO_RECIPE := --epochs 10 --stride 63 --batch_size 16 --optimizer muon --embedding_init cooccurrence --lr 1.5e-2 --muon_lr 6e-3 \
	--warmup_steps 30
# Four hundred documents are so few that the model learns them by heart: it is fluent near the likeliest tokens only.
DEMO_SAMPLING := --temperature 0.7 --topp 0.9
MODEL ?= $(firstword $(wildcard model/final_model $(DEMO)/model/final_model) model/final_model)

demo: envs
	$(VOCAB)/bin/python build_trainfile.py --data_path data --output_path $(DEMO)/train.json
	$(VOCAB)/bin/python make-vocab.py --raw_data_path $(DEMO)/train.json --vocab_file $(DEMO)/vocab.txt \
		--vocab_size 4000 --model_config config/model_config_demo.json
	$(TRAIN)/bin/python make-tokenized.py --raw_data_path $(DEMO)/train.json --vocab_filename $(DEMO)/vocab.txt \
		--tokenized_data_path $(DEMO)/tokenized $(DEMO_TOKENS)
	$(TRAIN)/bin/python train.py --tokenized_data_path $(DEMO)/tokenized --vocab_file $(DEMO)/vocab.txt \
		--model_config config/model_config_demo.json $(DEMO_RECIPE) \
		--output_dir $(DEMO)/model --writer_dir $(DEMO)/tensorboard_summary --device cpu
	$(TRAIN)/bin/python generate.py --model_path $(DEMO)/model/final_model --prefix $(DEMO_CONTEXT) --nsamples 5 \
		$(DEMO_SAMPLING) --device cpu
	$(TRAIN)/bin/python examples/ask_server.py --model_path $(DEMO)/model/final_model --context $(DEMO_CONTEXT)

serve: envs
	$(TRAIN)/bin/python server.py --model_path $(MODEL)

lint: envs
	$(TRAIN)/bin/ruff check .
	$(TRAIN)/bin/ruff format --check .
	$(TRAIN)/bin/mypy
	$(TRAIN)/bin/lint-imports --no-logo

# tests/both runs in both environments, tests/vocab and tests/train each in its own.
test: lint
	$(VOCAB)/bin/python -m pytest tests/both tests/vocab
	$(TRAIN)/bin/python -m pytest tests/both tests/train

# Your own data, vocabulary, tokens and models stay.
clean:
	rm -rf $(DEMO) .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv-*' -prune -exec rm -rf {} +
