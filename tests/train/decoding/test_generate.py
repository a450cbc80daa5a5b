"""generate.py, called in process with a tiny model folder."""

from __future__ import annotations

import re
from queue import SimpleQueue

import pytest
from tiny_model import save_tiny_model

from gpt2_chinese.decoding.completion import TextDelta

HEADER = "=" * 40 + " SAMPLE {} " + "=" * 40


@pytest.fixture(scope="module")
def generate(script):
    return script("generate")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(save_tiny_model(tmp_path_factory.mktemp("model") / "final_model"))


def typed(monkeypatch, *lines: str) -> None:
    """Let `input()` return these lines, then raise EOFError."""
    answers = iter(lines)

    def answer(prompt: str = "") -> str:
        try:
            return next(answers)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", answer)


def test_interactive_use_prints_five_completions_until_an_empty_line(generate, folder, monkeypatch, capsys):
    typed(monkeypatch, "一丁", "hello", "", "never asked")
    assert generate.main(["--model_path", folder]) is None
    out, err = capsys.readouterr()
    assert "--topk=30" in err and "--length=50" in err
    numbers = [line[:1] for line in out.splitlines() if re.match(r"\d  (一丁|hello)", line)]
    assert numbers == list("1234512345")
    assert "never asked" not in out


def test_interactive_use_ends_at_the_end_of_the_input(generate, folder, monkeypatch, capsys):
    typed(monkeypatch, "一丁")
    assert generate.main(["--model_path", folder, "--nsamples", "1", "--length", "3"]) is None
    assert "1  一丁" in capsys.readouterr().out


def test_interactive_use_continues_after_a_text_that_is_not_valid(generate, folder, monkeypatch, capsys):
    typed(monkeypatch, "\udce4", "一丁", "")
    generate.main(["--model_path", folder, "--nsamples", "1", "--length", "3"])
    captured = capsys.readouterr()
    assert "surrogate" in captured.err and "1  一丁" in captured.out


def test_the_same_text_twice_gets_other_completions_and_a_seed_repeats_the_session(
    generate, folder, monkeypatch, capsys
):
    def session() -> list[str]:
        typed(monkeypatch, "一丁", "一丁", "")
        generate.main(["--model_path", folder, "--seed", "3", "--length", "12"])
        return [line for line in capsys.readouterr().out.splitlines() if re.match(r"\d  ", line)]

    lines = session()
    assert lines[:5] != lines[5:]
    assert session() == lines


def test_interactive_use_prints_deltas_as_they_come_one_sample_after_the_other(generate, capsys):
    deltas = SimpleQueue()
    printed = []
    get = deltas.get

    class Watched:
        """Records what was printed before each wait for a delta."""

        def get(self):
            printed.append(capsys.readouterr().out)
            return get()

    for sample, text, reason in [(1, "丙", None), (0, "甲", None), (1, "丁", "stop"), (0, "乙", "length")]:
        deltas.put(TextDelta(sample, text, (), reason))
    deltas.put(None)
    generate.print_deltas("一", Watched(), 2)
    assert printed == ["1  一", "", "甲", ""]
    assert capsys.readouterr().out == "乙\n2  一丙丁\n"


def test_interactive_use_and_prefix_give_the_same_completions(generate, folder, monkeypatch, capsys):
    flags = ["--model_path", folder, "--seed", "3", "--length", "12"]
    typed(monkeypatch, "一丁", "")
    generate.main(flags)
    streamed = re.findall(r"^\d  (.*)$", capsys.readouterr().out, re.MULTILINE)
    generate.main([*flags, "--prefix", "一丁"])
    assert re.findall(r"=\n(.*)\n", capsys.readouterr().out) == streamed


def test_prefix_saves_what_it_prints(generate, folder, tmp_path, capsys):
    (tmp_path / "samples.txt").write_text("old", encoding="utf-8")
    flags = ["--prefix", "一丁", "--nsamples", "3", "--length", "6", "--topk", "8", "--topp", "0.9"]
    flags += ["--temperature", "0.8", "--repetition_penalty", "1.1", "--device", "cpu"]
    flags += ["--save_samples", "--save_samples_path", str(tmp_path)]
    generate.main(["--model_path", folder, *flags])
    out = capsys.readouterr().out
    saved = (tmp_path / "samples.txt").read_text(encoding="utf-8")
    for number in (1, 2, 3):
        assert f"{HEADER.format(number)}\n一丁" in saved
        assert saved.split(HEADER.format(number) + "\n")[1].splitlines()[0] in out
    assert "old" not in saved
    assert f"3 samples written to {tmp_path / 'samples.txt'}" in out


@pytest.mark.parametrize("way", ["flag", "file"])
def test_titles_become_articles_named_as_in_gpt2_chinese(way, generate, folder, tmp_path, capsys):
    titles = ["--titles", "一丁 丈"]
    if way == "file":
        (tmp_path / "titles.txt").write_text("一丁\n\n丈\n", encoding="utf-8")
        titles = ["--titles_file", str(tmp_path / "titles.txt")]
    flags = ["--articles_per_title", "2", "--save_path", str(tmp_path / "out"), "--length", "4", "--seed", "1"]
    generate.main(["--model_path", folder, *titles, *flags])
    articles = {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "out").iterdir()}
    assert sorted(articles) == ["0-0.txt", "0-1.txt", "1-0.txt", "1-1.txt"]
    for name, title in {"0-0.txt": "一丁", "0-1.txt": "一丁", "1-0.txt": "丈", "1-1.txt": "丈"}.items():
        assert articles[name].startswith(f"{title}\n{title}")
    assert articles["0-0.txt"] != articles["0-1.txt"]
    assert "4 articles" in capsys.readouterr().out


