"""A headless Chromium for tests, driven over its DevTools protocol."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome", "chrome") if (path := shutil.which(name))), None
)
KEYS = {"Tab": 9, "Escape": 27, "ArrowLeft": 37, "Backspace": 8, **{str(digit): 48 + digit for digit in range(10)}}


class Tab:
    """A page of the browser: its address, its keys, its script, and what it asked the network for."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse, session_id: str) -> None:
        self._socket = socket
        self._session_id = session_id
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self.requests: list[str] = []
        self.faults: list[str] = []

    async def listen(self) -> None:
        async for message in self._socket:
            said = json.loads(message.data)
            if "id" in said and said["id"] in self._answers:
                self._answers.pop(said["id"]).set_result(said)
            elif said.get("method") == "Network.requestWillBeSent":
                self.requests.append(said["params"]["request"]["url"])
            elif said.get("method") == "Runtime.exceptionThrown":
                self.faults.append(json.dumps(said["params"]["exceptionDetails"], ensure_ascii=False))

    async def call(self, method: str, **params: Any) -> Any:
        number = len(self._answers) + time.monotonic_ns() % 1_000_000_000
        self._answers[number] = asyncio.get_running_loop().create_future()
        answer = self._answers[number]
        await self._socket.send_json({"id": number, "method": method, "params": params, "sessionId": self._session_id})
        said = await asyncio.wait_for(answer, 30)
        assert "error" not in said, said
        return said["result"]

    async def open(self, url: str) -> None:
        await self.call("Page.navigate", url=url)
        await self.until("document.readyState === 'complete' && location.href !== 'about:blank'")
        # What is to have the focus gets it when the page is first drawn; what is typed before goes nowhere.
        await self.until("!document.querySelector('[autofocus]') || document.activeElement !== document.body")

    async def js(self, expression: str) -> Any:
        answer = await self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    async def until(self, expression: str, seconds: float = 15) -> Any:
        """Wait until a JavaScript expression is true, and give its value."""
        deadline = time.monotonic() + seconds
        while not (value := await self.js(expression)):
            if time.monotonic() > deadline:
                raise AssertionError(f"it did not happen: {expression}; {await self.js('document.body.innerText')}")
            await asyncio.sleep(0.02)
        return value

    async def type(self, text: str) -> None:
        """One character after the other, each with its input event."""
        for character in text:
            await self.call("Input.insertText", text=character)

    async def press(self, key: str) -> None:
        code = {"key": key, "windowsVirtualKeyCode": KEYS[key], "nativeVirtualKeyCode": KEYS[key]}
        text = {"text": key} if len(key) == 1 else {}
        await self.call("Input.dispatchKeyEvent", type="keyDown", **code, **text)
        await self.call("Input.dispatchKeyEvent", type="keyUp", **code)

    async def click(self, selector: str) -> None:
        x, y = await self.js(
            f"(() => {{ const one = document.querySelector({json.dumps(selector)});"
            "one.scrollIntoView({block: 'center'});"
            "const box = one.getBoundingClientRect(); return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            await self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    async def screen(self, width: int, height: int, *, dark: bool = False, phone: bool = False) -> None:
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone
        )
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        await self.call("Emulation.setEmulatedMedia", features=features)

    async def picture(self, path: Path) -> None:
        shot = await self.call("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(shot["data"]))


@asynccontextmanager
async def browser_tab() -> AsyncIterator[Tab]:
    """A new page in a new browser, which ends with it."""
    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        # Chromium's sandbox does not work for root, which tests in a container often are.
        flags = ["--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--hide-scrollbars"]
        flags += ["--disable-background-networking", "--remote-debugging-port=0", f"--user-data-dir={folder}"]
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            flags.append("--no-sandbox")
        process = await asyncio.create_subprocess_exec(
            CHROMIUM, *flags, "about:blank", stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
        )
        assert process.stderr is not None
        try:
            address = ""
            while not address:
                line = await asyncio.wait_for(process.stderr.readline(), 60)
                assert line, "Chromium has ended"
                if found := re.search(rb"DevTools listening on (ws://\S+)", line):
                    address = found[1].decode()
            drain = asyncio.create_task(process.stderr.read())
            async with aiohttp.ClientSession() as session, session.ws_connect(address, max_msg_size=0) as socket:

                async def ask(number: int, method: str, **params: Any) -> Any:
                    await socket.send_json({"id": number, "method": method, "params": params})
                    while True:
                        said = await socket.receive_json(timeout=30)
                        if said.get("id") == number:
                            return said["result"]

                target = await ask(1, "Target.createTarget", url="about:blank")
                attached = await ask(2, "Target.attachToTarget", targetId=target["targetId"], flatten=True)
                tab = Tab(socket, attached["sessionId"])
                listening = asyncio.create_task(tab.listen())
                for domain in ("Page", "Runtime", "Network"):
                    await tab.call(f"{domain}.enable")
                try:
                    yield tab
                finally:
                    listening.cancel()
            process.terminate()
            await drain
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()
