"""Stages 2 and 3 on a Dask cluster give the same bytes as on this machine's own processes."""

from __future__ import annotations

import json
import sys
import warnings

import pytest
from distributed import LocalCluster

from gpt2_chinese.artifacts import sha256_of
from gpt2_chinese.parallel import open_workers
from gpt2_chinese.text.preparation import batches, count_batch, fold_counts

DOCUMENTS = [
    f"感冒了怎么办？多喝热水，好好休息，一般{n % 9}天左右就会好。体温38.{n}℃以上要去医院。" for n in range(400)
]


@pytest.fixture(scope="module")
def scheduler():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # distributed's own, about ports and closing
        with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
            yield cluster.scheduler_address


@pytest.mark.filterwarnings("default")
def test_pieces_and_manifest_are_the_same(script, scheduler, tmp_path):
    (tmp_path / "train.json").write_text(json.dumps(DOCUMENTS, ensure_ascii=False), encoding="utf-8")
    vocabulary = "".join(
        f"{t}\n" for t in ["[SEP]", "[CLS]", "[MASK]", "[PAD]", "[UNK]", "感冒", "多", "喝", "##.", "3"]
    )
    (tmp_path / "vocab.txt").write_text(vocabulary, encoding="utf-8")
    flags = ["--raw_data_path", f"{tmp_path}/train.json", "--vocab_filename", f"{tmp_path}/vocab.txt", "--allow_unk"]
    flags += ["--min_length", "20", "--num_pieces", "7"]
    for name, where in (("local", []), ("dask", ["--scheduler", scheduler])):
        script("make-tokenized").main([*flags, "--tokenized_data_path", f"{tmp_path}/{name}", *where])
    files = sorted(path.name for path in (tmp_path / "local").iterdir())
    assert len(files) == 9
    for name in files:
        assert sha256_of(tmp_path / "dask" / name) == sha256_of(tmp_path / "local" / name), name


@pytest.mark.filterwarnings("default")
def test_counts_are_the_same(scheduler, monkeypatch):
    monkeypatch.setattr("gpt2_chinese.text.preparation.BATCH_CHARACTERS", 2000)
    results = []
    for workers, address in ((1, None), (2, scheduler)):
        with open_workers(workers, address) as map_in_order:
            results.append(list(fold_counts(map_in_order(count_batch, batches(DOCUMENTS))).items()))
    assert len(results[0]) > 20
    assert results[0] == results[1]


@pytest.mark.filterwarnings("default")
@pytest.mark.skipif("vocab" not in sys.prefix, reason="make-vocab.py runs in the vocabulary environment")
@pytest.mark.parametrize("compat", [[], ["--compat"]])
def test_vocabulary_is_the_same(script, scheduler, tmp_path, compat):
    (tmp_path / "train.json").write_text(json.dumps(DOCUMENTS, ensure_ascii=False), encoding="utf-8")
    for name, where in (("local", []), ("dask", ["--scheduler", scheduler])):
        flags = ["--raw_data_path", f"{tmp_path}/train.json", "--vocab_file", f"{tmp_path}/{name}.txt"]
        script("make-vocab").main([*flags, *where, *compat])
    assert (tmp_path / "dask.txt").read_bytes() == (tmp_path / "local.txt").read_bytes()
