"""The page in a real headless Chromium, with the real server and with one that answers as a test wants it."""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web
from book_order import CLS_ID
from served import served, wait_until
from tiny_model import endless_model, set_likeliest, tiny_model, tiny_tokenizer

from gpt2_chinese.decoding.engine import Engine
from gpt2_chinese.serving.connections import open_socket, start_listening

pytest.importorskip("playwright", reason="the playwright package is not installed")
from browser import CHROMIUM, browser_tab  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (apt-get install chromium)"),
]

PAGE = Path(__file__).resolve().parents[3] / "gpt2_chinese" / "serving" / "web" / "index.html"
VLLM = os.environ.get("VLLM_URL")
TEXT = "document.querySelector('#text').value"
CANDIDATES = "[...document.querySelectorAll('#candidates li span')].map((one) => one.textContent)"
FRESH = f"!document.querySelector('#candidates.stale') && {CANDIDATES}.length"
SAYS = "document.querySelector('#says').textContent"


@pytest.fixture(scope="module", autouse=True)
def server(script):
    return script("server")


def with_page(test, **settings):
    """Run `test(tab, client)` with the page of a real server."""

    async def run(client):
        async with browser_tab() as tab:
            await tab.open(client.url)
            await tab.until("document.querySelector('#state').dataset.state === 'ready'")
            assert await tab.js("document.querySelector('#which').hidden"), "there is one model only"
            await test(tab, client)
            assert tab.faults == []
            assert all(url.startswith((client.url, "data:")) for url in tab.requests), "loaded from elsewhere"

    served(run, **settings)


class Scripted:
    """A server of the page whose /generate is a function of the question; it can die and come back."""

    def __init__(self, server, generate) -> None:
        self.server, self.generate = server, generate
        self.requests: list[dict] = []
        self.cancelled = 0
        self.health = {"status": "ready", "model": "假", "maxlength": 1024, "samples": 32}

    async def handle_generate(self, request):
        fields = await request.json()
        self.requests.append(fields)
        try:
            return await self.generate(fields, request)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise

    async def handle_health(self, _):
        return web.json_response(self.health, status=200 if self.health["status"] == "ready" else 503)

    @asynccontextmanager
    async def up(self, port: int = 0):
        app = web.Application()
        app.router.add_get("/", self.server.handle_page)
        app.router.add_get("/health", self.handle_health)
        app.router.add_post("/generate", self.handle_generate)
        sock = open_socket("127.0.0.1", port)
        self.port = sock.getsockname()[1]
        async with start_listening(app, sock, connections=50, idle_seconds=5):
            yield f"http://127.0.0.1:{self.port}"


def with_scripted(server, generate, test, **health):
    """Run `test(tab, scripted)` with the page of a scripted server."""

    async def run():
        scripted = Scripted(server, generate)
        scripted.health |= health
        async with browser_tab() as tab, scripted.up() as url:
            await tab.open(url)
            await tab.until("document.querySelector('#state').dataset.state")
            await test(tab, scripted)
            assert tab.faults == []

    asyncio.run(run())


def candidates_of(fields) -> list[str]:
    return [fields["context"] + "ABCDEFGHI"[number] * 3 for number in range(fields["samples"])]


async def fast_path(fields, _):
    return web.json_response(candidates_of(fields), headers={"X-Tokens": "15"})


def test_typing_shows_suggestions_and_a_choice_lands_in_the_text():
    async def test(tab, client):
        await tab.type("一丁")
        await tab.until(FRESH)
        candidates = await tab.js(CANDIDATES)
        assert 1 <= len(candidates) <= 5
        assert await tab.until("document.querySelector('#speed').textContent.includes('token/秒')")
        assert "模型 tiny" in await tab.js("document.body.innerText")
        await tab.press("2")
        assert await tab.js(TEXT) == "一丁" + candidates[1]
        await tab.until(FRESH)
        first = (await tab.js(CANDIDATES))[0]
        await tab.press("Tab")
        text = await tab.js(TEXT)
        assert text == "一丁" + candidates[1] + first
        assert await tab.js("document.activeElement.id") == "text"
        await tab.until(FRESH)
        last = (await tab.js(CANDIDATES))[-1]
        await tab.click("#candidates li:last-child button")
        assert await tab.js(TEXT) == text + last

    with_page(test, engine=Engine(endless_model(), tiny_tokenizer(), max_num_seqs=8))


