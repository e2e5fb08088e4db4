"""The house: a file imports from the floors below its own, and on its own floor from its own folder, never in a circle.

Every import counts: absolute or relative, at the top, inside a function, under TYPE_CHECKING, or by
``import_module("...")``. ``docs/architecture.md`` draws the floors.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "impasto"

FLOORS = {
    "errors": 0,
    "checks": 0,
    "files": 0,
    "folders": 0,
    "lazy": 0,
    "optional": 0,
    "ray_cluster": 0,
    "nn": 0,
    "checkpoints": 0,
    "family": 1,
    "models": 1,
    "schedulers": 1,
    "transforms": 1,
    "registry": 2,
    "interop": 2,
    "conversion": 2,
    "memory": 2,
    "pipelines": 3,
    "training": 4,
    "serving": 4,
    "scenes": 4,
    "callbacks": 5,
    "image_processor": 5,
    "utils": 5,
    "cli": 5,
    "hooks": 5,
    "__init__": 5,
    "__main__": 5,
}
#: What every file may import, and what those of one floor may.
OPEN = {"errors", "checks", "files", "folders", "lazy", "optional", "ray_cluster"}
OPEN_ON_FLOOR = {1: {"family"}, 2: {"registry", "interop"}}
#: Files that import what their floor forbids: a model loads quantized or adapted, and these transforms know no model.
EXCEPTIONS = {
    ("models.base", "transforms.quantization_configs"),
    ("models.single_file", "transforms.quantization_configs"),
    ("models.compat.adapters", "transforms.adapters.__init__"),
}
#: A folder whose files each hold one of a kind, and the base class that marks it. base.py holds what they share.
KINDS = {"schedulers": "Scheduler"}
#: A folder of folders that do not know each other. base.py holds what they share.
FAMILIES = "models"
#: The oracle of the tests, and a library whose installation replaces torch.
FORBIDDEN = {"diffusers", "torchvision"}
#: The file that loads and makes objects of diffusers, for those who have it; it imports it inside its functions.
OF_DIFFUSERS = "interop"


class Import(NamedTuple):
    line: int
    module: str  # dotted and absolute, "impasto." included


def read_imports(tree: ast.Module, package: str, known: set[str]) -> Iterator[Import]:
    """The modules that a file of ``package`` (dotted) imports. ``known`` tells submodules from other names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node.lineno, alias.name)
        elif isinstance(node, ast.ImportFrom):
            origin = absolute("." * node.level + (node.module or ""), package)
            for alias in node.names:
                submodule = f"{origin}.{alias.name}"
                yield Import(node.lineno, submodule if submodule in known else origin)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if function in ("import_module", "require", "__import__") and isinstance(node.args[0].value, str):
                yield Import(node.lineno, absolute(node.args[0].value, package))


def absolute(name: str, package: str) -> str:
    """``..errors`` as written in ``impasto.nn`` -> ``impasto.errors``."""
    relative = name.lstrip(".")
    level = len(name) - len(relative)
    if level == 0:
        return name
    parents = package.split(".")
    return ".".join([*parents[: len(parents) - level + 1], *([relative] if relative else [])])


def one_of_a_kind(tree: ast.Module, base: str) -> bool:
    """Whether a file defines a class over one whose name ends in ``base``."""
    bases = [b for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for b in node.bases]
    return any(ast.unparse(b).split("[")[0].endswith(base) for b in bases)


def violations(source: Path) -> list[str]:
    """What the files below ``source``, the folder of a package, break; a line each."""
    name = source.name
    # A package's own file is "nn.__init__" here, so that every module is one file.
    files = {".".join(path.relative_to(source).with_suffix("").parts): path for path in sorted(source.rglob("*.py"))}
    trees = {module: ast.parse(path.read_text(encoding="utf-8"), str(path)) for module, path in files.items()}
    known = {f"{name}.{module.removesuffix('.__init__')}" for module in files} - {f"{name}.__init__"}

    solitary = set()  # files that no other file of their folder may import
    for module, tree in trees.items():
        folder, _, stem = module.partition(".")
        if folder in KINDS and stem not in ("base", "__init__") and one_of_a_kind(tree, KINDS[folder]):
            solitary.add(module)

    problems = []
    edges: dict[str, set[str]] = {module: set() for module in files}
    for module, tree in trees.items():
        folder = module.split(".")[0]
        if folder not in FLOORS:
            problems.append(f"{module}: no floor has {folder!r}; give it one here and in docs/architecture.md")
            continue
        package = ".".join([name, *module.split(".")[:-1]])
        for line, imported in read_imports(tree, package, known):
            where = f"{module}:{line}"
            if imported.split(".")[0] in FORBIDDEN and (module, imported) != (OF_DIFFUSERS, "diffusers"):
                problems.append(f"{where}: imports {imported}, which only tests may")
            if imported.split(".")[0] != name:
                continue
            target = find_file(imported, name, files)
            if target is None:
                problems.append(f"{where}: {imported} does not exist")
                continue
            edges[module].add(target)
            target_folder = target.split(".")[0]
            if target_folder in OPEN or target_folder not in FLOORS or (module, target) in EXCEPTIONS:
                continue
            own, other = FLOORS[folder], FLOORS[target_folder]
            same_folder = folder == target_folder or own == other == 5  # the doors lie next to each other
            if other > own:
                problems.append(f"{where}: floor {own} imports {target} of floor {other}")
            elif other == own and not same_folder and target_folder not in OPEN_ON_FLOOR.get(own, ()):
                problems.append(f"{where}: imports {target} of another folder of its floor")
            elif folder == target_folder == FAMILIES and other_family(module, target):
                problems.append(f"{where}: one family of models imports another, {target}; share through base.py or nn")
            elif same_folder and target in solitary and target != module and module != f"{folder}.__init__":
                problems.append(f"{where}: one of {folder} imports another, {target}; share through a helper file")
    return problems + [f"circle: {' -> '.join(circle)}" for circle in circles(edges)]


