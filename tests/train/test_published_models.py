"""The commands of docs/published-models.md, on a tiny folder of the layout that the hub has."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from pathlib import Path

from layouts import write_layout

import generate
import train

ROOT = Path(__file__).resolve().parents[2]


def load_script(name: str):
    spec = importlib.util.spec_from_file_location(name.replace("-", "_").removesuffix(".py"), ROOT / name)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_published_model_completes_is_trained_on_and_completes_again(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_layout(Path("checkpoint"), "uer")
    Path("data").mkdir()
    texts = ["病人高血压，我们要他少吃盐，多喝水。" * 8 + "我们好用" * (number % 5) for number in range(40)]
    Path("data/train.json").write_text(json.dumps(texts, ensure_ascii=False), encoding="utf-8")

    page = (ROOT / "docs" / "published-models.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"## Complete, train, serve\n\n```bash\n(.*?)```", page, re.DOTALL)
    commands = [shlex.split(line)[1:] for line in block.splitlines()]
    assert [command[0] for command in commands][-1] == "server.py", "tests/train/serving serves such folders"
    capsys.readouterr()
    for script, *flags in commands[:-1]:
        if script == "make-tokenized.py":
            assert not load_script(script).main(flags)
            assert "characters" in capsys.readouterr().out
        elif script == "train.py":
            assert train.main([*flags, "--device", "cpu"]) == 0
            printed = capsys.readouterr().out
            assert "--lr=5e-05" in printed and "model_new/best_model" in printed
        else:
            assert not generate.main([*flags, "--device", "cpu"])
            samples = re.findall(r"=+ SAMPLE \d =+\n(.*)", capsys.readouterr().out)
            assert len(samples) == 3 and all(sample.startswith("你好") for sample in samples)
