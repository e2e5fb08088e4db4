"""The size and shape of the code, before and after a change.

    python scripts/count_statements.py BEFORE [AFTER] [--under src scripts benchmarks tests]

BEFORE and AFTER are commits; without AFTER the files of the working tree are counted. The report has:

- lines and statements of each folder. Lines include comments, docstrings and blank lines. Statements are those of the
  syntax tree, without docstrings: they do not depend on layout;
- the files over 400 lines, and the files of schedulers/ over 200;
- what ``import impasto.pipelines.pixart`` loads of the package, in a fresh process;
- PixArt's core, which text to image runs: the files CORE, and those of models/, nn/ and schedulers/ that they
  import, directly or not, when they are loaded. What is imported inside functions is not part of it.
"""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LONGEST, LONGEST_SAMPLER = 400, 200
#: The roots of PixArt's core: the path of each below the package, then those that it had in older commits.
CORE = (
    ("models/pixart/model.py", "models/pixart.py"),
    ("models/autoencoder/model.py", "models/autoencoder_kl.py"),
    ("schedulers/dpm_solver.py",),
    ("pipelines/pixart.py",),
    ("pipelines/sampling.py",),
    ("pipelines/request.py",),
    ("pipelines/prompts.py", "pipelines/text.py"),
    ("pipelines/cleaning.py", "pipelines/text.py"),
)
CORE_FOLDERS = ("models/", "nn/", "schedulers/")
LOADED = """
import sys
import impasto.pipelines.pixart
for name, module in sys.modules.items():
    if name.split(".")[0] == "impasto" and module.__file__:
        print(module.__file__)
"""


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout


def read_files(commit: str | None, under: list[str]) -> dict[str, str]:
    """Path -> text of the Python files of a commit, or of the working tree."""
    if commit is None:
        names = git("ls-files", "--cached", "--others", "--exclude-standard", *under).splitlines()
        return {
            name: (ROOT / name).read_text(encoding="utf-8")
            for name in names
            if name.endswith(".py") and (ROOT / name).exists()
        }
    names = git("ls-tree", "-r", "--name-only", commit, *under).splitlines()
    return {name: git("show", f"{commit}:{name}") for name in names if name.endswith(".py")}


def count_lines(text: str) -> int:
    return len(text.splitlines())


def count_statements(text: str) -> int:
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.stmt)]
    return sum(not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)) for node in nodes)


def count_folders(files: dict[str, str]) -> dict[str, tuple[int, int]]:
    """Lines and statements of each folder."""
    sums: defaultdict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
    for path, text in files.items():
        folder = str(Path(path).parent)
        lines, found = sums[folder]
        sums[folder] = (lines + count_lines(text), found + count_statements(text))
    return dict(sums)


def find_long(files: dict[str, str]) -> list[str]:
    """The files that are longer than they should be, with their lines."""
    found = []
    for path, text in files.items():
        most = LONGEST_SAMPLER if path.startswith("src/impasto/schedulers/") else LONGEST
        if path.startswith("src/") and count_lines(text) > most:
            found.append(f"{path.removeprefix('src/impasto/')} {count_lines(text)}")
    return sorted(found)


def count_loaded(files: dict[str, str]) -> tuple[int, int]:
    """The files that are not empty, and their lines, that the import of PixArt's pipelines loads."""
    with tempfile.TemporaryDirectory() as folder:
        for path, text in files.items():
            if path.startswith("src/"):
                (Path(folder) / path).parent.mkdir(parents=True, exist_ok=True)
                (Path(folder) / path).write_text(text, encoding="utf-8")
        command = [sys.executable, "-B", "-c", f"import sys; sys.path.insert(0, 'src'){LOADED}"]
        output = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout
        lines = [count_lines((Path(folder) / path).read_text(encoding="utf-8")) for path in output.splitlines()]
    return sum(n > 0 for n in lines), sum(lines)


def imports(path: str, tree: ast.Module, known: set[str]) -> set[str]:
    """The files, among the known ones, that a file imports when it is loaded; paths are below the package."""
    found: set[str] = set()
    nodes: list[ast.AST] = [tree]
    while nodes:
        node = nodes.pop()
        only_types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if only_types or isinstance(node, ast.FunctionDef):
            continue
        nodes += ast.iter_child_nodes(node)
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = Path(path).parents[node.level - 1]
            module = folder.joinpath(*(node.module or "").split("."))
            names = [module, *(module / alias.name for alias in node.names)]
            found |= {f"{name}.py" for name in names} & known
    return found


def find_core(files: dict[str, str]) -> dict[str, int]:
    """The files of PixArt's core and their lines."""
    package = {path.removeprefix("src/impasto/"): text for path, text in files.items() if path.startswith("src/")}
    for paths in CORE:
        if not {*paths} & {*package}:
            raise SystemExit(f"there is no {paths[0]}: give CORE its new path")
    found = [path for paths in CORE for path in paths if path in package]
    for path in found:  # which grows
        inner = imports(path, ast.parse(package[path]), set(package))
        found += [p for p in sorted(inner) if p.startswith(CORE_FOLDERS) and p not in found]
    return {path: count_lines(package[path]) for path in sorted(found)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before")
    parser.add_argument("after", nargs="?")
    parser.add_argument("--under", nargs="+", default=["src"])
    parser.add_argument("--core", action="store_true", help="list the files of PixArt's core")
    options = parser.parse_args()
    sides = [read_files(commit, options.under) for commit in (options.before, options.after)]
    before, after = (count_folders(files) for files in sides)
    print(f"{'folder':44}{'lines':>26}{'statements':>26}")
    rows = [(name, before.get(name, (0, 0)), after.get(name, (0, 0))) for name in sorted({*before, *after})]
    totals = [(sum(x[0] for x in side.values()), sum(x[1] for x in side.values())) for side in (before, after)]
    for name, old, new in [*rows, ("all", totals[0], totals[1])]:
        if old != new or name == "all":
            pairs = (f"{x:6} -> {y:6} ({y - x:+6})" for x, y in zip(old, new, strict=True))
            print(f"{name:44}{''.join(f'{pair:>26}' for pair in pairs)}")
    if "src" not in options.under:
        return
    print()
    for which, files in zip(("before", "after"), sides, strict=True):
        loaded, lines = count_loaded(files)
        core = find_core(files)
        print(f"{which}:")
        print(f"  over {LONGEST} lines, samplers over {LONGEST_SAMPLER}: {', '.join(find_long(files)) or 'none'}")
        print(f"  import impasto.pipelines.pixart: {loaded} files, {lines:,} lines")
        print(f"  PixArt's core: {len(core)} files, {sum(core.values()):,} lines")
        if options.core:
            for path, count in core.items():
                print(f"    {count:5} {path}")


if __name__ == "__main__":
    main()