def other_family(module: str, target: str) -> bool:
    """``models.pixart.model`` and ``models.autoencoder.model``, but not ``models.base`` and ``models.compat``."""
    steps, others = module.split("."), target.split(".")
    return len(steps) > 2 and len(others) > 2 and steps[1] != others[1] != "compat"


def find_file(imported: str, package: str, files: dict[str, Path]) -> str | None:
    """``impasto.nn.attention`` -> ``nn.attention``; ``impasto.nn`` -> ``nn.__init__``; None where neither is."""
    module = imported.removeprefix(package).removeprefix(".")
    candidates = (module, f"{module}.__init__") if module else ("__init__",)
    return next((candidate for candidate in candidates if candidate in files), None)


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """The first circle met from each file, each circle once."""
    found: list[list[str]] = []
    finished: set[str] = set()

    def visit(module: str, path: list[str]) -> None:
        if module in path:
            found.append([*path[path.index(module) :], module])
        elif module not in finished:
            for target in sorted(edges[module]):
                visit(target, [*path, module])
            finished.add(module)

    for module in sorted(edges):
        visit(module, [])
    return found


def build(folder: Path, files: dict[str, str]) -> Path:
    """A package named impasto of the given files, each beside a bare ``__init__.py``."""
    source = folder / "impasto"
    for path, text in {"__init__.py": "", "errors.py": "", **files}.items():
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        (source / path).parent.joinpath("__init__.py").touch()
        (source / path).write_text(text, encoding="utf-8")
    return source


def test_the_house_stands() -> None:
    assert violations(SOURCE) == []


def test_diffusers_is_imported_when_it_is_asked_for_and_not_before() -> None:
    tree = ast.parse((SOURCE / "interop.py").read_text(encoding="utf-8"))
    early = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not any("diffusers" in ast.unparse(node) for node in early)


def test_the_house_is_the_one_looked_at() -> None:
    """The checker reads real imports: these two are known to be there."""
    files = {"models.base": SOURCE / "models" / "base.py"}
    tree = ast.parse(files["models.base"].read_text(encoding="utf-8"))
    found = {module for _, module in read_imports(tree, "impasto.models", {"impasto.checkpoints.hub"})}
    assert {"impasto.checkpoints.hub", "impasto.errors", "torch"} <= found


def test_what_the_house_allows(tmp_path: Path) -> None:
    source = build(
        tmp_path,
        {
            "__init__.py": "from .models.one.model import One",
            "__main__.py": "from .cli import main",
            "cli.py": "from . import One, errors\nfrom .serving.app import x\nfrom .training.loop import y",
            "nn/layers.py": "from impasto.nn.attention import attention\nfrom ..errors import ImpastoError",
            "nn/attention.py": "import torchvisionary  # not torchvision",
            "checkpoints/weights.py": "from .config import read",
            "checkpoints/config.py": "",
            "models/base.py": "from ..checkpoints.weights import load\nimport torch\nclass Model: ...",
            "models/one/model.py": "from ..base import Model\nfrom .blocks import z\nclass One(Model): ...",
            "models/one/blocks.py": "import impasto.nn.layers\nfrom ...family import fact",
            "family.py": "",
            "registry.py": "def f():\n    from .models.one.model import One",
            "memory/plan.py": "from ..registry import f\nfrom ..family import fact",
            "schedulers/base.py": "class Scheduler: ...\nclass Counting(Scheduler): ...",
            "schedulers/ddim.py": "from . import base\nclass DDIM(base.Scheduler): ...",
            "pipelines/base.py": "from ..memory.plan import g",
            "pipelines/pixart.py": "from ..models.one.model import One\nfrom ..schedulers.ddim import DDIM",
            "training/loop.py": "def y():\n    from ..pipelines.pixart import p",
            "serving/app.py": "from ..pipelines import pixart",
        },
    )
    assert violations(source) == []


