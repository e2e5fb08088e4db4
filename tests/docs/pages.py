"""The Markdown of the repository: its pages, examples, links and inline code."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]
SHELL = ("", "bash", "console", "sh")  # an indented block has no language


@dataclass(frozen=True)
class Block:
    """A block of code, at a line of a page."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def pages() -> list[str]:
    """All pages, relative to the root."""
    paths = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    paths += [*sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "examples").rglob("*.md"))]
    return [path.relative_to(ROOT).as_posix() for path in paths if "node_modules" not in path.parts]


@cache
def tokens(page: str) -> tuple[Token, ...]:
    """The page as parsed Markdown."""
    return tuple(MarkdownIt("commonmark").enable("table").parse((ROOT / page).read_text(encoding="utf-8")))


def blocks(page: str) -> list[Block]:
    """The blocks of code of a page, in order."""
    found = []
    for token in tokens(page):
        if token.type in ("fence", "code_block"):
            assert token.map is not None
            language = token.info.split()[0] if token.info else ""
            found.append(Block(page, token.map[0] + 1, language, token.content))
    return found


def inline(page: str) -> list[Token]:
    """What stands in running text, tables and headings: code, links, images."""
    return [child for token in tokens(page) for child in token.children or ()]


def headings(page: str) -> list[str]:
    """The texts of the headings of a page."""
    following = zip(tokens(page), tokens(page)[1:], strict=False)
    return [
        "".join(child.content for child in text.children or ())
        for token, text in following
        if token.type == "heading_open"
    ]
