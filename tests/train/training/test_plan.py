"""`--minutes`: the plan suits text and time, keeps what is given, and a resumed run keeps the plan."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from small_run import assert_same_weights, stopped_after, weights, write_documents

from gpt2_chinese.messages import translated
from gpt2_chinese.model_folder import read_config
from gpt2_chinese.training import plan as planning
from gpt2_chinese.training.flags import given_flags, parse_args
from gpt2_chinese.training.plan import (
    FEW_EPOCHS,
    MAX_TEACHERS,
    MORE_EPOCHS,
    MOST_OF_ONE,
    NGRAM_SHARE,
    SHAPES,
    TAUGHT_EPOCHS,
    TEACHER_OVERHEAD,
    TEACHING_PART,
    Facts,
    Plan,
    Teachers,
    choose_shape,
    decides_after,
    large_teachers,
    layer_parameters,
    make_plan,
    regularization,
    shape_of_small_pupil,
    small_teachers,
    teachers_for,
    updates_until,
)
from gpt2_chinese.training.report import Reporter


def speed_of(shape: str, vocab_size: int) -> float:
    """Tokens a second of two cores with bf16 instructions: 3.4e11 operations, the head's and the layers'."""
    config = read_config(shape)
    return 3.4e11 / (6 * (layer_parameters(config) + vocab_size * config.n_embd))


def shape_for(tokens: int, minutes: float, speed: float = 1.0) -> str:
    shapes = [planning._path_of(shape) for shape in SHAPES]
    facts = Facts(tokens, documents=100, vocab_size=5000, seconds=60 * minutes)
    chosen = choose_shape(facts, shapes, lambda shape, size: speed * speed_of(shape, size), may_be_taught=False)
    return Path(chosen.shape).stem


def test_more_time_more_text_and_a_faster_machine_give_a_larger_model():
    sizes = {name: number for number, name in enumerate(SHAPES)}
    for first, second in (
        (shape_for(1_000_000, 2), shape_for(1_000_000, 10)),
        (shape_for(1_000_000, 10), shape_for(1_000_000, 120)),
        (shape_for(1_000_000, 10), shape_for(1_000_000, 10, speed=100)),
        (shape_for(20_000, 600), shape_for(1_000_000, 600)),
    ):
        assert sizes[first] < sizes[second]


def test_a_tiny_text_gets_a_tiny_model_however_much_time_there_is():
    assert shape_for(20_000, 10_000) == SHAPES[0]


def test_a_huge_text_does_not_force_the_smallest_model():
    """A gigabyte in a day is not seen four times, but a larger model learns more from it than the smallest one."""
    assert SHAPES.index(shape_for(300_000_000, 24 * 60)) >= 2


def test_dropout_and_decay_grow_with_the_epochs_and_with_the_parameters_for_a_token():
    small, large = (layer_parameters(read_config(planning._path_of(shape))) for shape in ("2x128", "4x256"))
    assert [regularization(800_000, epochs, large)[0] for epochs in (1, 2, 4, 8)] == [0, 0, 0.05, 0.1]
    assert [regularization(800_000, epochs, small)[0] for epochs in (1, 2, 4, 8)] == [0, 0, 0, 0]
    assert regularization(8_000_000, 8, large)[0] == 0
    for tokens in (50_000, 800_000):
        kinds = zip(*(regularization(tokens, epochs, large) for epochs in (1, 2, 4, 8)), strict=True)
        assert all(list(kind) == sorted(kind) and kind[0] == 0 < kind[-1] for kind in kinds)


def pieces() -> None:
    write_documents([60] * 60)


def planned(*flags: str, minutes: float = 1.0) -> Plan:
    argv = ["--minutes", str(minutes), "--device", "cpu", *flags]
    return make_plan(parse_args(argv), given_flags(argv), speed_of)


def test_what_is_given_is_kept(train):
    pieces()
    without = planned()
    assert without.flags["optimizer"] == "muon" and without.flags["dropout"] == 0.05 and without.flags["shift_windows"]
    assert without.flags["document_mask"]
    with_flags = planned("--dropout", "0.2", "--epochs", "3", "--weight_decay", "0")
    assert not {"dropout", "epochs", "weight_decay"} & (with_flags.flags.keys() | with_flags.teacher_flags.keys())
    assert with_flags.flags.keys() | {"dropout", "epochs", "weight_decay"} == without.flags.keys()
    Path("mine.json").write_text(Path(planning._path_of("3x192")).read_text(encoding="utf-8"), encoding="utf-8")
    assert "model_config" not in planned("--model_config", "mine.json").flags


def test_a_model_of_a_text_that_is_not_small_is_calibrated_unless_nothing_is_held_out(train, monkeypatch):
    pieces()
    assert planned().flags["calibrate"] is False
    monkeypatch.setattr(planning, "SMALL", 0)
    assert planned().flags["calibrate"] is True
    assert planned("--val_fraction", "0").flags["calibrate"] is False
    assert "calibrate" not in planned("--no-calibrate").flags


def test_defaults_are_not_taken_for_given():
    assert given_flags([]) == set()
    assert given_flags(["--lr", "1.5e-4", "--overwrite"]) == {"lr", "overwrite"}


def test_what_was_not_tried_is_said(train):
    pieces()
    assert any("not tried before" in reason and "3,720 tokens" in reason for reason in planned().reasons)


def test_a_plan_without_pieces_or_time_says_what_to_do(train):
    Path("tokenized/manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenized/manifest\.json, which is not there.*make-tokenized\.py"):
        planned()
    pieces()
    with pytest.raises(ValueError, match="--minutes 0.1: 6 seconds are left, too few to train"):
        planned(minutes=0.1)
    with pytest.raises(SystemExit):
        parse_args(["--plan"])


def test_the_updates_fill_the_time_but_for_what_is_spared():
    updates = updates_until(1000.0, 400.0, per_update=0.5, per_epoch=10.0, updates_per_epoch=100)
    assert 0.95 * 600 < updates * (0.5 + 0.1) < 600
    # A run that does not come to an epoch's end is measured all the same.
    updates = updates_until(1000.0, 400.0, per_update=0.5, per_epoch=30.0, updates_per_epoch=100_000)
    assert 0.95 * 600 < updates * 0.5 + 30 < 600
    assert updates_until(1000.0, 2000.0, per_update=1.0, per_epoch=0.0, updates_per_epoch=1) == 1


def test_plan_prints_and_trains_nothing(train, capsys):
    pieces()
    before = sorted(map(str, Path.cwd().rglob("*")))
    assert train.main(["--minutes", "1", "--plan", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "plan       train.py --model_config" in printed and "tokens/s here" in printed
    assert sorted(map(str, Path.cwd().rglob("*"))) == before


@pytest.mark.parametrize("warmup", ["0", "200"])
def test_the_updates_are_decided_whatever_the_warm_up(train, monkeypatch, capsys, warmup):
    pieces()
    monkeypatch.setattr(Reporter, "updates_in_time", lambda self, state, loss: 37)
    flags = ["--minutes", "5", "--device", "cpu", "--precision", "fp32", "--val_fraction", "0.1", "--batch_size", "2"]
    flags += ["--model_config", "shape.json", "--teacher", ""]
    assert train.main([*flags, "--compile", "off", "--warmup_steps", warmup]) == 0
    assert "plan       about 37 updates" in capsys.readouterr().out


def test_the_number_of_updates_is_corrected_all_along(train, monkeypatch):
    pieces()
    asked = []

    def slower_and_slower(self, state, loss):
        asked.append(state.step)
        return 100 if state.step == 30 else 75

    monkeypatch.setattr(Reporter, "updates_in_time", slower_and_slower)
    flags = ["--minutes", "5", "--device", "cpu", "--precision", "fp32", "--val_fraction", "0.1", "--batch_size", "2"]
    flags += ["--model_config", "shape.json", "--teacher", "", "--patience", "0", "--log_step", "1", "--no-report"]
    assert train.main([*flags, "--compile", "off"]) == 0
    assert asked == [30, 38, 48, 60]
    assert [step for step in range(1, 100) if decides_after(step)] == [30, 38, 48, 60, 75, 94]
    points = [json.loads(line) for line in Path("model/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    rates = {point["step"]: point["learning_rate"] for point in points if "learning_rate" in point}
    # What is over at the 75th is not prolonged by its own correction.
    assert max(rates) == 75 and rates[75] < rates[74] < 0.06 * max(rates.values())


def test_a_run_that_is_over_before_its_speed_is_known_keeps_its_first_estimate(train, monkeypatch):
    pieces()
    monkeypatch.setattr(Reporter, "updates_in_time", None)
    flags = ["--minutes", "5", "--device", "cpu", "--precision", "fp32", "--val_fraction", "0.1", "--batch_size", "2"]
    flags += ["--model_config", "shape.json", "--teacher", ""]
    assert train.main([*flags, "--compile", "off", "--max_steps", "12"]) == 0
    assert json.loads(Path("model/metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])["step"] == 12


def test_the_updates_that_a_flag_allows_are_not_exceeded_once_the_speed_is_known(train):
    pieces()
    flags = ["--minutes", "5", "--device", "cpu", "--precision", "fp32", "--val_fraction", "0", "--batch_size", "2"]
    flags += ["--model_config", "shape.json", "--teacher", "", "--max_steps", "34", "--no-report", "--log_step", "1"]
    assert train.main([*flags, "--compile", "off"]) == 0
    assert json.loads(Path("model/metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])["step"] == 34


def test_an_interrupted_planned_run_keeps_its_plan_and_ends_as_if_it_had_not_been(train, monkeypatch, capsys):
    pieces()
    flags = ["--minutes", "5", "--device", "cpu", "--precision", "fp32", "--val_fraction", "0.1", "--patience", "0"]
    flags += ["--batch_size", "2", "--save_steps", "3", "--compile", "off", "--teacher", ""]
    monkeypatch.setattr(planning, "SHAPES", SHAPES[:1])  # a smaller one is saved sooner, and it is saved often
    monkeypatch.setattr(Reporter, "updates_in_time", lambda self, state, loss: 45)
    assert train.main([*flags, "--output_dir", "whole", "--writer_dir", "whole/tb"]) == 0
    assert "plan       about 45 updates" in capsys.readouterr().out
    assert json.loads(Path("whole/plan.json").read_text(encoding="utf-8"))["flags"]["optimizer"] == "muon"

    for after in (10, 40):  # before the number of updates is decided, and after
        with stopped_after(train, monkeypatch, after):
            assert train.main(flags) == 143
        with monkeypatch.context() as patch:
            patch.setattr(planning, "make_plan", None)
            if after > 30:
                patch.setattr(Reporter, "updates_in_time", None)
            assert train.main([*flags, "--resume"]) == 0
        assert "plan       as in model/plan.json" in capsys.readouterr().out
        assert_same_weights(weights("whole/final_model"), weights())
        Path("model").rename(f"interrupted{after}")


def test_a_teacher_needs_time_for_two_models_and_more_time_gives_more_of_them():
    tokens = 1_000_000
    shapes = [planning._path_of(shape) for shape in SHAPES]
    for minutes, shape, is_taught in ((2, "3x192", False), (12, "4x256", False), (30, "4x256", True)):
        chosen = choose_shape(Facts(tokens, 100, 5000, 60 * minutes), shapes, speed_of)
        assert (Path(chosen.shape).stem, chosen.is_taught) == (shape, is_taught)
    assert chosen.speed * 30 * 60 > TAUGHT_EPOCHS * tokens
    assert [teachers_for(epochs) for epochs in (17, 30, 37, 38, 47, 1000)] == [1, 2, 2, 3, 4, MAX_TEACHERS]
    for epochs, of_teacher, of_pupil in ((17, 5.1, 9.9), (24, 7.2, 14), (30, 5.2, 14), (100, 18.7, 14)):
        teachers = large_teachers(600.0, epochs)
        of_each = epochs * teachers.seconds / 600
        left = (epochs - teachers.number * of_each) / (1 + teachers.slowdown)
        assert (of_each, left) == (pytest.approx(of_teacher, abs=0.05), pytest.approx(of_pupil, abs=0.05))


def test_a_small_text_has_small_short_teachers_and_a_trigram(train):
    pieces()
    plan = planned("--no-report", minutes=10)
    shape = planning._path_of(SHAPES[0])
    facts = planning._facts(parse_args(["--minutes", "10"]), 600)
    few, many = (
        epochs * facts.tokens / speed_of(shape, facts.vocab_size) + TEACHER_OVERHEAD
        for epochs in (FEW_EPOCHS, MORE_EPOCHS)
    )
    assert plan.teachers == MAX_TEACHERS and plan.teacher_seconds == many
    numbers = []
    for minutes in (0.5, 1, 2):
        short = planned(minutes=minutes)
        numbers.append(short.teachers)
        assert short.teacher_seconds in (few, many)
        part = MOST_OF_ONE if short.teachers == 1 else TEACHING_PART
        assert short.teachers * short.teacher_seconds <= part * (60 * minutes - planning.REPORT_SECONDS)
    assert numbers == [1, 4, 4]
    args = parse_args(["--minutes", "10"])
    plan.apply(args)
    one, own = next(plan.teacher_runs(args))
    assert (one.ngram_share, one.epochs, one.model_config) == (0, MORE_EPOCHS, shape)
    assert one.character_lr == 0 and args.character_lr == 8 * args.lr
    assert planned("--lr", "1e-3", minutes=10).flags["character_lr"] == 8e-3
    assert one.dropout > args.dropout == own.flags["dropout"] > 0
    given = planned("--ngram_share", "0.8", minutes=10)
    assert 0 < given.flags["teacher_share"] < 0.2 and given.teacher_flags["ngram_share"] == 0
    given = planned("--teacher", "mine", minutes=10)
    assert given.flags["teacher_share"] + given.flags["ngram_share"] < 0.9
    for flag, value in (("--optimizer", "adamw"), ("--character_lr", "0")):
        without = planned(flag, value, minutes=10)
        assert "character_lr" not in without.flags and not any("--character_lr" in why for why in without.reasons)
    lone = planned("--teacher", "", minutes=10)
    assert lone.teachers == 0 and lone.flags["ngram_share"] > plan.flags["ngram_share"] and not lone.teacher_flags


def test_the_slower_a_machine_the_fewer_teachers_a_small_text_has_and_the_smaller_their_pupil():
    facts, shapes = Facts(55_000, 322, 3000, 105.0), [planning._path_of(shape) for shape in SHAPES[:2]]

    def planned_for(speed: float) -> tuple[int, int, str]:
        def speed_of(shape: str, vocab_size: int) -> float:
            return speed * {"2x128": 1.0, "3x192": 0.45}[Path(shape).stem]

        teachers = small_teachers(facts, 95.0, shapes[0], speed_of, is_soft=True)
        pupil = shape_of_small_pupil(facts, 95.0, shapes, speed_of, teachers) if teachers.number else ""
        return teachers.number, teachers.flags.get("epochs", 0), Path(pupil).stem

    expected = {90_000: (4, 6, "3x192"), 50_000: (3, 4, "3x192"), 30_000: (2, 4, "3x192"), 10_000: (1, 4, "2x128")}
    expected |= {8_000: (1, 4, "2x128"), 5_000: (0, 0, "")}
    assert {speed: planned_for(speed) for speed in expected} == expected
    soft, live = (small_teachers(facts, 95.0, shapes[0], lambda *_: 25_000, is_soft=one) for one in (True, False))
    assert (soft.number, live.number) == (2, 2) and (soft.slowdown, live.slowdown) == (0.1, 0.6)
    assert soft.soft_seconds == pytest.approx(2 * 0.45 * 55_000 / 25_000) and live.soft_seconds == 0


def test_a_plan_for_a_slow_machine_takes_the_pupil_s_shape_and_says_its_speed(train, monkeypatch):
    pieces()
    monkeypatch.setattr(planning, "_facts", lambda args, seconds: Facts(55_000, 322, 3000, seconds))
    args = parse_args(["--minutes", "2"])
    plan = make_plan(args, {"minutes"}, lambda shape, size: {"2x128": 11_000, "3x192": 4_500}[Path(shape).stem], print)
    assert (plan.teachers, plan.teacher_flags["epochs"]) == (1, FEW_EPOCHS)
    assert Path(plan.flags["model_config"]).stem == "2x128"
    assert any("2x128: 11,000 tokens/s here" in why for why in plan.reasons)
    lone = make_plan(args, {"minutes", "teacher"}, lambda shape, size: 11_000 if "2x128" in shape else 7_000, print)
    assert lone.teachers == 0 and Path(lone.flags["model_config"]).stem == "3x192"


def test_more_time_is_kept_for_the_report_of_a_larger_text_up_to_what_it_reads():
    found = [planning.report_seconds(tokens) for tokens in (50_000, 1_000_000, 5_000_000, 13_000_000, 250_000_000)]
    assert found == [12, 12, 38, 90, 90]


def test_a_measurement_of_much_text_takes_a_small_part_of_the_time(train, monkeypatch):
    pieces()
    args = parse_args(["--minutes", "2"])
    for tokens, speed, most in ((1_000_000, 37_000, None), (5_000_000, 1_600, 20_000), (250_000_000, 37_000, 600_000)):
        monkeypatch.setattr(planning, "_facts", lambda args, seconds, tokens=tokens: Facts(tokens, 15, 9000, 100.0))
        plan = make_plan(args, {"minutes"}, lambda shape, size, speed=speed: speed, print)
        given = plan.flags.get("val_bytes")
        assert (given is None) == (most is None)
        if given:
            assert planning.MIN_BYTES <= given[1] <= most and any("less is held out" in why for why in plan.reasons)


@pytest.mark.parametrize(("tokens", "shares"), [(55_000, True), (145_000, False), (900_000, False)])
def test_only_few_tokens_share_vectors_of_characters(train, monkeypatch, tokens, shares):
    pieces()
    monkeypatch.setattr(planning, "_facts", lambda args, seconds: Facts(tokens, 322, 3000, seconds))
    plan = make_plan(parse_args(["--minutes", "5"]), {"minutes"}, speed_of, print)
    assert ("character_lr" in plan.flags) == shares


@pytest.mark.parametrize(
    ("tokens", "minutes", "shape"), [(55_000, 10, None), (20_000, 10, None), (900_000, 60, None), (20_000, 1, "6x384")]
)
def test_every_reason_of_a_plan_has_its_chinese(train, monkeypatch, tokens, minutes, shape):
    pieces()
    monkeypatch.setattr(planning, "_facts", lambda args, seconds: Facts(tokens, 322, 3000, seconds))
    flags = ["--minutes", str(minutes), *(["--model_config", planning._path_of(shape)] if shape else [])]
    plan = make_plan(parse_args(flags), given_flags(flags), speed_of, print)
    for reason in plan.reasons:
        line = translated(f"plan       {reason}")
        assert line.startswith("规划       ")
        assert not re.findall("[A-Za-z_]{3,}", re.sub(r"--\w+|medical_qa.txt|dropout|Muon|token", "", line)), reason


def test_the_time_of_a_plan_is_that_of_its_teachers_and_the_last_model(train, monkeypatch):
    monkeypatch.setattr(planning, "SMALL", 0)
    pieces()
    plan = planned("--no-report", minutes=10)
    assert plan.teachers == MAX_TEACHERS
    whole = plan.teachers * plan.teacher_seconds + plan.seconds
    assert 590 < whole <= 600
    assert plan.teachers * plan.teacher_seconds > 0.9 * whole  # the pupil has its 14 epochs
    args = parse_args(["--minutes", "10", "--seed", "7", "--output_dir", "out"])
    plan.apply(args)
    assert args.teacher.split(",") == [f"out/teachers/{number}" for number in (1, 2, 3, 4)]
    runs = list(plan.teacher_runs(args))
    assert [one.seed for one, _ in runs] == [8, 9, 10, 11] and {one.teacher for one, _ in runs} == {""}
    assert all(own.teachers == 0 and own.seconds == plan.teacher_seconds for _, own in runs)


@pytest.mark.parametrize(("epochs", "is_taught", "share"), [(7, False, NGRAM_SHARE), (1.6, False, 0), (7, True, 0)])
def test_what_a_model_memorises_it_learns_from_a_trigram_too(epochs, is_taught, share):
    facts = Facts(700_000, 6_500, 4_800, 600)
    flags, why = planning._settings(facts, "config/plan/4x256.json", epochs, Teachers(), is_taught=is_taught)
    assert flags.get("ngram_share", 0) == share
    assert any("trigram" in reason for reason in why) == (share > 0)


def test_teachers_that_are_given_are_all_there_are(train):
    pieces()
    assert planned("--teacher", "mine", minutes=10).teachers == 0


def test_the_commands_that_a_plan_prints_train_the_teachers_first(train, capsys):
    pieces()
    assert train.main(["--minutes", "60", "--plan", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    commands = [line for line in printed.splitlines() if line.startswith("plan       train.py")]
    assert len(commands) == MAX_TEACHERS + 1
    assert all(f"--output_dir model/teachers/{number}" in line for number, line in enumerate(commands[:-1], 1))
    assert "--teacher model/teachers/1,model/teachers/2," in commands[-1]
    for line in commands:
        parse_args(shlex.split(line.split("train.py")[1]))


def test_a_run_with_teachers_that_is_interrupted_in_each_part_ends_as_if_it_had_not_been(train, monkeypatch, capsys):
    pieces()
    flags = ["--minutes", "60", "--device", "cpu", "--precision", "fp32", "--val_fraction", "0.1", "--patience", "0"]
    flags += ["--batch_size", "2", "--save_steps", "5", "--compile", "off", "--no-report"]
    flags += ["--model_config", "shape.json"]
    monkeypatch.setattr(planning, "MAX_TEACHERS", 2)
    monkeypatch.setattr(Reporter, "updates_in_time", lambda self, state, loss: 36)
    assert train.main([*flags, "--output_dir", "whole", "--writer_dir", "whole/tb"]) == 0
    commands = [line for line in capsys.readouterr().out.splitlines() if line.startswith("python generate.py")]
    assert commands == ["python generate.py --model_path whole/best_model"]
    first, second = (weights(f"whole/teachers/{number}/final_model") for number in (1, 2))
    assert any(not (first[name] == second[name]).all() for name in first)
    assert not (Path("whole") / "teachers" / "3").exists()

    resume: list[str] = []
    for after in (20, 36, 36):  # of the first teacher; after it and some of the second; and in the last model
        with stopped_after(train, monkeypatch, after):
            assert train.main([*flags, *resume]) == 143
        resume = ["--resume"]
    with pytest.raises(ValueError, match="interrupted"):
        train.main(flags)
    assert train.main([*flags, "--resume"]) == 0
    assert "the last model learns from the text and from the teachers (2)" in capsys.readouterr().out
    for folder in ("teachers/1/final_model", "teachers/2/best_model", "final_model", "best_model"):
        assert_same_weights(weights(f"whole/{folder}"), weights(f"model/{folder}"))
    with pytest.raises(ValueError, match="holds an earlier run .*teachers.*--overwrite"):
        train.main(flags)


def test_a_run_that_was_interrupted_at_its_teachers_is_not_begun_anew_unasked(train, monkeypatch):
    pieces()
    Path("model/teachers/1").mkdir(parents=True)
    with pytest.raises(ValueError, match="interrupted, after its teachers or one of them: continue it with --resume"):
        train.main(["--device", "cpu", "--model_config", "shape.json"])


def test_teachers_without_a_validation_set_are_their_last_models(train, monkeypatch):
    pieces()
    monkeypatch.setattr(planning, "MAX_TEACHERS", 2)
    monkeypatch.setattr(Reporter, "updates_in_time", lambda self, state, loss: 31)
    flags = ["--minutes", "60", "--device", "cpu", "--precision", "fp32", "--val_fraction", "0", "--batch_size", "2"]
    assert train.main([*flags, "--compile", "off", "--no-report", "--model_config", "shape.json"]) == 0
    assert Path("model/final_model").is_dir() and not Path("model/teachers/1/best_model").exists()