def test_every_text_is_there_in_every_language(server):
    paths = (
        "Object.values(LANGUAGES).map((texts) => Object.entries(texts).flatMap(([name, text]) =>"
        " typeof text === 'object' ? Object.keys(text).map((key) => `${name}.${key}`) : [name]).sort().join())"
    )
    missing = (
        "['text', 'label', 'title', 'placeholder'].flatMap((kind) =>"
        " [...document.querySelectorAll(`[data-${kind}]`)].map((one) => one.dataset[kind]))"
        ".filter((name) => typeof TEXTS[name] !== 'string')"
    )

    async def test(tab, _):
        assert len(set(await tab.js(paths))) == 1
        assert await tab.js(missing) == []
        assert await tab.js("document.querySelector('h1').textContent") == "续写"
        assert await tab.js("document.documentElement.lang") == "zh-CN"

    with_scripted(server, fast_path, test)


def test_fast_typing_asks_once_with_the_settings_and_choices_stand_where_the_caret_is(server):
    async def test(tab, scripted):
        await tab.js("document.querySelector('#top_p').value = 0.9; document.querySelector('#samples').value = 3")
        await tab.type("天气很好")
        await tab.until(FRESH)
        assert scripted.requests == [
            {
                "context": "天气很好",
                "temperature": 1,
                "top_k": 30,
                "top_p": 0.9,
                "min_p": 0,
                "frequency_penalty": 0,
                "maxlength": 50,
                "samples": 3,
                "until": "sentence",
            }
        ]
        await tab.js("document.querySelector('#text').setSelectionRange(2, 2)")
        await tab.type("真")
        await wait_until(lambda: len(scripted.requests) == 2)
        assert scripted.requests[1]["context"] == "天气真"
        await tab.until(FRESH)
        await tab.press("3")
        assert await tab.js(TEXT) == "天气真CCC很好"

    with_scripted(server, fast_path, test)


def test_a_later_keystroke_discards_an_older_answer(server):
    async def late_for_the_first(fields, _):
        if fields["context"] == "一":
            await asyncio.sleep(1)
        return web.json_response([fields["context"] + "答" + fields["context"]])

    async def test(tab, scripted):
        await tab.type("一")
        await wait_until(lambda: scripted.requests)
        await tab.type("丁")
        await tab.until(FRESH)
        assert await tab.js(CANDIDATES) == ["答一丁"]
        await wait_until(lambda: scripted.cancelled == 1)
        await asyncio.sleep(1.1)
        assert await tab.js(CANDIDATES) == ["答一丁"]

    with_scripted(server, late_for_the_first, test)


def test_an_input_method_is_left_alone(server):
    async def test(tab, scripted):
        await tab.type("一")
        await tab.until(FRESH)
        await tab.call("Input.imeSetComposition", {"text": "nihao", "selectionStart": 5, "selectionEnd": 5})
        await asyncio.sleep(0.6)
        assert len(scripted.requests) == 1 and await tab.js(CANDIDATES) == []
        await tab.call("Input.insertText", {"text": "你好"})
        await tab.until(FRESH)
        assert scripted.requests[-1]["context"] == "一你好" and len(scripted.requests) == 2
        assert await tab.js(TEXT) == "一你好"

    with_scripted(server, fast_path, test)


def test_digits_and_tab_are_themselves_where_no_suggestion_is_shown(server):
    async def test(tab, scripted):
        await tab.press("5")
        assert await tab.js(TEXT) == "5"
        await tab.until(FRESH)
        await tab.press("9")  # there are five suggestions
        assert await tab.js(TEXT) == "59"
        await tab.until(FRESH)
        await tab.press("Escape")
        assert await tab.js(CANDIDATES) == []
        await tab.press("1")
        assert await tab.js(TEXT) == "591"
        await tab.until(FRESH)
        await tab.press("Escape")
        await tab.press("Tab")
        assert await tab.js(TEXT) == "591" and await tab.js("document.activeElement.id") != "text"

    with_scripted(server, fast_path, test)


