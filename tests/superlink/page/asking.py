"""Asks the page as a browser would, and reads what comes back."""

import asyncio
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import httpx

from superlink.page.web import web

ADDRESS = "http://localhost:9080"


@dataclass
class Page:
    """Asks the application itself, without a server between."""

    results: Path

    def ask(self, method: str, path: str, headers: dict[str, str]) -> httpx.Response:
        async def asked() -> httpx.Response:
            transport = httpx.ASGITransport(web(self.results))
            async with httpx.AsyncClient(transport=transport, base_url=ADDRESS) as client:
                return await client.request(method, path, headers=headers)

        return asyncio.run(asked())

    def get(self, path: str, **headers: str) -> httpx.Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.ask("GET", path, named)


class Elements(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {k: v or "" for k, v in attrs}))

    def handle_data(self, data: str) -> None:
        self.text += data
