"""Pages of layertest --html: parsed, and looked at in a headless Chromium where there is one."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "report_screenshots.py"
VOID = {"meta", "link", "br"}


class Page(HTMLParser):
    """Elements must close in order; attributes that load must not lead away."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def page_of(file: Path) -> Page:
    text = file.read_text()
    assert text.startswith("<!DOCTYPE html>")
    page = Page(text)
    assert page.count("title") >= 1 and page.count("h1") == 1 and page.count("main") == 1
    assert page.count("script") == page.count("iframe") == page.count("img") == 0
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in page.tags:
        assert "src" not in attributes and not any(name.startswith("on") for name in attributes), (tag, attributes)
        target = attributes.get("href") or "#"
        assert target == "data:," or (target[0] == "#" and (target == "#" or target[1:] in ids)), target
        if tag == "svg":
            assert attributes["role"] == "img" and attributes["aria-label"]
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style and "@import" not in style and "://" not in text
    assert "prefers-color-scheme: dark" in style and "@media print" in style
    assert "nan" not in re.findall(r'(?:x|y|cx|cy|width|height)="([^"]*)"', text)
    return page


def screenshots(page: Path, out: Path) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        [sys.executable, SCRIPT, page, out], capture_output=True, text=True, timeout=300, check=False
    )
    if result.returncode == 77:
        pytest.skip(result.stderr.strip())
    return result


def assert_looks_well(page: Path, out: Path) -> None:
    """Light, dark and printed: three views, the first two different; no complaint, no request."""
    result = screenshots(page, out)
    assert result.returncode == 0, result.stdout + result.stderr
    light, dark, printed = ((out / name).read_bytes() for name in ("light.png", "dark.png", "print.pdf"))
    assert light.startswith(b"\x89PNG") and light != dark and printed.startswith(b"%PDF")
