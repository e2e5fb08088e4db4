"""The names that ``from impasto import ...`` gives, and that asking for none of them costs next to nothing."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import impasto

ROOT = Path(__file__).parents[1]
LIGHT = (
    "ImpastoError",
    "ConfigurationError",
    "InputError",
    "CheckpointError",
    "CheckpointNotFoundError",
    "WeightsMismatchError",
    "HubError",
    "MissingDependencyError",
    "ResourceError",
    "OutputError",
    "__version__",
)


def run(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("name", [name for name in impasto.__all__ if name not in LIGHT])
def test_a_public_name_is_a_class_or_a_function_of_the_package(name: str) -> None:
    found = getattr(impasto, name)
    assert isinstance(found, type) if name[0].isupper() else inspect.isfunction(found)
    assert found.__module__.startswith("impasto.")
    assert name in (found.__name__, "Transformer2DModel")


def test_the_old_transformer_name_is_the_pixart_transformer() -> None:
    assert impasto.Transformer2DModel is impasto.PixArtTransformer2DModel


def test_every_error_is_public() -> None:
    import impasto.errors as errors

    defined = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert defined == set(LIGHT) - {"__version__"}
    assert all(getattr(impasto, name) is getattr(errors, name) for name in defined)
    assert set(LIGHT) <= set(impasto.__all__)


def test_importing_the_package_loads_no_heavy_library() -> None:
    heavy = {"torch", "transformers", "numpy", "PIL", "huggingface_hub", "safetensors", "diffusers"}
    assert run(f"import sys, impasto; print(sorted({heavy} & set(sys.modules)))") == "[]"


def test_dir_lists_lazy_names_without_loading_them() -> None:
    listed = run("import sys, impasto; print(*dir(impasto)); assert 'torch' not in sys.modules").split()
    assert set(impasto.__all__) <= set(listed)


def test_a_wrong_name_is_an_attribute_error_and_an_import_error() -> None:
    with pytest.raises(AttributeError, match="'impasto' has no attribute 'PixArtOmegaPipeline'"):
        impasto.PixArtOmegaPipeline  # noqa: B018
    with pytest.raises(ImportError, match="PixArtOmegaPipeline"):
        from impasto import PixArtOmegaPipeline  # noqa: F401
    assert not hasattr(impasto, "torch")


def test_a_name_is_looked_up_once() -> None:
    assert run("import impasto; impasto.DDIMScheduler; print('DDIMScheduler' in vars(impasto))") == "True"


def test_pixart_loads_no_other_family_and_nothing_that_only_some_calls_need() -> None:
    code = (
        "import sys, impasto.pipelines.pixart; print(*(m for m in sys.modules if hasattr(sys.modules[m], '__file__')))"
    )
    loaded = run(code).split()  # files; aliases have none
    rare = [
        "glm",
        "glyphs",
        "prior",
        "plan",
        "estimate",
        "inspection",
        "device_map",
        "compiling",
        "graphs",
        "foreign",
        "prompt_cache",
        "cleaning",
    ]
    own = [name for name in loaded if name.startswith("impasto.")]
    assert [name for name in own if any(word in name for word in rare)] == []
    assert [name for name in own if name.split(".")[1] in ("schedulers", "transforms", "training", "scenes")] == []
    assert "transformers" not in loaded
    assert "torch._dynamo" not in loaded  # the compiler, whose import takes as long as that of torch


def test_building_a_model_on_the_meta_device_does_not_import_the_compiler() -> None:
    """As inspecting a checkpoint does, and so every start of a server."""
    build = "impasto.PixArtTransformer2DModel(num_layers=1); impasto.AutoencoderKL()"
    code = (
        f"import sys, torch, impasto; torch.set_default_device('meta'); {build}; print('torch._dynamo' in sys.modules)"
    )
    assert run(code) == "False"


def test_type_checkers_see_the_same_names_as_the_interpreter() -> None:
    """The imports under TYPE_CHECKING, the table of lazy names and ``__all__`` say the same thing."""
    tree = ast.parse(Path(impasto.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.asname or alias.name: f"{'.' * node.level}{node.module}:{alias.name}"
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == impasto._HOMES
    assert {*seen, *LIGHT} == set(impasto.__all__)
    assert len(impasto.__all__) == len(set(impasto.__all__))


def test_the_version_is_that_of_the_project_file() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert impasto.__version__ == project["version"]
