"""The engine in a child process: the texts of one in a thread, and no request waits for a child that is gone."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from tiny_model import endless_model, save_tiny_model, tiny_model, tiny_tokenizer

from gpt2_chinese.decoding.completion import EngineFull, EngineStopped, Prompt, SamplingParams
from gpt2_chinese.decoding.engine import Engine
from gpt2_chinese.decoding.process import (
    EngineOptions,
    EngineProcess,
    Ready,
    RequestHandler,
    SendQueue,
    encode_frame,
    read_frames,
)
from gpt2_chinese.model_folder import load_weights

ROOT = Path(__file__).resolve().parents[3]
WAIT = 60
pytestmark = pytest.mark.slow
needs_posix = pytest.mark.skipif(sys.platform == "win32", reason="sends signals")


def options(folder: Path, **others) -> EngineOptions:
    return EngineOptions(str(folder), device="cpu", precision="fp32", **others)


def until(condition, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition is still false"
        time.sleep(0.001)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError as error:
        assert error.errno == errno.ESRCH
        return False
    # A zombie has ended too.
    return "Z" not in Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny", tiny_model())


@pytest.fixture(scope="module")
def endless_folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model") / "endless", endless_model())


@pytest.fixture
def endless(endless_folder):
    with EngineProcess(options(endless_folder, max_num_seqs=4), max_waiting=8) as engine:
        yield engine


def test_every_kind_of_request_gets_the_result_of_an_engine_in_a_thread(folder):
    cases = [
        {"samples": 2, "length": 12, "seed": 1},
        {"samples": 1, "length": 9, "seed": 2, "sampling_params": SamplingParams(temperature=0)},
        {"samples": 3, "length": 12, "seed": 3, "stop": ("丁", "七")},
        {"samples": 1, "length": 6, "seed": 4, "logprobs": 2, "score_prompt": True},
        {"samples": 1, "length": 0, "seed": 5, "logprobs": 1, "score_prompt": True},
        {"samples": 5, "length": 80, "seed": 6},  # more samples than slots, and more tokens than n_ctx
    ]

    def results(engine) -> list:
        deltas: dict[int, list] = {number: [] for number in range(len(cases))}
        requests = [
            engine.submit(Prompt("一丁", (2, 40, 41), 0, 1), on_delta=deltas[number].append, **case)
            for number, case in enumerate(cases)
        ]
        completions = [request.future.result(WAIT) for request in requests]
        assert all(request.first_token_at for request, case in zip(requests, cases, strict=True) if case["length"])
        for number, samples in enumerate(completions):
            for sample, completion in enumerate(samples):
                text = "".join(delta.text for delta in deltas[number] if delta.sample == sample)
                assert "一丁" + text == completion.text
        return [completions, [request.prompt_logprobs for request in requests]]

    with Engine(*load_weights(folder), max_num_seqs=4, precision="fp32") as engine:
        expected = results(engine)
        tokens = engine.prompt_tokens, engine.generated_tokens
    with EngineProcess(options(folder, max_num_seqs=4)) as process:
        assert results(process) == expected
        until(lambda: process.running == process.waiting == 0)
        assert (process.prompt_tokens, process.generated_tokens) == tokens
        assert (process.n_ctx, process.device, process.alive) == (engine.n_ctx, "cpu", True)
        assert process.tokenizer.vocabulary == engine.tokenizer.vocabulary
        with pytest.raises(ValueError, match="samples and length"):
            process.submit(Prompt("一", (2, 40), 0), samples=0, length=1)
    assert not process.alive


def test_the_logprobs_of_a_prompt_are_set_before_its_first_delta(folder):
    with EngineProcess(options(folder)) as engine:
        were_set = []
        submitted = threading.Event()

        def on_delta(_) -> None:
            assert submitted.wait(WAIT)
            were_set.append(request.prompt_logprobs is not None)

        prompt = Prompt("一丁", (2, 40, 41), 0, 1)
        request = engine.submit(prompt, samples=2, length=5, logprobs=0, score_prompt=True, on_delta=on_delta)
        submitted.set()
        request.future.result(WAIT)
        assert were_set and all(were_set)


def test_waiting_sequences_are_counted_limited_and_cancelled(endless):
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
    for request in long:
        request.cancel()
    assert {one.finish_reason for one in waiting[1].future.result(WAIT)} == {"length"}
    until(lambda: endless.running == 0)
    assert endless.waiting == 0


@needs_posix
def test_all_requests_fail_when_the_child_is_killed(endless, caplog):
    prompt = Prompt("一", (2, 40), 0, 1)
    requests = [endless.submit(prompt, samples=4, length=1_000_000) for _ in range(2)]
    until(lambda: endless.running)
    os.kill(endless._process.pid, signal.SIGKILL)
    for request in requests:
        with pytest.raises(EngineStopped, match="ended with status -9"):
            request.future.result(5)
    assert not endless.alive and endless.running == endless.waiting == 0
    with pytest.raises(EngineStopped, match="ended with status -9"):
        endless.submit(prompt, samples=1, length=1)
    assert "ended with status -9" in caplog.text


@needs_posix
def test_submitting_does_not_block_while_the_child_is_suspended(endless):
    endless.max_waiting = 10_000
    prompt = Prompt("一" * 100_000, (2, 40), 0, 1)
    os.kill(endless._process.pid, signal.SIGSTOP)
    begin = time.monotonic()
    requests = [endless.submit(prompt, samples=1, length=3, seed=7) for _ in range(20)]
    assert time.monotonic() - begin < 5
    time.sleep(0.1)
    assert not any(request.future.done() for request in requests)
    os.kill(endless._process.pid, signal.SIGCONT)
    assert len({request.future.result(WAIT)[0].text for request in requests}) == 1


@needs_posix
def test_the_child_ignores_signals_that_are_sent_to_all_processes_of_a_server(endless):
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(endless._process.pid, number)
    assert endless.complete("一", samples=1, length=3)


def test_closing_fails_all_requests(endless):
    request = endless.submit(Prompt("一", (2, 40), 0, 1), samples=1, length=1_000_000)
    until(lambda: endless.running)
    endless.close()
    with pytest.raises(EngineStopped, match="the engine is closed"):
        request.future.result(5)
    request.cancel()
    with pytest.raises(EngineStopped, match="the engine is closed"):
        endless.submit(Prompt("一", (2, 40), 0, 1), samples=1, length=1)


@needs_posix
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@pytest.mark.parametrize("when", ["while it loads", "while it decodes"])
def test_the_child_does_not_outlive_its_parent(folder, when):
    code = (
        "import os, sys; from pathlib import Path; from gpt2_chinese.decoding.process import *\n"
        "engine = EngineProcess(EngineOptions(sys.argv[1], device='cpu', precision='fp32'))\n"
        "if sys.argv[2] == 'while it decodes': engine.start()\n"
        "else: threading.Thread(target=engine.start, daemon=True).start()\n"
        "while not hasattr(engine, '_process'): pass\n"
        "print(engine._process.pid, flush=True); os._exit(0)"
    )
    run = subprocess.run([sys.executable, "-c", code, folder, when], cwd=ROOT, stdout=subprocess.PIPE, check=True)
    until(lambda: not alive(int(run.stdout)), WAIT)


@pytest.mark.parametrize("wrong", ["no folder", "another device", "a vocabulary that is too large"])
def test_an_error_while_the_child_loads_is_raised_in_the_parent(folder, tmp_path, wrong):
    given = options(folder)
    if wrong == "no folder":
        given = options(tmp_path / "nothing")
    elif wrong == "another device":
        given = EngineOptions(str(folder), device="abacus")
    else:
        words = [*tiny_tokenizer().vocabulary, *(f"词{number}" for number in range(300))]
        (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
        given = options(folder, vocab_file=str(tmp_path / "vocab.txt"))
    with pytest.raises((ValueError, OSError)) as expected:
        from gpt2_chinese.decoding.engine import choose_device

        load_weights(given.folder, device=choose_device(given.device), vocab_file=given.vocab_file)
    with pytest.raises(expected.type) as raised:
        EngineProcess(given).start()
    assert str(raised.value) == str(expected.value)


@contextmanager
def request_handler():
    """A RequestHandler as in the child, with a tiny engine that is not started, and the pipe that it writes to."""
    reading, writing = os.pipe()
    with os.fdopen(writing, "wb", buffering=0) as to_parent, os.fdopen(reading, "rb") as from_child:
        handler = RequestHandler(to_parent.write)
        handler.engine = Engine(tiny_model(), tiny_tokenizer(), max_num_seqs=2, on_step_end=handler.send_messages)
        yield handler, read_frames(from_child)


def test_the_parent_is_told_when_the_model_thread_fails(monkeypatch):
    fields = {"samples": 1, "length": 9, "seed": 1, "stop": (), "logprobs": None, "score_prompt": False}
    fields |= {"prompt": Prompt("一", (2, 40), 0, 1), "sampling_params": SamplingParams(), "on_delta": False}
    with request_handler() as (handler, frames), handler.engine:
        monkeypatch.setattr(handler.engine.decoder, "step", lambda *_: 1 / 0)
        handler.send_ready()
        assert isinstance(next(frames), Ready)
        handler.handle_message("submit", 5, fields)
        state, messages = next(frame for frame in frames if frame[1])
        assert messages == [("stopped", 5)] and "ZeroDivisionError" in state.error and not state.alive
        handler.handle_message("submit", 6, fields)
        assert next(frames)[1] == [("stopped", 6)]
        handler.handle_message("cancel", 6, None)  # it may arrive after the end of its request


def test_the_first_frame_says_that_the_engine_is_ready_even_if_a_step_ends_before():
    with request_handler() as (handler, frames), handler.engine:
        handler.send_messages()
        handler.send_ready()
        ready, (state, messages) = next(frames), next(frames)
        assert isinstance(ready, Ready) and ready.n_ctx == handler.engine.n_ctx
        assert state.alive and not messages


def test_frames_arrive_complete_and_in_order_through_a_full_pipe():
    reading, writing = os.pipe()
    queue = SendQueue(os.fdopen(writing, "wb", buffering=0))
    values = [("number", number, b"x" * (number % 7 * 10_000)) for number in range(200)]
    for value in values:
        queue.send(encode_frame(value))
    with os.fdopen(reading, "rb") as file:
        frames = read_frames(file)
        assert [next(frames) for _ in values] == values
        queue.send(encode_frame("last"))
        queue.close()
        assert list(frames) == ["last"]
    queue.send(encode_frame("too late"))


def test_a_truncated_frame_is_the_end():
    reading, writing = os.pipe()
    with os.fdopen(writing, "wb") as file:
        file.write(encode_frame("whole") + encode_frame("truncated")[:-1])
    with os.fdopen(reading, "rb") as file:
        assert list(read_frames(file)) == ["whole"]
