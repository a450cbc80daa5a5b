"""A headless Chromium for tests: the system's own, driven by Playwright."""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from playwright.async_api import CDPSession, Page, async_playwright

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome", "chrome") if (path := shutil.which(name))), None
)


class Tab:
    """A page of the browser: its keys, its script, what it requested, and the errors of its script."""

    def __init__(self, page: Page, devtools: CDPSession) -> None:
        self.js = page.evaluate
        self.press = page.keyboard.press
        self.click = page.click
        self.call = devtools.send
        self.requests: list[str] = []
        self.faults: list[str] = []
        self._page = page
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("pageerror", lambda error: self.faults.append(str(error)))

    async def open(self, url: str) -> None:
        await self._page.goto(url)
        # The element with autofocus gets the focus when the page is first drawn; keys typed before that are lost.
        await self.until("!document.querySelector('[autofocus]') || document.activeElement !== document.body")

    async def until(self, expression: str, seconds: float = 15) -> Any:
        """Wait until a JavaScript expression is true, and give its value.

        Playwright's `wait_for_function` calls eval in the page, which its Content-Security-Policy forbids.
        """
        deadline = time.monotonic() + seconds
        while not (value := await self.js(expression)):
            assert time.monotonic() < deadline, (
                f"it did not happen: {expression}; {await self._page.inner_text('body')}"
            )
            await asyncio.sleep(0.02)
        return value

    async def type(self, text: str) -> None:
        """One character after the other, each with its input event."""
        for character in text:
            await self._page.keyboard.insert_text(character)

    async def screen(self, width: int, height: int, *, dark: bool = False, phone: bool = False) -> None:
        await self.call(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": phone},
        )
        await self._page.emulate_media(color_scheme="dark" if dark else "light")


@asynccontextmanager
async def browser_tab() -> AsyncIterator[Tab]:
    """A new page in a new browser, which ends with it."""
    # Chromium's sandbox does not work for root, which tests in a container often are.
    is_root = hasattr(os, "geteuid") and os.geteuid() == 0
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, chromium_sandbox=not is_root)
        page = await browser.new_page()
        yield Tab(page, await page.context.new_cdp_session(page))
        await browser.close()
