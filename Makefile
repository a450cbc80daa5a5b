# Everything a person or CI runs; `make help` lists it. Each target sets up what it needs.
PYTHON ?= python3
VOCAB := .venv-vocab
TRAIN := .venv-train
PIP_INSTALL := -m pip install --disable-pip-version-check --quiet

.DEFAULT_GOAL := help
.PHONY: help demo model serve envs format lint test-fast test test-pythons test-windows-like check-requirements check-vllm clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo 'PYTHON=python3.12 chooses the interpreter of new environments (3.10 to 3.13)'

# Each environment has two stamps: .built for what the scripts need, .built-dev for the tests and linters on top of it.
# A stamp is written last, so an interrupted installation starts again.
$(VOCAB)/.built: requirements-vocab.txt
$(TRAIN)/.built: requirements-train.txt

.venv-%/.built:
	$(PYTHON) -m venv --clear .venv-$*
	.venv-$*/bin/python $(PIP_INSTALL) -r requirements-$*.txt
	touch $@

.venv-%/.built-dev: .venv-%/.built requirements-dev.txt
	.venv-$*/bin/python $(PIP_INSTALL) -r requirements-$*.txt -r requirements-dev.txt
	touch $@

# The demo keeps to its own folder: it touches nothing of a run of yours.
DEMO := demo
DEMO_CONTEXT ?= 孩子
DEMO_TOKENS := --min_length 50
# Four hundred documents are memorised within three epochs unless the model learns from a trigram too and updates are small.
DEMO_RECIPE := --epochs 6 --stride 63 --batch_size 8 --optimizer muon --embedding_init cooccurrence --lr 1.5e-2 --muon_lr 6e-3 \
	--warmup_steps 30 --dropout 0.1 --weight_decay 0.5 --muon_weight_decay 1.5 --ngram_share 0.4 --shift_windows \
	--document_mask --patience 3 --report
# So small a model is fluent near the likeliest tokens only.
DEMO_SAMPLING := --temperature 0.7 --topp 0.9
MODEL ?= $(firstword $(wildcard model/best_model model/final_model $(DEMO)/model/best_model) model/final_model)

demo: $(VOCAB)/.built $(TRAIN)/.built ## the six stages on the shipped corpus, five completions and one POST
	$(VOCAB)/bin/python build_trainfile.py --data_path data --output_path $(DEMO)/train.json
	$(VOCAB)/bin/python make-vocab.py --raw_data_path $(DEMO)/train.json --vocab_file $(DEMO)/vocab.txt \
		--vocab_size 4000 --model_config config/model_config_demo.json --overwrite
	$(TRAIN)/bin/python make-tokenized.py --raw_data_path $(DEMO)/train.json --vocab_filename $(DEMO)/vocab.txt \
		--tokenized_data_path $(DEMO)/tokenized $(DEMO_TOKENS) --overwrite
	$(TRAIN)/bin/python train.py --tokenized_data_path $(DEMO)/tokenized --vocab_file $(DEMO)/vocab.txt \
		--model_config config/model_config_demo.json $(DEMO_RECIPE) \
		--output_dir $(DEMO)/model --writer_dir $(DEMO)/tensorboard_summary --device cpu --overwrite
	$(TRAIN)/bin/python generate.py --model_path $(DEMO)/model/best_model --prefix $(DEMO_CONTEXT) --nsamples 5 \
		$(DEMO_SAMPLING) --device cpu
	$(TRAIN)/bin/python examples/ask_server.py --model_path $(DEMO)/model/best_model --context $(DEMO_CONTEXT)
	@echo 'These 89,078 characters teach a model common words and the tone of an answer, no facts and no long thoughts.'
	@echo 'Some megabytes of your own give whole sentences: make model DATA=~/texts MINUTES=30'
	@echo 'The report of this run, with its curves and what is copied: $(DEMO)/model/report.html'

# make model DATA=folder MINUTES=30 [OUT=folder] [RESUME=1] [TOKENIZER=word] [DOCUMENT=file]; the minutes are those of all
# stages together.
MINUTES ?= 30
# A novel with headings has chapters, which are documents; other texts have one on each line.
DOCUMENT ?= auto
# In a short time BPE needs fewer bits per character than THULAC's words: docs/training.md has the figures. A folder that
# was begun with words goes on with them.
TOKENIZER ?= $(if $(wildcard $(OUT)/vocab.txt),word,bpe)
MODEL_VOCABULARY = $(OUT)/$(if $(filter bpe,$(TOKENIZER)),tokenizer.json,vocab.txt)
OUT ?= model_$(notdir $(patsubst %/,%,$(DATA)))

