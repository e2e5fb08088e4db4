"""Lines and statements of the code, before and after a change: a table by folder.

    python scripts/count_statements.py BEFORE [AFTER] [--under src scripts benchmarks tests]

BEFORE and AFTER are commits; without AFTER the files of the working tree are counted. Lines include comments,
docstrings and blank lines. Statements are those of the syntax tree, without docstrings: they do not depend on layout.
"""

from __future__ import annotations

import argparse
import ast
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout


def files(commit: str | None, under: list[str]) -> Iterator[tuple[Path, str]]:
    """The Python files of a commit, or of the working tree, and their text."""
    if commit is None:
        for name in git("ls-files", "--cached", "--others", "--exclude-standard", *under).splitlines():
            if name.endswith(".py") and (ROOT / name).exists():
                yield Path(name), (ROOT / name).read_text(encoding="utf-8")
        return
    for name in git("ls-tree", "-r", "--name-only", commit, *under).splitlines():
        if name.endswith(".py"):
            yield Path(name), git("show", f"{commit}:{name}")


def statements(text: str) -> int:
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.stmt)]
    return sum(not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)) for node in nodes)


def count(commit: str | None, under: list[str]) -> dict[str, tuple[int, int]]:
    """Lines and statements of each folder."""
    sums: defaultdict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
    for path, text in files(commit, under):
        lines, found = sums[str(path.parent)]
        sums[str(path.parent)] = (lines + len(text.splitlines()), found + statements(text))
    return dict(sums)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before")
    parser.add_argument("after", nargs="?")
    parser.add_argument("--under", nargs="+", default=["src"])
    options = parser.parse_args()
    before, after = count(options.before, options.under), count(options.after, options.under)
    print(f"{'folder':44}{'lines':>24}{'statements':>24}")
    rows = [(name, before.get(name, (0, 0)), after.get(name, (0, 0))) for name in sorted({*before, *after})]
    totals = [(sum(x[0] for x in side.values()), sum(x[1] for x in side.values())) for side in (before, after)]
    for name, old, new in [*rows, ("all", totals[0], totals[1])]:
        if old != new or name == "all":
            pairs = (f"{x:6} -> {y:6} ({y - x:+5})" for x, y in zip(old, new, strict=True))
            print(f"{name:44}{''.join(f'{pair:>24}' for pair in pairs)}")


if __name__ == "__main__":
    main()