def test_titles_that_say_nothing_are_refused(generate, folder, tmp_path):
    (tmp_path / "titles.txt").write_text("\n \n", encoding="utf-8")
    with pytest.raises(ValueError, match="no title"):
        generate.main(["--model_path", folder, "--titles_file", str(tmp_path / "titles.txt")])
    with pytest.raises(ValueError, match="leave one out"):
        generate.main(["--model_path", folder, "--titles", "一", "--titles_file", "titles.txt"])


def test_flags_of_gpt2_chinese_that_change_nothing_say_so(generate, folder, capsys):
    flags = ["--fast_pattern", "--model_config", "config/model_config_small.json", "--no_wordpiece"]
    generate.main(["--model_path", folder, "--prefix", "一", "--nsamples", "1", "--length", "2", *flags])
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert [note.split()[1] for note in notes] == ["--model_config", "--fast_pattern", "--no_wordpiece"]


def test_no_file_is_written_without_the_flag(generate, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    generate.main(["--model_path", folder, "--prefix", "一", "--nsamples", "1", "--length", "2"])
    assert list(tmp_path.iterdir()) == []


def test_small_batches_give_the_same_samples(generate, folder, capsys):
    flags = ["--model_path", folder, "--prefix", "一丁", "--nsamples", "7", "--length", "9", "--seed", "1"]

    def samples(*more: str) -> str:
        generate.main([*flags, *more])
        return capsys.readouterr().out.partition("\n")[2]

    assert samples("--batch_size", "2") == samples()


def test_length_minus_one_is_the_models_n_ctx(generate, folder, capsys, monkeypatch):
    lengths = []
    complete = generate.complete
    monkeypatch.setattr(
        generate, "complete", lambda e, c, n, *rest, **more: lengths.append(n) or complete(e, c, n, *rest, **more)
    )
    generate.main(["--model_path", folder, "--prefix", "一", "--nsamples", "1", "--length", "-1"])
    assert lengths == [32]


def test_flags_beyond_what_the_model_has_are_noted_once(generate, folder, capsys):
    flags = ["--model_path", folder, "--prefix", "一", "--nsamples", "2"]
    generate.main([*flags, "--length", "40", "--topk", "9000"])
    noted = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note:")]
    assert [note.split(" is ")[0] for note in noted] == ["note: --length 40", "note: --topk 9000"]
    assert "n_ctx of 32 tokens" in noted[0] and "the same as --topk 0" in noted[1]
    generate.main([*flags, "--length", "-1", "--topk", "30"])
    assert "note: --" not in capsys.readouterr().err


def test_a_context_that_is_truncated_is_reported(generate, folder, capsys):
    generate.main(["--model_path", folder, "--prefix", "一" * 100, "--nsamples", "1", "--length", "4"])
    captured = capsys.readouterr()
    assert "longer than the model's 32 tokens; its first 73 were cut off" in captured.err
    assert "一" * 100 in captured.out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--length", "0"], "--length must be 1 or more, or -1"),
        (["--nsamples", "0"], "--nsamples must be 1 or more, it is 0"),
        (["--batch_size", "-2"], "--batch_size must be 1 or more, it is -2"),
        (["--temperature", "-1"], "--temperature must be from 0 to 10, it is -1.0"),
        (["--temperature", "nan"], "--temperature must be from 0 to 10, it is nan"),
        (["--topk", "-1"], "--topk must be from 0"),
        (["--topp", "1.5"], "--topp must be from 0 to 1, it is 1.5"),
        (["--repetition_penalty", "0"], "--repetition_penalty must be from 0.1 to 10"),
        (["--seed", str(2**64)], "--seed must be from"),
        (["--device", "tpu"], "--device tpu: it must be auto, cpu"),
        (["--prefix", "\udce4"], "--prefix: character 1 is half of a surrogate pair"),
    ],
)
def test_a_wrong_flag_is_named_with_its_value(generate, folder, flags, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        generate.main(["--model_path", folder, "--prefix", "一", *flags])


def test_a_missing_model_missing_weights_and_a_file_as_folder_are_errors_that_name_them(generate, folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no model folder .*train.py"):
        generate.main(["--model_path", str(tmp_path / "none"), "--prefix", "一"])
    save_tiny_model(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    before = sorted(path.name for path in (tmp_path / "model").iterdir())
    with pytest.raises(FileNotFoundError, match="has no weights"):
        generate.main(["--model_path", str(tmp_path / "model"), "--prefix", "一"])
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == before
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="--save_samples_path .* is not a folder"):
        generate.main(
            ["--model_path", folder, "--prefix", "一", "--save_samples", "--save_samples_path", str(tmp_path / "file")]
        )