def test_a_long_text_streams_and_can_be_stopped():
    engine = Engine(endless_model(), tiny_tokenizer(), max_num_seqs=8)

    async def test(tab, client):
        await tab.click("#tab-long")
        await tab.type("一丁")
        await tab.js("document.querySelector('#longlength').value = 40")
        await tab.click("#go")
        await tab.until("document.querySelector('#progress').textContent.startsWith('生成了 40 个 token')")
        text = await tab.js(TEXT)
        assert text.startswith("一丁") and len(text) > 30
        await tab.js("document.querySelector('#longlength').value = 1000000")
        await tab.click("#go")
        await tab.until(f"{TEXT}.length > {len(text) + 20}")
        assert engine.running == 1 and await tab.js("document.querySelector('#go').textContent") == "停止"
        await tab.click("#go")
        await wait_until(lambda: not engine.running)
        await tab.until(f"{SAYS} === '已停止。'")
        stopped = await tab.js(TEXT)
        await asyncio.sleep(0.3)
        assert await tab.js(TEXT) == stopped and stopped.startswith(text)

    with_page(test, engine=engine, length=1_000_000)


def test_a_server_that_dies_is_said_and_when_it_is_back_the_page_goes_on(server):
    async def run():
        scripted = Scripted(server, fast_path)
        async with browser_tab() as tab:
            async with scripted.up() as url:
                await tab.open(url)
                await tab.type("一")
                await tab.until(FRESH)
            begin = time.monotonic()
            await tab.type("丁")
            await tab.until("document.querySelector('#state').dataset.state === 'gone'")
            assert time.monotonic() - begin < 5
            assert "无法连接服务器" in await tab.js(SAYS) and await tab.js(CANDIDATES) == []
            async with scripted.up(scripted.port):
                await tab.until(FRESH)
                assert scripted.requests[-1]["context"] == "一丁"
                assert await tab.js(SAYS) == ""
            assert tab.faults == []

    asyncio.run(run())


def test_a_model_thread_that_dies_is_said(monkeypatch, caplog):
    engine = Engine(endless_model(), tiny_tokenizer(), max_num_seqs=8)

    async def test(tab, client):
        await tab.type("一")
        await tab.until(FRESH)
        monkeypatch.setattr(engine.decoder, "step", lambda *_: 1 / 0)
        await tab.type("丁")
        await tab.until(f"{SAYS}.includes('模型已停止工作')")

    with_page(test, engine=engine)


def test_a_model_that_loads_and_one_that_has_nothing_to_say_are_said(server):
    async def nothing(fields, _):
        return web.json_response([fields["context"]] * fields["samples"])

    async def test(tab, scripted):
        await tab.type("一")
        await tab.until(f"{SAYS}.includes('模型加载中')")
        assert scripted.requests == []
        scripted.health["status"] = "ready"
        await tab.until(f"{SAYS}.includes('没有可续写的内容')")
        assert scripted.requests[0]["context"] == "一"

    with_scripted(server, nothing, test, status="loading")


def test_an_untrained_end_of_everything_is_said_by_the_real_server():
    model = tiny_model()
    set_likeliest(model, CLS_ID)

    async def test(tab, client):
        await tab.type("一")
        await tab.until(f"{SAYS}.includes('没有可续写的内容')")

    with_page(test, engine=Engine(model, tiny_tokenizer(), max_num_seqs=8))


def test_a_busy_a_slow_and_a_stingy_server_are_said(server):
    answers = []

    async def in_turn(fields, request):
        await asyncio.sleep(2.5 if not answers else 0)
        answers.append(fields)
        if len(answers) == 2:
            return web.json_response({"error": {"code": "full"}}, status=429, headers={"Retry-After": "1"})
        if len(answers) == 4:
            return web.json_response({"error": {"message": "<b>samples</b> must be small"}}, status=400)
        return await fast_path(fields, request)

    async def test(tab, _):
        await tab.type("一")
        await tab.until(f"{SAYS}.includes('仍在生成')")
        await tab.until(FRESH)
        assert await tab.js(SAYS) == ""
        await tab.type("丁")
        await tab.until(f"{SAYS}.includes('正忙')")
        await tab.until(FRESH)  # it has asked again
        await tab.type("七")
        await tab.until(f"{SAYS}.includes('<b>samples</b> must be small')")
        assert await tab.js("document.querySelector('b')") is None
        await tab.js("document.querySelector('#samples').value = 99")
        await tab.type("八")
        await tab.until(f"{SAYS}.includes('“条数”应在 1 到 32 之间')")

    with_scripted(server, in_turn, test)


