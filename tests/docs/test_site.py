"""The site: every page is in its tree, links and images exist, public names are in the reference, and it builds."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import impasto

from .pages import ROOT, blocks, headings, inline, pages

INDEX = "docs/index.md"


def targets(page: str) -> Iterator[str]:
    """Where the links and images of a page lead."""
    for token in inline(page):
        target = token.attrs.get("href" if token.type == "link_open" else "src")
        if target is not None:
            yield str(target)


def anchors(page: str) -> set[str]:
    """The anchors of the headings of a page, as code hosts and the site make them."""
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings(page)}


def resolved(page: str, target: str) -> str:
    path = (ROOT / page).parent / target
    return os.path.relpath(path, ROOT)


@pytest.mark.parametrize("page", pages())
def test_links_and_images_exist(page: str) -> None:
    problems = []
    for target in targets(page):
        if re.match(r"https?:|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        name = resolved(page, path) if path else page
        if not (ROOT / name).is_file():
            problems.append(f"{target}: there is no file {name}")
        elif anchor and anchor not in anchors(name):
            problems.append(f"{target}: {name} has no such heading")
        elif name.startswith(".."):
            problems.append(f"{target} leads out of the repository")
    assert not problems, "\n".join(problems)


def tree() -> dict[str, list[str]]:
    text = (ROOT / INDEX).read_text(encoding="utf-8")
    found: dict[str, list[str]] = runpy.run_path(str(ROOT / "docs" / "site_extension.py"))["tree_of"](text)
    return found


def test_every_page_is_in_the_tree_once() -> None:
    listed = [resolved(INDEX, page) for section in tree().values() for page in section]
    assert len(listed) == len(set(listed))
    assert set(pages()) == {*listed, INDEX}, "docs/index.md has to name every page"


def test_the_tree_is_that_of_the_list() -> None:
    tree_of = runpy.run_path(str(ROOT / "docs" / "site_extension.py"))["tree_of"]
    text = (
        "# A\n[no](a.md)\n## B\n- [x](b.md), [y](c/d.md#e), [z](https://x.org/f.md)\n## C\n[x](b.md) [g](g.md)\n## D\n"
    )
    assert tree_of(text) == {"B": ["b.md"], "C": ["g.md"]}


def test_the_reference_has_every_public_name() -> None:
    directives = "".join(block.text for page in pages() if "/reference/" in page for block in blocks(page))
    named = set(re.findall(r"^\.\. auto(?:class|function):: impasto\.(\w+)$", directives, re.MULTILINE))
    errors = {name for name, value in vars(impasto).items() if isinstance(value, type) and issubclass(value, Exception)}
    elsewhere = {"Transformer2DModel", "PixArtAlphaImg2ImgPipeline", "PixArtAlphaInpaintPipeline", "__version__"}
    assert set(impasto.__all__) == named | errors | elsewhere
    assert elsewhere - {"__version__"} <= set(re.findall(r"`(\w+)`", _texts_of_the_reference()))


def _texts_of_the_reference() -> str:
    return "".join((ROOT / page).read_text(encoding="utf-8") for page in pages() if "/reference/" in page)


def test_the_commands_are_those_of_the_command_line() -> None:
    text = runpy.run_path(str(ROOT / "docs" / "site_extension.py"))["commands_in_markdown"]()
    assert "## impasto generate\n" in text
    assert "- `--steps` `N`: Denoising steps" in text
    assert "- `--overwrite`: Replace files" in text
    assert "- `PROMPT`: What to show." in text


def test_types_of_checked_numbers_are_plain() -> None:
    plain_types: Any = runpy.run_path(str(ROOT / "docs" / "site_extension.py"))["plain_types"]
    signature = "(a: Annotated[int, Bounds(least=1, most=64, above=None)] | None = 2)"
    assert plain_types(None, "class", "x", None, None, signature, None) == ("(a: int | None = 2)", None)


@pytest.mark.slow
def test_the_site_builds_without_warnings_and_without_a_network(tmp_path: Path) -> None:
    """No page of it loads anything from elsewhere."""
    pytest.importorskip("sphinx")
    command = [sys.executable, "-m", "sphinx", "-c", "docs", "--fail-on-warning", "--keep-going", "--quiet"]
    done = subprocess.run([*command, ".", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    built = sorted(tmp_path.rglob("*.html"))
    assert {f"{page[:-3]}.html" for page in pages()} <= {path.relative_to(tmp_path).as_posix() for path in built}
    elsewhere = r'="(?:https?:)?//'
    loaded = re.compile(rf'<(?:script|img|iframe)[^>]+src{elsewhere}|<link[^>]+rel="stylesheet"[^>]+href{elsewhere}')
    for path in built:
        assert not loaded.search(path.read_text(encoding="utf-8")), path
    for path in tmp_path.rglob("*.css"):
        assert not re.search(r"(@import|url\()[\s\"']*(https?:)?//", path.read_text(encoding="utf-8")), path
