"""Models that die or hang come back, and are exchanged without a stop; whole processes of server.py."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from tiny_model import endless_model, save_tiny_model, tiny_model

from benchmarks import serving
from gpt2_chinese.serving.service import ServedModel
from gpt2_chinese.serving.supervision import MAX_PAUSE, restart_pause
from gpt2_chinese.serving.watching import WatchedFolder, newest_model

ROOT = Path(__file__).resolve().parents[3]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="looks at processes as Linux shows them"),
]
FIELDS = {"context": "一丁", "maxlength": 20, "samples": 2, "seed": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny", endless_model())


@pytest.fixture(scope="module")
def healing(folder):
    """A server that notices after two seconds that its model hangs."""
    flags = ["--device", "cpu", "--hang_timeout", "2", "--max_length", "100000", "--max_answer", str(1 << 30)]
    os.environ["GPT2_CHINESE_ADMIN_KEY"] = "secret"
    try:
        server = serving.Server(str(folder), *flags)
    finally:
        del os.environ["GPT2_CHINESE_ADMIN_KEY"]
    with server:
        yield server


def ask(server, path: str, fields: dict | None = None, key: str = "") -> tuple[int, dict | list, dict]:
    data = None if fields is None else json.dumps(fields).encode()
    request = urllib.request.Request(server.url + path, data, {"Authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response), dict(response.headers)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error), dict(error.headers)


def until(condition, seconds: float = 90) -> float:
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < seconds, "it did not happen"
        time.sleep(0.01)
    return time.monotonic() - begin


def restarts(server) -> int:
    return ask(server, "/health")[1]["models"][0]["restarts"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_model_that_is_killed_or_hangs_comes_back_and_who_waits_is_told(healing, number):
    right = ask(healing, "/generate", FIELDS)[1]
    before, threads = restarts(healing), healing.resources()["threads"]
    answers = []
    waiting = threading.Thread(
        target=lambda: answers.append(ask(healing, "/generate", FIELDS | {"maxlength": 100_000, "samples": 4}))
    )
    waiting.start()
    until(lambda: ask(healing, "/health")[1]["running"])
    os.kill(healing.processes()[1], number)
    seen = set()

    def is_back() -> bool:
        health = ask(healing, "/health")
        seen.add((health[0], health[1]["status"]))
        if health[1]["status"] == "restarting":
            status, body, headers = ask(healing, "/generate", FIELDS)
            if status != 200:
                assert (status, body["error"]["code"]) == (503, "restarting") and headers["Retry-After"]
        return health[1]["models"][0]["restarts"] > before and health[0] == 200

    until(is_back, 120)
    assert (503, "restarting") in seen
    waiting.join(60)
    (status, body, headers) = answers[0]
    assert (status, body["error"]["code"]) == (503, "engine_stopped") and headers["Retry-After"]
    assert ask(healing, "/generate", FIELDS)[1] == right
    with urllib.request.urlopen(healing.url + "/metrics") as response:
        assert f'gpt2_model_restarts_total{{device="cpu",model="tiny"}} {before + 1}.0' in response.read().decode()
    until(lambda: healing.resources()["threads"] <= threads)


def test_where_memory_runs_out_the_kernel_ends_the_model_and_not_the_server(healing):
    """benchmarks/out_of_memory.py lets it run out, as root."""
    server, model = (int(Path(f"/proc/{one}/oom_score").read_text("ascii")) for one in healing.processes()[:2])
    assert model > server + 200


def test_a_folder_is_reloaded_between_requests_and_a_broken_one_is_refused(healing, folder):
    def reload(key: str = "secret") -> tuple[int, dict]:
        return ask(healing, "/admin/reload", {}, key)[:2]

    assert reload("")[0] == reload("wrong")[0] == 401
    old = ask(healing, "/generate", FIELDS)[1]
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text("[" * 100_000)
    status, body = reload()
    assert (status, body["error"]["code"]) == (409, "not_reloaded") and "nested too deeply" in body["error"]["message"]
    assert ask(healing, "/generate", FIELDS)[1] == old
    (folder / "config.json").write_text(config)
    save_tiny_model(folder, tiny_model())
    answers, stop = [], threading.Event()

    def client() -> None:
        while not stop.is_set():
            answers.append(ask(healing, "/generate", FIELDS)[:2])

    clients = [threading.Thread(target=client) for _ in range(4)]
    for one in clients:
        one.start()
    assert reload() == (200, {"reloaded": ["tiny"]})
    new = ask(healing, "/generate", FIELDS)[1]
    stop.set()
    for one in clients:
        one.join(90)
    assert new != old and all(answer in ((200, old), (200, new)) for answer in answers)
    assert (200, old) in answers and len(healing.processes()) <= 3
    until(lambda: len(healing.processes()) == 2)
    # The same by a signal, from a folder that is no longer there: the server goes on.
    shutil.move(folder, folder.with_name("moved"))
    healing.process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert ask(healing, "/generate", FIELDS)[1] == new
    shutil.move(folder.with_name("moved"), folder)


def test_without_restart_the_server_exits_with_status_1(tmp_path):
    folder = save_tiny_model(tmp_path / "tiny", endless_model())
    with serving.Server(str(folder), "--device", "cpu", "--no-restart") as server:
        os.kill(server.processes()[1], signal.SIGKILL)
        assert server.process.wait(20) == 1


def test_a_model_process_that_is_killed_while_it_loads_is_one_line(tmp_path):
    folder = save_tiny_model(tmp_path / "tiny", endless_model())
    command = [sys.executable, str(ROOT / "server.py"), "--model_path", str(folder), "--port", "0", "--device", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        until(lambda: [pid for thread in children.parents[1].iterdir() if (pid := (thread / "children").read_text())])
        pids = "".join((thread / "children").read_text() for thread in children.parents[1].iterdir()).split()
        for pid in pids:
            os.kill(int(pid), signal.SIGKILL)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and "Traceback" not in err
    assert "error: the model's process has ended with status -9 while it loaded" in err


def test_deaths_in_a_row_make_the_pause_grow():
    pauses = [restart_pause(count) for count in range(1, 40)]
    assert pauses[:4] == [0, 0.5, 1, 2] and pauses == sorted(pauses) and pauses[-1] == MAX_PAUSE


def test_what_has_lived_for_longer_than_its_start_took_is_started_again_at_once():
    model = ServedModel("tiny", lambda: None, start_seconds=3.0, taken_at=100.0)
    assert not model.has_lived(103.0) and model.has_lived(103.1)


def test_watching_takes_the_folder_that_was_written_last(tmp_path):
    assert newest_model(tmp_path) is None
    for age, name in ((30, "model_epoch1"), (10, "best_model"), (20, "model_epoch2"), (1, "other")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        os.utime(tmp_path / name / "config.json", (time.time() - age,) * 2)
    (tmp_path / "model_epoch3").mkdir()  # not written yet
    assert newest_model(tmp_path) == tmp_path / "best_model"


def test_a_folder_that_could_not_be_loaded_is_tried_again_when_it_is_whole_and_keeps_no_other_out(tmp_path):
    def write(name: str, age: float, **files: str) -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        for file, text in {"config": "{}", **files}.items():
            (folder / f"{file}.json").write_text(text)
        os.utime(folder / "config.json", (time.time() - age,) * 2)
        return folder

    first = write("model_epoch1", 100)
    watched = WatchedFolder(tmp_path, first)
    assert watched.next_model() is None
    # 1) It arrives file by file: the first try fails, and the next one is when nothing has come for a while.
    second = write("model_epoch2", 50)
    assert watched.next_model() == second
    watched.refuse(second)
    assert watched.next_model() is None
    write("model_epoch2", 50, weights="some")
    assert watched.next_model() is None
    write("model_epoch2", 50, weights="all of them")
    assert watched.next_model() is None and watched.next_model() == second
    watched.refuse(second)
    # 2) A broken one from a clock that is ahead does not hide the next one, nor an older one come back.
    ahead = write("model_epoch3", -1000)
    assert watched.next_model() == ahead
    watched.refuse(ahead)
    fourth = write("model_epoch4", 20)
    assert watched.next_model() == fourth
    watched.took(fourth)
    write("model_epoch2", 50, weights="again")
    assert watched.next_model() is watched.next_model() is None
    # 3) A link to what may not be read, or to nothing, is no model.
    (tmp_path / "model_epoch5").symlink_to(tmp_path / "gone")
    assert watched.next_model() is None and newest_model(tmp_path) == ahead


def test_a_server_follows_a_training_run(tmp_path):
    save_tiny_model(tmp_path / "model_epoch1", endless_model())
    with serving.Server(str(tmp_path), "--device", "cpu", "--watch", "--model_name", "run") as server:
        old = ask(server, "/generate", FIELDS)[1]
        save_tiny_model(tmp_path / "model_epoch2", tiny_model())
        until(lambda: ask(server, "/generate", FIELDS)[1] != old)
        assert ask(server, "/health")[1]["models"][0]["model"] == "run"