def test_a_key_is_asked_for_and_kept():
    async def test(tab, client):
        await tab.type("一")
        await tab.until(f"{SAYS}.includes('需要访问密钥')")
        await tab.click("#key")
        await tab.type("secret")
        await tab.click("#key-form button")
        await tab.until(FRESH)
        await tab.open(client.url)
        await tab.type("丁")
        await tab.until(FRESH)

    with_page(test, keys=(b"secret",))


def test_one_chooses_among_several_models(server):
    models = [{"model": name, "status": "ready"} for name in ("小", "大")]

    async def test(tab, scripted):
        assert await tab.js("!document.querySelector('#which').hidden")
        await tab.type("一")
        await tab.until(FRESH)
        assert scripted.requests[-1]["model"] == "小"
        await tab.js(
            "(() => { const which = document.querySelector('#which'); which.value = '大';"
            "which.dispatchEvent(new Event('change')); })()"
        )
        await tab.until("document.title.includes('大')")
        await tab.until(FRESH)
        while scripted.requests[-1]["model"] != "大":
            await asyncio.sleep(0.02)
        models[1]["status"] = "dead"
        await tab.js("poll()")
        await tab.until("document.querySelector('#state').dataset.state === 'dead'")

    with_scripted(server, fast_path, test, models=models, model="小")


def test_the_page_works_with_our_openai_routes():
    """?server=/ is this server as a program of OpenAI's clients sees it."""

    async def test(tab, client):
        await tab.open(f"{client.url}/?server=/")
        await tab.until("document.querySelector('#state').dataset.state === 'ready'")
        await tab.type("一丁")
        candidates = await tab.until(f"{FRESH} && {CANDIDATES}")
        assert len(candidates) == len(set(candidates)) >= 2
        assert await tab.js(SAYS) == "" and "token" in await tab.js("document.querySelector('#speed').textContent")
        await tab.js("document.querySelector('#tab-long').click(), document.querySelector('#longlength').value = 7")
        await tab.js("document.querySelector('#go').click()")
        await tab.until(f"{SAYS}.includes('续写完成')")
        text = await tab.js(TEXT)
        assert text.startswith("一丁") and len(text) > 2
        paths = {url.removeprefix(client.url).partition("?")[0] for url in tab.requests}
        assert {"/v1/models", "/v1/completions"} <= paths and "/generate" not in paths

    with_page(test)


