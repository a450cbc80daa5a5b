"""The engine in a process of its own: the texts of one in a thread, and nobody waits for a process that has died."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from tiny_model import endless_model, save_tiny_model, tiny_model, tiny_tokenizer

from gpt2_chinese.decoding.completion import EngineFull, EngineStopped, Prompt, Settings
from gpt2_chinese.decoding.engine import Engine
from gpt2_chinese.decoding.engine_process import EngineOptions, EngineProcess, RequestHandler, SendQueue, frame, frames
from gpt2_chinese.model_folder import load_weights

ROOT = Path(__file__).resolve().parents[3]
WAIT = 60
pytestmark = pytest.mark.slow
needs_posix = pytest.mark.skipif(sys.platform == "win32", reason="sends signals to processes")


def options(folder: Path, **others) -> EngineOptions:
    return EngineOptions(str(folder), device="cpu", precision="fp32", **others)


def until(condition, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.001)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError as error:
        assert error.errno == errno.ESRCH
        return False
    # A process that has ended and that nobody has asked for its status is still there.
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny", tiny_model())


@pytest.fixture(scope="module")
def endless_folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model") / "endless", endless_model())


@pytest.fixture
def endless(endless_folder):
    with EngineProcess(options(endless_folder, rows=4), max_waiting=8) as engine:
        yield engine


def test_whatever_is_asked_the_answer_is_that_of_an_engine_in_a_thread(folder):
    cases = [
        {"samples": 2, "length": 12, "seed": 1},
        {"samples": 1, "length": 9, "seed": 2, "settings": Settings(temperature=0)},
        {"samples": 3, "length": 12, "seed": 3, "stop": ("丁", "七")},
        {"samples": 1, "length": 6, "seed": 4, "logprobs": 2, "scored": True},
        {"samples": 1, "length": 0, "seed": 5, "logprobs": 1, "scored": True},
        {"samples": 5, "length": 80, "seed": 6},  # more than there are rows, and past the window
    ]

    def answers(engine) -> list:
        pieces: dict[int, list] = {number: [] for number in range(len(cases))}
        tickets = [
            engine.submit(Prompt("一丁", (2, 40, 41), 0, 1), on_delta=pieces[number].append, **case)
            for number, case in enumerate(cases)
        ]
        completions = [ticket.future.result(WAIT) for ticket in tickets]
        assert all(ticket.first_token_at for ticket, case in zip(tickets, cases, strict=True) if case["length"])
        for number, one in enumerate(completions):
            for sample, completion in enumerate(one):
                text = "".join(piece.text for piece in pieces[number] if piece.sample == sample)
                assert "一丁" + text == completion.text
        return [completions, [ticket.prompt_logprobs for ticket in tickets]]

    with Engine(*load_weights(folder), rows=4, precision="fp32") as engine:
        expected = answers(engine)
        tokens = engine.prompt_tokens, engine.generated_tokens
    with EngineProcess(options(folder, rows=4)) as process:
        assert answers(process) == expected
        until(lambda: process.running == process.waiting == 0)
        assert (process.prompt_tokens, process.generated_tokens) == tokens
        assert (process.n_ctx, process.device, process.alive) == (engine.n_ctx, "cpu", True)
        assert process.tokenizer.vocabulary == engine.tokenizer.vocabulary
        with pytest.raises(ValueError, match="samples and length"):
            process.submit(Prompt("一", (2, 40), 0), samples=0, length=1)
    assert not process.alive


def test_the_logprobs_of_a_prompt_are_there_before_its_first_piece(folder):
    with EngineProcess(options(folder)) as engine:
        there = []
        begun = threading.Event()

        def on_delta(_) -> None:
            assert begun.wait(WAIT)
            there.append(ticket.prompt_logprobs is not None)

        prompt = Prompt("一丁", (2, 40, 41), 0, 1)
        ticket = engine.submit(prompt, samples=2, length=5, logprobs=0, scored=True, on_delta=on_delta)
        begun.set()
        ticket.future.result(WAIT)
        assert there and all(there)


def test_places_are_counted_refused_and_given_up(endless):
    prompt = Prompt("一", (2, 40), 0, 1)
    long = [endless.submit(prompt, samples=2, length=1_000_000) for _ in range(2)]
    until(lambda: endless.running == 4)
    waiting = [endless.submit(prompt, samples=4, length=5) for _ in range(2)]
    assert endless.waiting == 8
    with pytest.raises(EngineFull, match="8 sequences wait"):
        endless.submit(prompt, samples=1, length=5)
    waiting[0].cancel()
    until(lambda: endless.waiting == 4)
    assert {one.finish_reason for one in waiting[0].future.result(WAIT)} == {"cancelled"}
    long[0].cancel(1)
    until(lambda: endless.waiting < 4)
    for ticket in long:
        ticket.cancel()
    assert {one.finish_reason for one in waiting[1].future.result(WAIT)} == {"length"}
    until(lambda: endless.running == 0)
    assert endless.waiting == 0


@needs_posix
def test_everyone_hears_of_a_process_that_died(endless, caplog):
    prompt = Prompt("一", (2, 40), 0, 1)
    tickets = [endless.submit(prompt, samples=4, length=1_000_000) for _ in range(2)]
    until(lambda: endless.running)
    os.kill(endless._process.pid, signal.SIGKILL)
    for ticket in tickets:
        with pytest.raises(EngineStopped, match="ended with status -9"):
            ticket.future.result(5)
    assert not endless.alive and endless.running == endless.waiting == 0
    with pytest.raises(EngineStopped, match="ended with status -9"):
        endless.submit(prompt, samples=1, length=1)
    assert "ended with status -9" in caplog.text


@needs_posix
def test_who_asks_does_not_wait_for_a_process_that_stands_still(endless):
    endless.max_waiting = 10_000
    prompt = Prompt("一" * 100_000, (2, 40), 0, 1)
    os.kill(endless._process.pid, signal.SIGSTOP)
    begin = time.monotonic()
    tickets = [endless.submit(prompt, samples=1, length=3, seed=7) for _ in range(20)]
    assert time.monotonic() - begin < 5
    time.sleep(0.1)
    assert not any(ticket.future.done() for ticket in tickets)
    os.kill(endless._process.pid, signal.SIGCONT)
    assert len({ticket.future.result(WAIT)[0].text for ticket in tickets}) == 1


@needs_posix
def test_signals_to_all_of_a_server_are_the_parents_to_obey(endless):
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(endless._process.pid, number)
    assert endless.complete("一", samples=1, length=3)


def test_closing_lets_no_one_wait(endless):
    ticket = endless.submit(Prompt("一", (2, 40), 0, 1), samples=1, length=1_000_000)
    until(lambda: endless.running)
    endless.close()
    with pytest.raises(EngineStopped, match="the engine is closed"):
        ticket.future.result(5)
    ticket.cancel()
    with pytest.raises(EngineStopped, match="the engine is closed"):
        endless.submit(Prompt("一", (2, 40), 0, 1), samples=1, length=1)


@needs_posix
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes as Linux shows them")
@pytest.mark.parametrize("when", ["while it loads", "while it decodes"])
def test_a_process_does_not_outlive_its_parent(folder, when):
    code = (
        "import os, sys; from pathlib import Path; from gpt2_chinese.decoding.engine_process import *\n"
        "engine = EngineProcess(EngineOptions(sys.argv[1], device='cpu', precision='fp32'))\n"
        "if sys.argv[2] == 'while it decodes': engine.start()\n"
        "else: threading.Thread(target=engine.start, daemon=True).start()\n"
        "while not hasattr(engine, '_process'): pass\n"
        "print(engine._process.pid, flush=True); os._exit(0)"
    )
    run = subprocess.run([sys.executable, "-c", code, folder, when], cwd=ROOT, stdout=subprocess.PIPE, check=True)
    until(lambda: not alive(int(run.stdout)), WAIT)


@pytest.mark.parametrize("wrong", ["no folder", "another device", "a vocabulary that is too large"])
def test_what_is_wrong_with_a_model_is_said_as_if_it_were_loaded_here(folder, tmp_path, wrong):
    given = options(folder)
    if wrong == "no folder":
        given = options(tmp_path / "nothing")
    elif wrong == "another device":
        given = EngineOptions(str(folder), device="abacus")
    else:
        words = [*tiny_tokenizer().vocabulary, *(f"词{number}" for number in range(300))]
        (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
        given = options(folder, vocab_file=str(tmp_path / "vocab.txt"))
    with pytest.raises((ValueError, OSError)) as here:
        from gpt2_chinese.decoding.engine import choose_device

        load_weights(given.folder, device=choose_device(given.device), vocab_file=given.vocab_file)
    with pytest.raises(here.type) as there:
        EngineProcess(given).start()
    assert str(there.value) == str(here.value)


def test_a_model_thread_that_dies_is_told_of(monkeypatch):
    reading, writing = os.pipe()
    with os.fdopen(writing, "wb") as to_parent, os.fdopen(reading, "rb") as from_child:

        def write(data: bytes) -> None:
            to_parent.write(data)
            to_parent.flush()

        desk = RequestHandler(write)
        desk.engine = Engine(tiny_model(), tiny_tokenizer(), rows=2, on_step_end=desk.turn)
        monkeypatch.setattr(desk.engine.decoder, "step", lambda *_: 1 / 0)
        request = {"samples": 1, "length": 9, "seed": 1, "stop": (), "logprobs": None, "scored": False}
        request |= {"prompt": Prompt("一", (2, 40), 0, 1), "settings": Settings(), "on_delta": False}
        with desk.engine:
            desk.hear("submit", 5, request)
            arriving = frames(from_child)
            while True:
                state, messages = next(arriving)
                if messages:
                    break
            assert messages == [("stopped", 5)] and "ZeroDivisionError" in state.error and not state.alive
            desk.hear("submit", 6, request)
            assert next(arriving)[1] == [("stopped", 6)]
            desk.hear("cancel", 6, None)  # it may be on its way when the end is


def test_frames_come_whole_in_their_order_through_a_pipe_that_is_full():
    reading, writing = os.pipe()
    outbox = SendQueue(os.fdopen(writing, "wb", buffering=0))
    values = [("number", number, b"x" * (number % 7 * 10_000)) for number in range(200)]
    for value in values:
        outbox.send(frame(value))
    with os.fdopen(reading, "rb") as file:
        arriving = frames(file)
        assert [next(arriving) for _ in values] == values
        outbox.send(frame("last"))
        outbox.close()
        assert list(arriving) == ["last"]
    outbox.send(frame("too late"))


def test_a_frame_that_breaks_off_is_the_end():
    reading, writing = os.pipe()
    with os.fdopen(writing, "wb") as file:
        file.write(frame("whole") + frame("half")[:-1])
    with os.fdopen(reading, "rb") as file:
        assert list(frames(file)) == ["whole"]