model: $(VOCAB)/.built $(TRAIN)/.built ## DATA=folder MINUTES=30: the best model of your texts that so many minutes allow
	@[ -n "$(DATA)" ] || { echo 'error: name your texts: make model DATA=~/texts MINUTES=30' >&2; exit 2; }
	@began=$$(date +%s) && set -x && \
	$(VOCAB)/bin/python build_trainfile.py --data_path "$(DATA)" --output_path "$(OUT)/train.json" --encoding auto \
		--document $(DOCUMENT) --deduplicate && \
	$(VOCAB)/bin/python make-vocab.py --raw_data_path "$(OUT)/train.json" --vocab_file "$(MODEL_VOCABULARY)" \
		--tokenizer $(TOKENIZER) --vocab_size auto --model_config config/model_config_mini.json && \
	$(TRAIN)/bin/python make-tokenized.py --raw_data_path "$(OUT)/train.json" \
		--vocab_filename "$(MODEL_VOCABULARY)" --tokenizer $(TOKENIZER) \
		--tokenized_data_path "$(OUT)/tokenized" --min_length 1 && \
	$(TRAIN)/bin/python train.py --minutes $(MINUTES) --minutes_from $$began --tokenized_data_path "$(OUT)/tokenized" \
		--vocab_file "$(MODEL_VOCABULARY)" --output_dir "$(OUT)/model" --writer_dir "$(OUT)/tensorboard_summary" \
		$(if $(RESUME),--resume)
	@echo 'complete texts:  $(TRAIN)/bin/python generate.py --model_path "$(OUT)/model/best_model" --prefix 你好'
	@echo 'serve:           make serve MODEL="$(OUT)/model/best_model"'

serve: $(TRAIN)/.built ## serve your model, or else the demo's, on http://127.0.0.1:5005
	$(TRAIN)/bin/python server.py --model_path $(MODEL)

envs: $(VOCAB)/.built-dev $(TRAIN)/.built-dev ## build both environments with the tools of the tests; again only when requirements change

format: $(TRAIN)/.built-dev ## format the code and sort the imports
	$(TRAIN)/bin/ruff check --fix .
	$(TRAIN)/bin/ruff format .

lint: $(TRAIN)/.built-dev ## ruff, mypy and the direction of imports
	$(TRAIN)/bin/ruff check .
	$(TRAIN)/bin/ruff format --check .
	$(TRAIN)/bin/mypy
	$(TRAIN)/bin/lint-imports --no-logo

# The quick modules of each wing.
FAST_VOCAB := $(addprefix tests/,both/test_artifacts.py both/test_compiled.py both/test_docs.py both/test_make_tokenized.py \
	both/text/test_word_tokenizer.py vocab/test_build_trainfile.py)
FAST_TRAIN := $(addprefix tests/train/,decoding/test_generate.py decoding/test_sampling.py serving/test_server_clients.py \
	training/test_attention.py training/test_loss.py training/test_muon.py)

test-fast: envs ## the quick tests of each wing, under a minute: before each commit
	$(VOCAB)/bin/python -m pytest -q $(FAST_VOCAB)
	$(TRAIN)/bin/python -m pytest -q $(FAST_TRAIN)

# tests/both runs in both environments, tests/vocab and tests/train each in its own.
test: envs lint ## lint and every test, each in the environment that it belongs to
	$(VOCAB)/bin/python -m pytest tests/both tests/vocab
	$(TRAIN)/bin/python -m pytest tests/both tests/train

# The wing text/ needs neither torch nor tensorflow, so its environments are small; everything else is byte-compiled.
TEXT_REQUIREMENTS := { grep -vE '^(tensorflow|keras)==' requirements-vocab.txt; grep -E '^(pytest|hypothesis)==' requirements-dev.txt; }

test-pythons: ## byte-compile everything and test the wing text/ with every Python of 3.10 to 3.13 found here
	@passed= failed=; for version in 3.10 3.11 3.12 3.13; do \
		for python in $$(pyenv root 2>/dev/null)/versions/$$version.*/bin/python $$(command -v python$$version); do \
			"$$python" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$$version')" 2>/dev/null && break; \
			python=; \
		done; \
		if [ -z "$$python" ]; then echo "Python $$version: not found"; continue; fi; \
		echo "Python $$version: $$python"; \
		folder=.venv-python$$version; \
		{ [ -f $$folder/.built ] && [ -z "$$(find requirements-*.txt -newer $$folder/.built)" ] || { \
			"$$python" -m venv --clear $$folder && \
			$(TEXT_REQUIREMENTS) >$$folder/requirements.txt && \
			$$folder/bin/python $(PIP_INSTALL) -r $$folder/requirements.txt && \
			touch $$folder/.built; \
		}; } && \
		PYTHONPYCACHEPREFIX=$$folder/pycache $$folder/bin/python -m compileall -q -f \
			$(wildcard *.py) gpt2_chinese tests benchmarks examples && \
		$$folder/bin/python -m pytest -q tests/both/text && passed="$$passed $$version" || failed="$$failed $$version"; \
	done; echo "passed:$${passed:- none}; failed:$${failed:- none}"; [ -n "$$passed" ] && [ -z "$$failed" ]