def test_the_page_as_a_file_works_with_another_server():
    """One that answers as vLLM does, with a key, from another address."""
    asked = []

    async def handle(request):
        headers = {"Access-Control-Allow-Origin": "*", "Access-Control-Allow-Headers": "*"}
        if request.method == "OPTIONS":
            return web.Response(headers=headers)
        if request.headers.get("Authorization") != "Bearer secret":
            return web.json_response({"error": "Unauthorized"}, status=401, headers=headers)
        if request.path == "/v1/models":
            models = {"object": "list", "data": [{"id": "model/final_model", "max_model_len": 256}]}
            return web.json_response(models, headers=headers)
        fields = await request.json()
        asked.append(fields)
        if not fields.get("stream"):
            texts = ["他说：好。然后", "\n第二行\n第三行", "没有句末"][: fields["n"]]
            body = {"choices": [{"text": one} for one in texts], "usage": {"completion_tokens": 9}}
            return web.json_response(body, headers=headers)
        response = web.StreamResponse(headers={**headers, "Content-Type": "text/event-stream"})
        await response.prepare(request)
        for text in ("很", "长。"):
            await response.write(f'data: {{"choices": [{{"text": "{text}"}}]}}\n\n'.encode())
        await response.write(b"data: [DONE]\n\n")
        return response

    async def run():
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", handle)
        sock = open_socket("127.0.0.1", 0)
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        async with browser_tab() as tab, start_listening(app, sock, connections=50, idle_seconds=5):
            await tab.open(f"{PAGE.as_uri()}?server={url}")
            await tab.until("document.querySelector('#key-form.needed')")
            await tab.js("document.querySelector('#key').value = 'secret'")
            await tab.js("document.querySelector('#key-form').requestSubmit()")
            await tab.until("document.querySelector('#state').dataset.state === 'ready'")
            await tab.type("从前")
            assert await tab.until(f"{FRESH} && {CANDIDATES}") == ["他说：好。", "\n第二行", "没有句末"]
            await tab.js("document.querySelector('#tab-long').click(), document.querySelector('#go').click()")
            await tab.until(f"{SAYS}.includes('续写完成')")
            assert await tab.js(TEXT) == "从前很长。"
        first, long = asked[0], asked[-1]
        assert (first["model"], first["prompt"], first["n"]) == ("model/final_model", "从前", 5)
        assert (first["max_tokens"], first["top_p"], first["top_k"]) == (50, 1, 30)
        assert long["stream"] and (long["n"], long["max_tokens"]) == (1, 128)  # half of max_model_len
        assert not {"context", "samples", "maxlength", "until"} & (first.keys() | long.keys())

    asyncio.run(run())


def test_the_page_says_what_a_server_elsewhere_has_to_allow():
    async def run():
        with open_socket("127.0.0.1", 0) as sock:
            url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        async with browser_tab() as tab:
            await tab.open(f"{PAGE.as_uri()}?server={url}")
            await tab.until(f"{SAYS}.includes('--allowed-origins')")

    asyncio.run(run())


@pytest.mark.skipif(VLLM is None, reason="`make check-vllm` runs it with the address of vLLM's server in VLLM_URL")
def test_the_page_as_a_file_works_with_vllm():
    async def run():
        async with browser_tab() as tab:
            await tab.open(f"{PAGE.as_uri()}?server={VLLM}")
            await tab.until("document.querySelector('#state').dataset.state === 'ready'")
            await tab.type("孩子")
            candidates = await tab.until(f"{FRESH} && {CANDIDATES}")
            assert len(candidates) == len(set(candidates)) >= 2
            await tab.js("document.querySelector('#longlength').value = 20")
            await tab.js("document.querySelector('#tab-long').click(), document.querySelector('#go').click()")
            await tab.until(f"{SAYS}.includes('续写完成')")
            text = await tab.js(TEXT)
            assert text.startswith("孩子") and len(text) > 2
            assert tab.faults == []
            paths = {url.removeprefix(VLLM).partition("?")[0] for url in tab.requests if url.startswith(VLLM)}
            assert {"/v1/models", "/v1/completions"} <= paths

    asyncio.run(run())


def test_on_a_phone_nothing_is_cut_off_and_in_the_dark_it_is_dark(server, tmp_path):
    lightness = (
        "(() => { const [r, g, b] = getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number);"
        "return (r + g + b) / 3; })()"
    )

    async def test(tab, _):
        await tab.screen(360, 640, phone=True)
        await tab.open(await tab.js("location.href"))
        await tab.type("天气很好，")
        await tab.until(FRESH)
        assert await tab.js("innerWidth") == 360
        assert await tab.js("document.documentElement.scrollWidth") <= 360
        assert not await tab.js("document.querySelector('#settings').open")
        assert await tab.js("document.querySelector('#candidates button').getBoundingClientRect().bottom") < 640
        assert await tab.js(lightness) > 200
        await tab.screen(1100, 800, dark=True)
        assert await tab.js(lightness) < 60
        names = await tab.js(
            "[...document.querySelectorAll('input, textarea, button')].filter((one) => one.checkVisibility())"
            ".filter((one) => !(one.labels?.length || one.ariaLabel || one.textContent.trim())).map((one) => one.id)"
        )
        assert names == [], "controls without a name"

    with_scripted(server, fast_path, test)
