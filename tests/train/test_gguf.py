"""GGUF files of the three tokenizers complete in llama.cpp as the model folder does here."""

from __future__ import annotations

import json
import random
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from layouts import CHARACTERS, write_layout
from whole_tokens import greedy_without, partial_tokens

from gpt2_chinese import gguf as export
from gpt2_chinese.decoding.engine import Engine
from gpt2_chinese.model_folder import load_weights

pytest.importorskip("tokenizers")
pytest.importorskip("gguf")
xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp is not installed")


class LlamaServer:
    """llama.cpp's server on a GGUF file."""

    def __init__(self, file: Path) -> None:
        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        params.n_ctx, params.n_parallel, params.warmup = 32, 1, False
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.hostnames, params.port = ["127.0.0.1"], 0
        self.server = xllamacpp.Server(params)

    def post(self, path: str, fields: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            f"{self.server.listening_address}{path}", json.dumps(fields).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            answer = json.load(response)
        assert isinstance(answer, dict)
        return answer


def chinese_of(text: str) -> list[str]:
    return [character for character in text if "一" <= character <= "鿿"]


@pytest.mark.parametrize("layout", ["book", "uer", "bpe"])
def test_greedy_ids_are_those_of_the_model_folder(tmp_path, layout):
    folder = write_layout(tmp_path / layout, layout)
    export.main([str(folder), str(tmp_path / "model.gguf")])
    llama = LlamaServer(tmp_path / "model.gguf")
    model, tokenizer = load_weights(folder)
    partial = partial_tokens(tokenizer)
    source = random.Random(1)
    with Engine(model, tokenizer, max_num_seqs=4, precision="fp32") as engine:
        for _ in range(20):
            text = "".join(source.choices(CHARACTERS, k=source.randint(1, 8)))
            prompt = engine.prompt(text, 12)
            request = engine.submit(prompt, samples=1, length=12, sampling_params=greedy_without(partial))
            ours = list(request.future.result(60)[0].ids)
            fields = {
                "prompt": list(prompt.ids), "n_predict": 12, "temperature": 0, "return_tokens": True,
                "logit_bias": [[id_, False] for id_ in (*tokenizer.marks.never_produced, *partial)],
                "cache_prompt": False,
            }  # fmt: skip
            answer = llama.post("/completion", fields)
            theirs = answer["tokens"]
            if theirs and theirs[-1] == tokenizer.marks.end:
                theirs.pop()
            assert theirs == ours
            if layout == "book":  # llama.cpp has no tokenizer for words, but it joins them to text
                assert chinese_of(answer["content"]) == chinese_of(tokenizer.decode(ours))
            else:
                assert llama.post("/tokenize", {"content": text})["tokens"] == tokenizer.encode(text)


# Rows of 48 are no whole blocks of q8_0, those of 192 are.
@pytest.mark.parametrize(("type_", "share"), [("f16", 0.7), ("bf16", 0.7), ("q8_0", 0.85)])
def test_matrices_in_fewer_bits_take_less_room(tmp_path, type_, share):
    folder = write_layout(tmp_path / "uer", "uer")
    for name in ("f32", type_):
        export.main([str(folder), str(tmp_path / name), "--type", name])
    assert (tmp_path / type_).stat().st_size < share * (tmp_path / "f32").stat().st_size
    fields = {"prompt": [101, 105], "n_predict": 3, "temperature": 0, "return_tokens": True}
    assert LlamaServer(tmp_path / type_).post("/completion", fields)["tokens"]


def test_a_folder_that_llama_cpp_would_compute_otherwise_is_refused(tmp_path):
    folder = write_layout(tmp_path / "uer", "uer")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"activation_function": "relu"}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"uer.*relu"):
        export.write_gguf(folder, tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()