# What Windows lacks is taken away by tests/helpers/windows_like; the locale is made here where the system can. A test with a
# Korean file name is left out: Windows has such names whatever its locale, and here the locale of GBK has not.
AS_ON_WINDOWS := LOCPATH=$(CURDIR)/.locale LC_ALL=zh_CN.GBK PYTHONPATH=$(CURDIR)/tests/helpers/windows_like
WINDOWS_VOCAB := $(addprefix tests/,both/test_artifacts.py both/test_make_tokenized.py both/text/test_compressed.py \
	both/text/test_corpus.py vocab/test_build_trainfile.py)
WINDOWS_TRAIN := $(addprefix tests/train/,test_pipeline.py serving/test_server_layouts.py \
	decoding/test_process.py::test_every_kind_of_request_gets_the_result_of_an_engine_in_a_thread \
	training/test_resume.py::test_a_checkpoint_that_was_half_written_is_never_seen \
	training/test_resume.py::test_a_damaged_file_is_named_and_the_checkpoint_before_it_gone_on_from)

test-windows-like: envs ## the scripts' tests without fork, fcntl, open folders and other things that Windows lacks
	@mkdir -p .locale
	@[ -d .locale/zh_CN.GBK ] || localedef -f GBK -i zh_CN .locale/zh_CN.GBK 2>/dev/null || \
		echo 'no locale of GBK could be made here: the tests run with that of the system'
	$(AS_ON_WINDOWS) $(VOCAB)/bin/python -m pytest -q $(WINDOWS_VOCAB) -k 'not compat and not mistake and not layout and not no_console'
	$(AS_ON_WINDOWS) $(TRAIN)/bin/python -m pytest -q $(WINDOWS_TRAIN) -k 'not outlive'

PLATFORMS := x86_64-pc-windows-msvc aarch64-apple-darwin aarch64-unknown-linux-gnu

check-requirements: envs ## whether the requirements can be installed on Windows, macOS 14 and Linux on ARM (needs a network)
	@for platform in $(PLATFORMS); do for version in 3.10 3.11 3.12 3.13; do for name in train vocab; do \
		MACOSX_DEPLOYMENT_TARGET=14.0 $(TRAIN)/bin/uv pip compile --quiet --python-platform $$platform \
			--python-version $$version requirements-$$name.txt >/dev/null || \
			{ echo "requirements-$$name.txt cannot be installed on $$platform with Python $$version"; exit 1; }; \
	done; done; done; echo 'the requirements can be installed on: $(PLATFORMS)'

# vLLM in an environment of its own; its requirements say where torch's CPU build is found.
VLLM := .venv-vllm
CHARACTERS := $(DEMO)/characters
BESIDE_VLLM := $(TRAIN)/bin/python benchmarks/beside_vllm.py

$(VLLM)/.built: benchmarks/requirements-vllm.txt
	$(PYTHON) -m venv --clear $(VLLM)
	$(VLLM)/bin/python $(PIP_INSTALL) --no-deps -r $<
	touch $@

check-vllm: $(VOCAB)/.built $(TRAIN)/.built-dev $(VLLM)/.built ## models of words and characters in vLLM, our page with it, its load test of both servers
	@[ -f $(DEMO)/model/best_model/config.json ] || $(MAKE) demo
	$(VOCAB)/bin/python make-vocab.py --raw_data_path $(DEMO)/train.json --vocab_file $(CHARACTERS)/vocab.txt \
		--tokenizer char --overwrite
	$(TRAIN)/bin/python make-tokenized.py --raw_data_path $(DEMO)/train.json --vocab_filename $(CHARACTERS)/vocab.txt \
		--tokenizer char --tokenized_data_path $(CHARACTERS)/tokenized $(DEMO_TOKENS) --overwrite
	$(TRAIN)/bin/python train.py --tokenized_data_path $(CHARACTERS)/tokenized --vocab_file $(CHARACTERS)/vocab.txt \
		--model_config config/model_config_demo.json $(DEMO_RECIPE) --epochs 1 --output_dir $(CHARACTERS)/model \
		--writer_dir $(CHARACTERS)/tensorboard_summary --device cpu --overwrite
	$(BESIDE_VLLM) texts --model_path $(DEMO)/model/best_model
	$(BESIDE_VLLM) texts --model_path $(CHARACTERS)/model/final_model
	$(BESIDE_VLLM) load --model_path $(DEMO)/model/best_model
	$(BESIDE_VLLM) page --model_path $(DEMO)/model/best_model

clean: ## remove the demo and the caches; your data, models and environments stay
	rm -rf $(DEMO) .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv-*' -prune -exec rm -rf {} +
