"""Keeps the models of a service alive: loading them, starting again what has died, changing to a new folder."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

from gpt2_chinese.command_line import say
from gpt2_chinese.decoding.backend import CompletionBackend
from gpt2_chinese.serving.answer_size import longest_token_bytes
from gpt2_chinese.serving.service import WARM_UP_CONTEXT, ServedModel, Service
from gpt2_chinese.serving.watching import WatchedFolder

LOGGER = logging.getLogger("server")
FIRST_PAUSE, MAX_PAUSE = 0.5, 30.0
"""Seconds before the second start in a row and the most, after which the pause no longer doubles."""
POLL_SECONDS = 0.1
WATCH_SECONDS = 2.0
"""How often --watch looks for a new model folder."""


class Supervisor:
    """The threads that load, restart and exchange the models of a service.

    A model is exchanged in the event loop, between two requests; those that the old one has begun are finished by it.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._loop = asyncio.get_running_loop()
        self._stopping = threading.Event()

    def start(self) -> None:
        # Daemon threads, so that a server that is stopped while it loads does not wait for the end of loading.
        threading.Thread(target=self._load_all, name="loading", daemon=True).start()

    async def close(self) -> None:
        self._stopping.set()
        for model in self._service.models:
            if model.engine is not None:
                await asyncio.to_thread(model.engine.close)

    # Loading.

    def _load_all(self) -> None:
        for model in self._service.models:
            self._load(model)
        for model in self._service.models:
            if model.restart and model.error is None:
                threading.Thread(target=self._keep_alive, args=(model,), name="supervisor", daemon=True).start()
        watched = [model for model in self._service.models if model.watched is not None and model.error is None]
        if watched:
            threading.Thread(target=self._watch, args=(watched,), name="watcher", daemon=True).start()

    def _load(self, model: ServedModel) -> None:
        engine: CompletionBackend | None = None
        error: BaseException | None = None
        try:
            engine = self._start(model, model.load)
        except BaseException as caught:
            error = caught

        def finish_loading() -> None:
            model.error = error
            if engine is not None:
                self._take(model, engine)
            # What exists now lives as long as the process: garbage collections that visit it would delay all answers.
            gc.collect()
            gc.freeze()
            if error is not None or all(one.status != "loading" for one in self._service.models):
                self._service.loading_done.set()

        with suppress(RuntimeError):  # the server has stopped meanwhile
            self._loop.call_soon_threadsafe(finish_loading)

    def _start(self, model: ServedModel, load: Callable[[], CompletionBackend]) -> CompletionBackend:
        """Start a backend and let it complete something, in this thread."""
        begin = time.monotonic()
        engine = load()
        engine.start()
        try:
            # The first completion loads the segmenter's dictionary and compiled code: before the first client's.
            for thread in model.tokenizer_threads:
                prompt = thread.submit(engine.prompt, WARM_UP_CONTEXT, 1).result()
            self._service.encoder_thread.submit(list).result()
            engine.submit(prompt, samples=1, length=2, seed=0).future.result()
        except BaseException:
            engine.close()
            raise
        model.start_seconds = time.monotonic() - begin
        return engine

    def _take(self, model: ServedModel, engine: CompletionBackend) -> None:
        """Let a model be served by an engine from now on; called in the event loop."""
        if model.engine is not None:
            model.past_prompt_tokens += model.engine.prompt_tokens
            model.past_generated_tokens += model.engine.generated_tokens
            model.past_prefix_hits += model.engine.prefix_cache.hits
            model.past_reused_tokens += model.engine.prefix_cache.reused_tokens
        model.engine = engine
        model.token_bytes = longest_token_bytes(engine.tokenizer.vocabulary)
        model.taken_at = time.monotonic()
        self._service.device = engine.device

    def _exchange(self, model: ServedModel, engine: CompletionBackend) -> None:
        """As `_take`, from another thread; the engine is closed if the server has stopped meanwhile."""
        done = threading.Event()

        def take() -> None:
            self._take(model, engine)
            done.set()

        try:
            if self._stopping.is_set():
                raise RuntimeError
            self._loop.call_soon_threadsafe(take)
        except RuntimeError:
            engine.close()
            return
        while not done.wait(POLL_SECONDS) and not self._stopping.is_set():
            pass

    # What dies comes back.

    def _keep_alive(self, model: ServedModel) -> None:
        while not self._stopping.wait(POLL_SECONDS):
            engine = model.engine
            if engine is not None and not engine.alive:
                with model.change_lock:
                    if model.engine is engine:
                        self._restart(model, engine)

    def _restart(self, model: ServedModel, dead: CompletionBackend) -> None:
        LOGGER.error("%s is started again: %s", model.name, dead.error)
        if model.has_lived(time.monotonic()):
            model.deaths_in_a_row = 0
        dead.close()
        while True:
            model.deaths_in_a_row += 1
            if self._stopping.wait(restart_pause(model.deaths_in_a_row)):
                return
            try:
                engine = self._start(model, model.load)
            except BaseException as error:
                LOGGER.error("%s cannot be started: %s", model.name, error)
                continue
            self._exchange(model, engine)
            model.restarts += 1
            LOGGER.error("%s is ready again, started in %.1f s", model.name, model.start_seconds)
            return

    # Another model without a stop.

    def reload(self, model: ServedModel, folder: Path | None = None) -> None:
        """Load a model's folder, or another one, beside the model that is served, and exchange the two.

        Called in a thread. The old one serves until then, and if the folder cannot be loaded.

        Raises:
            ValueError, OSError, EngineStopped: the folder cannot be loaded.
        """
        load = model.load if folder is None or model.load_from is None else partial(model.load_from, str(folder))
        with model.change_lock:
            engine = self._start(model, load)
            old = model.engine
            model.load = load
            self._exchange(model, engine)
            model.reloads += 1
        if old is not None:
            self._retire(old)

    def _retire(self, old: CompletionBackend) -> None:
        """Close an engine when its requests have ended."""
        deadline = time.monotonic() + self._service.limits.request_seconds + 1
        while self._service.engine_users[old] and old.alive and time.monotonic() < deadline:
            if self._stopping.wait(POLL_SECONDS):
                break
        old.close()

    def reload_all(self) -> None:
        """Reload every model in a thread, and say in the log how that went."""

        def run() -> None:
            for model in self._service.models:
                self._reload_and_log(model, None)

        threading.Thread(target=run, name="reloading", daemon=True).start()

    def _reload_and_log(self, model: ServedModel, folder: Path | None) -> bool:
        """Reload a model, and say in the log how that went; whether it went well."""
        begin = time.monotonic()
        try:
            self.reload(model, folder)
        except Exception as error:
            LOGGER.error("%s is served as before, the folder cannot be loaded: %s", model.name, error)
            return False
        where = "" if folder is None else f" from {folder}"
        say(f"{model.name} is reloaded{where}, {time.monotonic() - begin:.1f} s")
        return True

    def _watch(self, models: list[ServedModel]) -> None:
        watched = [(model, WatchedFolder(model.watched, model.folder)) for model in models if model.watched is not None]
        while not self._stopping.wait(WATCH_SECONDS):
            for model, folder in watched:
                newest = folder.next_model()
                if newest is None:
                    continue
                if self._reload_and_log(model, newest):
                    folder.took(newest)
                else:
                    folder.refuse(newest)


def restart_pause(deaths_in_a_row: int) -> float:
    """Seconds to wait before a model that has died so often is started again."""
    if deaths_in_a_row <= 1:
        return 0.0
    return min(FIRST_PAUSE * 2.0 ** min(deaths_in_a_row - 2, 30), MAX_PAUSE)


@asynccontextmanager
async def run_models(service: Service) -> AsyncIterator[Supervisor]:
    """Load the models in a thread and keep them alive; close them at the end. Requests are answered meanwhile."""
    service.supervisor = supervisor = Supervisor(service)
    supervisor.start()
    yield supervisor
    service.encoder_thread.shutdown(wait=False, cancel_futures=True)
    for model in service.models:
        for thread in model.tokenizer_threads:
            thread.shutdown(wait=False, cancel_futures=True)
    await supervisor.close()
