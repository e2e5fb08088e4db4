"""The files of the page, as far as that needs no browser."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

PAGE = Path(str(files("impasto.serving") / "page"))


def test_the_page_asks_for_all_of_its_modules_at_once() -> None:
    """They import each other, so the browser would ask for some only when others have come."""
    text = (PAGE / "index.html").read_text(encoding="utf-8")
    named = re.findall(r'(?:modulepreload" href|type="module" src)="([^"]+)"', text)
    assert sorted(named) == sorted(str(file.relative_to(PAGE)) for file in PAGE.glob("scripts/**/*.js"))