SCHEDULER = "from .base import Scheduler\nclass {}(Scheduler): ...\n"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        pytest.param(
            {"nn/layers.py": "from ..models.one import One", "models/one.py": ""},
            "nn.layers:1: floor 0 imports models.one of floor 1",
            id="upwards",
        ),
        pytest.param(
            {"nn/layers.py": "import os\ndef f():\n    import impasto.models.one", "models/one.py": ""},
            "nn.layers:3: floor 0 imports models.one of floor 1",
            id="upwards, absolute, in a function",
        ),
        pytest.param(
            {
                "models/one.py": "import typing\nif typing.TYPE_CHECKING:\n    from ..pipelines import base",
                "pipelines/base.py": "",
            },
            "models.one:3: floor 1 imports pipelines.base of floor 3",
            id="upwards, for types only",
        ),
        pytest.param(
            {
                "pipelines/base.py": "import importlib\nimportlib.import_module('..training.loop', __package__)",
                "training/loop.py": "",
            },
            "pipelines.base:2: floor 3 imports training.loop of floor 4",
            id="upwards, by import_module",
        ),
        pytest.param(
            {"nn/layers.py": "from .. import __version__"},
            "nn.layers:1: floor 0 imports __init__ of floor 5",
            id="upwards, to the door",
        ),
        pytest.param(
            {"nn/layers.py": "from ..checkpoints import hub", "checkpoints/hub.py": ""},
            "nn.layers:1: imports checkpoints.hub of another folder of its floor",
            id="nn knows no checkpoints",
        ),
        pytest.param(
            {"checkpoints/hub.py": "from ..nn import layers", "nn/layers.py": ""},
            "checkpoints.hub:1: imports nn.layers of another folder of its floor",
            id="checkpoints know no nn",
        ),
        pytest.param(
            {"models/one.py": "from ..schedulers.base import Scheduler", "schedulers/base.py": ""},
            "models.one:1: imports schedulers.base of another folder of its floor",
            id="models know no schedulers",
        ),
        pytest.param(
            {"transforms/lora.py": "from ..models.one import One", "models/one.py": ""},
            "transforms.lora:1: imports models.one of another folder of its floor",
            id="transforms know no models",
        ),
        pytest.param(
            {"training/loop.py": "from ..scenes.dataset import d", "scenes/dataset.py": ""},
            "training.loop:1: imports scenes.dataset of another folder of its floor",
            id="training knows no scenes",
        ),
        pytest.param(
            {"models/a/model.py": "", "models/b/model.py": "from ..a.model import A"},
            "models.b.model:1: one family of models imports another, models.a.model; share through base.py or nn",
            id="no model imports a model",
        ),
        pytest.param(
            {
                "schedulers/base.py": "class Scheduler: ...",
                "schedulers/ddim.py": SCHEDULER.format("DDIM"),
                "schedulers/lcm.py": SCHEDULER.format("LCM") + "from .ddim import DDIM",
            },
            "schedulers.lcm:3: one of schedulers imports another, schedulers.ddim; share through a helper file",
            id="no solver imports a solver",
        ),
        pytest.param(
            {"nn/a.py": "from .b import x", "nn/b.py": "from . import c", "nn/c.py": "def f():\n    from .a import x"},
            "circle: nn.a -> nn.b -> nn.c -> nn.a",
            id="circle",
        ),
        pytest.param(
            {"errors.py": "from .nn import a", "nn/a.py": ""},
            "errors:1: imports nn.a of another folder of its floor",
            id="errors import nothing",
        ),
        pytest.param(
            {"nn/a.py": "def f():\n    import diffusers.models"},
            "nn.a:2: imports diffusers.models, which only tests may",
            id="diffusers",
        ),
        pytest.param(
            {"nn/a.py": "from torchvision.transforms import v2"},
            "nn.a:1: imports torchvision.transforms, which only tests may",
            id="torchvision",
        ),
        pytest.param(
            {"helpers.py": ""},
            "helpers: no floor has 'helpers'; give it one here and in docs/architecture.md",
            id="outside",
        ),
        pytest.param({"nn/a.py": "from .gone import x"}, "nn.a:1: impasto.nn.gone does not exist", id="missing"),
    ],
)
def test_what_the_house_refuses(tmp_path: Path, files: dict[str, str], expected: str) -> None:
    assert violations(build(tmp_path, files)) == [expected]
