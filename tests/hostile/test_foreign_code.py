"""No file of a checkpoint can have code run, another place read, or a question asked on standard input."""

from __future__ import annotations

import ast
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import impasto
from impasto.models.glm_image.prior import _read

from . import sandbox
from .loading import accepted, copy_components, edit_nested, outcome_of
from .sandbox import edit_json, refused

SOURCE = Path(impasto.__file__).parent
KERNEL = "someone/kernel"
PLACES = {
    "tokenizer": "pixart_folder",
    "text_encoder": "pixart_folder",
    "processor": "glm_folder",
    "vision_language_encoder": "glm_folder",
}


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """What hostile code would write."""
    return tmp_path / "marker"


def plant(folder: Path, marker: Path, *names: str) -> None:
    """Modules whose import writes the marker, and that hold a class of every name a loader may look for."""
    code = f"""open({str(marker)!r}, "w").write("executed")

class Evil:
    def __init__(self, *args, **kwargs): ...

    @classmethod
    def from_pretrained(cls, *args, **kwargs): return cls()

def generate(*args, **kwargs): ...
"""
    for name in ("evil", *names):
        path = folder / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(code)


CONFIG_CLASSES = ("AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoImageProcessor", "AutoProcessor")
AUTO_MAP = {**dict.fromkeys(CONFIG_CLASSES, "evil.Evil"), "AutoTokenizer": ["evil.Evil", "evil.Evil"]}

#: Component, file, dotted key, value: none of these has any effect.
INERT = [
    ("processor", "tokenizer_config.json", "auto_map", AUTO_MAP),
    ("processor", "tokenizer_config.json", "auto_map", ["evil.Evil", "evil.Evil"]),
    ("processor", "tokenizer_config.json", "tokenizer_class", "Evil"),
    ("processor", "tokenizer_config.json", "tokenizer_class", "evil.Evil"),
    ("processor", "tokenizer_config.json", "backend", "mistral-common"),
    ("processor", "tokenizer_config.json", "backend", "custom"),
    ("processor", "tokenizer_config.json", "tokenizer_file", "/dev/stdin"),
    ("processor", "tokenizer_config.json", "fast_tokenizer_files", ["tokenizer.9.json", "../tokenizer.json"]),
    ("processor", "tokenizer_config.json", "tokenizer_object", "evil"),
    ("processor", "tokenizer_config.json", "gguf_file", "../model.gguf"),
    ("processor", "tokenizer_config.json", "init_inputs", ["evil"]),
    ("processor", "tokenizer_config.json", "chat_template", "{{ raise_exception('executed') }}"),
    ("processor", "processor_config.json", "auto_map", AUTO_MAP),
    ("processor", "processor_config.json", "processor_class", "Evil"),
    ("processor", "processor_config.json", "image_processor.auto_map", AUTO_MAP),
    ("processor", "processor_config.json", "image_processor.image_processor_type", "Evil"),
    (
        "processor",
        "processor_config.json",
        "audio_tokenizer",
        {"audio_tokenizer_class": "Evil", "audio_tokenizer_name_or_path": "x/y"},
    ),
    ("tokenizer", "tokenizer_config.json", "auto_map", AUTO_MAP),
    ("tokenizer", "tokenizer_config.json", "tokenizer_class", "Evil"),
    ("tokenizer", "tokenizer_config.json", "vocab_file", "/dev/stdin"),
    ("tokenizer", "tokenizer_config.json", "tokenizer_file", "/dev/stdin"),
    ("tokenizer", "tokenizer_config.json", "gguf_file", "x.gguf"),
    ("tokenizer", "tokenizer_config.json", "name_or_path", "someone/model"),
    ("text_encoder", "config.json", "auto_map", AUTO_MAP),
    ("text_encoder", "config.json", "architectures", ["Evil"]),
    ("text_encoder", "config.json", "attn_implementation", KERNEL),
    ("text_encoder", "config.json", "_attn_implementation", KERNEL),
    ("text_encoder", "config.json", "_attn_implementation_internal", KERNEL),
    ("text_encoder", "config.json", "_experts_implementation", KERNEL),
    ("text_encoder", "config.json", "_name_or_path", "someone/model"),
    ("text_encoder", "config.json", "base_model_name_or_path", "someone/model"),
    ("text_encoder", "config.json", "transformers_weights", "../outside.safetensors"),
    ("text_encoder", "config.json", "fusion_config", {"evil": True}),
    ("text_encoder", "config.json", "extra_files", ["../outside.safetensors"]),
    ("text_encoder", "config.json", "use_kernels", True),
    ("text_encoder", "config.json", "trust_remote_code", True),
    ("vision_language_encoder", "config.json", "auto_map", AUTO_MAP),
    ("vision_language_encoder", "config.json", "_attn_implementation", KERNEL),
    ("vision_language_encoder", "config.json", "text_config._attn_implementation", KERNEL),
    ("vision_language_encoder", "config.json", "text_config.attn_implementation", KERNEL),
    ("vision_language_encoder", "config.json", "vision_config._attn_implementation", KERNEL),
    ("vision_language_encoder", "config.json", "text_config.auto_map", AUTO_MAP),
    ("vision_language_encoder", "config.json", "text_config.model_type", "evil"),
    ("vision_language_encoder", "config.json", "text_config.quantization_config", {"quant_method": "evil"}),
    ("vision_language_encoder", "config.json", "quantization", {"quant_method": "evil"}),
    ("vision_language_encoder", "generation_config.json", "custom_generate", "evil"),
    ("vision_language_encoder", "generation_config.json", "cache_implementation", KERNEL),
    ("vision_language_encoder", "generation_config.json", "watermarking_config", {"evil": 1}),
    ("vision_language_encoder", "generation_config.json", "compile_config", {"backend": "evil"}),
]


@pytest.mark.parametrize(
    ("component", "file", "key", "value"), INERT, ids=[f"{i}-{c}-{f}-{k}" for i, (c, f, k, _) in enumerate(INERT)]
)
def test_a_setting_that_would_choose_code_has_no_effect(
    request: pytest.FixtureRequest, tmp_path: Path, marker: Path, component: str, file: str, key: str, value: Any
) -> None:
    folder = copy_components(request.getfixturevalue(PLACES[component]), tmp_path / "model", component)
    plant(folder / component, marker)
    edit_nested(folder / component / file, key, value)
    accepted(outcome_of(folder, component))
    assert not marker.exists()


def config_of_another_model(folder: Path) -> None:
    (folder / "processor" / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": AUTO_MAP}))


def preprocessor_config(folder: Path) -> None:
    path = folder / "processor" / "processor_config.json"
    settings = {**json.loads(path.read_text())["image_processor"], "auto_map": AUTO_MAP, "image_processor_type": "Evil"}
    path.unlink()
    (folder / "processor" / "preprocessor_config.json").write_text(json.dumps(settings))


def custom_generate(folder: Path) -> None:
    (folder / "vision_language_encoder" / "custom_generate").mkdir()
    shutil.copy(folder / "evil.py", folder / "vision_language_encoder" / "custom_generate" / "generate.py")


def chat_templates(folder: Path) -> None:
    (folder / "processor" / "chat_template.jinja").write_text("{{ raise_exception('executed') }}")
    (folder / "processor" / "additional_chat_templates").mkdir()
    (folder / "processor" / "additional_chat_templates" / "default.jinja").write_text("{{ evil }}")


@pytest.mark.parametrize(
    ("plan", "component"),
    [
        pytest.param(config_of_another_model, "processor", id="processor/config.json"),
        pytest.param(preprocessor_config, "processor", id="processor/preprocessor_config.json"),
        pytest.param(custom_generate, "vision_language_encoder", id="custom_generate/generate.py"),
        pytest.param(chat_templates, "processor", id="chat templates"),
    ],
)
def test_a_file_that_would_choose_code_has_no_effect(
    glm_folder: Path, tmp_path: Path, marker: Path, plan: Callable[[Path], None], component: str
) -> None:
    folder = copy_components(glm_folder, tmp_path / "model", component)
    plant(folder, marker)
    plant(folder / component, marker)
    plan(folder)
    accepted(outcome_of(folder, component))
    assert not marker.exists()


def read_a_prompt(folder: str) -> list[int]:
    pipe = impasto.GlmImagePipeline.from_pretrained(
        folder, **dict.fromkeys(("tokenizer", "text_encoder", "vae", "transformer", "scheduler"))
    )
    model, processor = pipe.components["vision_language_encoder"], pipe.components["processor"]
    return _read(model, processor, "a cube", (64, 64), []).tokens.tolist()


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('executed') }}",
        "{% for i in range(10**9) %}{{ i }}{% endfor %}",
        "{{ 'x' * 10**10 }}",
        "{% if",
    ],
    ids=["raises", "endless", "large", "damaged"],
)
def test_a_chat_template_is_never_executed(glm_folder: Path, tmp_path: Path, template: str) -> None:
    components = ("processor", "vision_language_encoder")
    folder = copy_components(glm_folder, tmp_path / "model", *components)
    (folder / "processor" / "chat_template.jinja").write_text(template)
    outcome = sandbox.run(read_a_prompt, str(folder))
    accepted(outcome)
    assert outcome.value == sandbox.run(read_a_prompt, str(glm_folder)).value


@pytest.mark.parametrize("component", ["text_encoder", "vision_language_encoder"])
@pytest.mark.parametrize("config", ["kept", "removed"])
def test_an_adapter_is_no_component(
    request: pytest.FixtureRequest, tmp_path: Path, component: str, config: str
) -> None:
    """transformers with peft would load the base model from wherever the adapter says."""
    folder = copy_components(request.getfixturevalue(PLACES[component]), tmp_path, component)
    (folder / component / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/model"}')
    if config == "removed":
        (folder / component / "config.json").unlink()
    refused(outcome_of(folder, component), "CheckpointError", "adapter_config.json", component)


QUANTIZATIONS: list[tuple[str, Any, str, str]] = [
    ("unknown", {"quant_method": "evil"}, "CheckpointError", "'evil'"),
    ("gptq", {"quant_method": "gptq", "bits": 4}, "CheckpointError", "'gptq'"),
    ("no method", {"bits": 4}, "CheckpointError", "quant_method"),
    ("method of a list", {"quant_method": ["torchao"]}, "CheckpointError", "quant_method"),
    ("a text", "nf4", "ConfigurationError", "quantization_config"),
    ("a list", [1], "ConfigurationError", "quantization_config"),
    (
        "a threshold",
        {"quant_method": "bitsandbytes", "llm_int8_threshold": {"a": 1}},
        "ConfigurationError",
        "threshold",
    ),
    (
        "a dtype",
        {"quant_method": "bitsandbytes", "bnb_4bit_compute_dtype": "load"},
        "ConfigurationError",
        "compute_dtype",
    ),
    (
        "a class of torchao",
        {"quant_method": "torchao", "quant_type": {"default": {"_type": "quantize_", "_data": {}}}},
        "ConfigurationError",
        "quant_type.default._type",
    ),
    (
        "a class within",
        {
            "quant_method": "torchao",
            "quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_data": {"a": {"_type": "Any", "_data": {}}}}},
        },
        "CheckpointError",
        "'Any'",
    ),
    (
        "a type in a list",
        {
            "quant_method": "torchao",
            "quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_data": {"a": {"_type": []}}}},
        },
        "CheckpointError",
        "_type",
    ),
]


@pytest.mark.parametrize(("settings", "error", "named"), [pytest.param(*c[1:], id=c[0]) for c in QUANTIZATIONS])
def test_a_quantization_is_one_that_is_known(
    pixart_folder: Path, tmp_path: Path, settings: Any, error: str, named: str
) -> None:
    folder = copy_components(pixart_folder, tmp_path, "text_encoder")
    edit_json(folder / "text_encoder" / "config.json", quantization_config=settings)
    refused(outcome_of(folder, "text_encoder"), error, "config.json", named)


class Evil:
    """Unpickled, it writes the marker."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> Any:
        return open, (str(self.marker), "w")


@pytest.mark.parametrize("form", ["plain", "zip", "next to tensors"])
def test_a_pickle_that_runs_code(pixart_folder: Path, tmp_path: Path, marker: Path, form: str) -> None:
    folder = copy_components(pixart_folder, tmp_path / "model", "text_encoder")
    (folder / "text_encoder" / "model.safetensors").unlink()
    path = folder / "text_encoder" / "pytorch_model.bin"
    if form == "plain":
        path.write_bytes(pickle.dumps(Evil(marker)))
    else:
        torch.save(
            {"shared.weight": torch.ones(2), "x": Evil(marker)} if form == "next to tensors" else Evil(marker), path
        )
    outcome = outcome_of(folder, "text_encoder")
    refused(outcome, "CheckpointError", "pytorch_model.bin")
    assert "weights_only=False" not in outcome.message
    assert not marker.exists()


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "..\\outside.safetensors", "..", "a/b.safetensors"]
)
@pytest.mark.parametrize("component", ["text_encoder", "vision_language_encoder"])
def test_names_in_weight_indexes_stay_in_their_folder(
    request: pytest.FixtureRequest, tmp_path: Path, component: str, name: str
) -> None:
    folder = copy_components(request.getfixturevalue(PLACES[component]), tmp_path / "model", component)
    held = folder / component / "model.safetensors"
    names = list(safetensors.torch.load_file(held))
    held.rename(folder / "outside.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, name)}
    (folder / component / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(outcome_of(folder, component), "CheckpointError", "model.safetensors.index.json")


def test_the_hubs_cache_is_made_of_links(pixart_folder: Path, tmp_path: Path) -> None:
    """So a name is judged as it is written, and links are followed."""
    folder = copy_components(pixart_folder, tmp_path / "model", "text_encoder", "tokenizer")
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for i, path in enumerate(sorted(folder.glob("*/*"))):
        path.rename(blobs / str(i))
        path.symlink_to(blobs / str(i))
    accepted(outcome_of(folder, "text_encoder", "tokenizer"))


# --- model_index.json ---

ROLES = [
    ("pixart_folder", "text_encoder", ["transformers", "GlmImageForConditionalGeneration"], "T5EncoderModel"),
    ("pixart_folder", "text_encoder", ["transformers", "T5ForConditionalGeneration"], "T5EncoderModel"),
    ("pixart_folder", "text_encoder", ["transformers", "AutoModel"], "T5EncoderModel"),
    ("pixart_folder", "text_encoder", ["diffusers", "T5EncoderModel"], "T5EncoderModel"),
    ("pixart_folder", "text_encoder", ["evil", "Evil"], "T5EncoderModel"),
    ("pixart_folder", "text_encoder", ["diffusers", "AutoencoderKL"], "T5EncoderModel"),
    ("pixart_folder", "tokenizer", ["transformers", "AutoTokenizer"], "T5Tokenizer"),
    ("pixart_folder", "tokenizer", ["transformers", "GlmImageProcessor"], "T5Tokenizer"),
    ("pixart_folder", "tokenizer", ["evil", "T5Tokenizer"], "T5Tokenizer"),
    ("pixart_folder", "vae", ["evil", "AutoencoderTiny"], "AutoencoderKL"),
    ("pixart_folder", "vae", ["diffusers", "PixArtTransformer2DModel"], "AutoencoderKL"),
    ("pixart_folder", "vae", ["transformers", "AutoencoderKL"], "AutoencoderKL"),
    ("pixart_folder", "transformer", ["diffusers", "GlmImageTransformer2DModel"], "PixArtTransformer2DModel"),
    ("pixart_folder", "transformer", ["diffusers", "AutoencoderKL"], "PixArtTransformer2DModel"),
    ("pixart_folder", "scheduler", ["diffusers", "AutoencoderKL"], "DPMSolverMultistepScheduler"),
    ("pixart_folder", "scheduler", ["evil", "EulerDiscreteScheduler"], "DPMSolverMultistepScheduler"),
    ("pixart_folder", "scheduler", ["diffusers", "os.system"], "DPMSolverMultistepScheduler"),
    ("pixart_folder", "scheduler", ["diffusers", None], "DPMSolverMultistepScheduler"),
    ("pixart_folder", "scheduler", [None, "a\x1b[2Jb"], "DPMSolverMultistepScheduler"),
    ("glm_folder", "transformer", ["diffusers", "PixArtTransformer2DModel"], "GlmImageTransformer2DModel"),
    ("glm_folder", "processor", ["transformers", "AutoProcessor"], "GlmImageProcessor"),
    ("glm_folder", "processor", ["transformers", "ByT5Tokenizer"], "GlmImageProcessor"),
    ("glm_folder", "vision_language_encoder", ["transformers", "T5EncoderModel"], "GlmImageForConditionalGeneration"),
    ("glm_folder", "vision_language_encoder", ["evil", "Evil"], "GlmImageForConditionalGeneration"),
    ("glm_folder", "text_encoder", ["transformers", "GlmImageForConditionalGeneration"], "T5EncoderModel"),
]


@pytest.mark.parametrize(
    ("fixture", "component", "entry", "fitting"),
    [pytest.param(*case, id=f"{case[1]} is {case[2][0]}.{case[2][1]!r}") for case in ROLES if case[2][1] is not None],
)
def test_a_component_has_a_class_of_its_role(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    marker: Path,
    fixture: str,
    component: str,
    entry: list[Any],
    fitting: str,
) -> None:
    folder = copy_components(request.getfixturevalue(fixture), tmp_path / "model", component)
    plant(folder, marker)
    edit_json(folder / "model_index.json", **{component: entry})
    outcome = outcome_of(folder, component)
    refused(outcome, "CheckpointError", component, fitting, f"from_pretrained(..., {component}=")
    assert "\x1b" not in outcome.message
    assert not marker.exists()


@pytest.mark.parametrize("name", ["../vae", "/etc", "a b", "vae/..", "", "a\x1b[2J"], ids=repr)
def test_components_have_plain_names(pixart_folder: Path, tmp_path: Path, name: str) -> None:
    folder = copy_components(pixart_folder, tmp_path, "scheduler")
    edit_json(folder / "model_index.json", **{name: ["diffusers", "AutoencoderKL"]})
    outcome = outcome_of(folder, "scheduler")
    refused(outcome, "CheckpointError", "model_index.json", "component name")
    assert "\x1b" not in outcome.message


def test_a_scheduler_of_two_names_is_that_of_the_index(
    pixart_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = copy_components(pixart_folder, tmp_path, "scheduler")
    path = folder / "scheduler" / "scheduler_config.json"
    others = dict.fromkeys(("tokenizer", "text_encoder", "vae", "transformer"))
    assert json.loads(path.read_text())["_class_name"] == "DPMSolverMultistepScheduler"
    impasto.PixArtSigmaPipeline.from_pretrained(folder, **others)
    assert "loaded as" not in caplog.text
    edit_json(path, _class_name="LCMScheduler")
    found = impasto.PixArtSigmaPipeline.from_pretrained(folder, **others).scheduler
    assert type(found).__name__ == "DPMSolverMultistepScheduler"
    assert "DPMSolverMultistepScheduler in model_index.json" in caplog.text
    assert "LCMScheduler" in caplog.text


# --- our own code ---

#: Who else may import transformers: for types alone, and to still its progress bars.
ALLOWED = {
    "checkpoints/foreign/from_transformers.py",
    "checkpoints/foreign/vision_language.py",
    "pipelines/prompts.py",
    "pipelines/learned_tokens.py",  # the class of a new token
    "checkpoints/foreign/quiet.py",
    "training/assembly/components.py",  # T5's class and config, for a new one
    "training/objectives/textual_inversion.py",  # the class of a new token
}


#: How our own code calls our own classes.
OURS = {"cls", "cast(Any, cls)", "found", "Judge", "AutoencoderKL", "GlmImageTransformer2DModel", "GlmImagePipeline"}


def imports_of_transformers(tree: ast.Module) -> list[int]:
    found = []
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
        if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            names += [str(node.args[0].value)] if function in ("import_module", "require", "__import__") else []
        found += [node.lineno for name in names if name.split(".")[0] in ("transformers", "tokenizers")]  # type: ignore[attr-defined]
    return found


def calls_of(tree: ast.Module, name: str) -> list[ast.Call]:
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == name
    ]


def test_transformers_is_called_in_one_place_and_trusts_nothing() -> None:
    importing = {}
    for path in SOURCE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if imports_of_transformers(tree):
            importing[path.relative_to(SOURCE).as_posix()] = tree
    assert importing.keys() <= ALLOWED
    place = "checkpoints/foreign/from_transformers.py"
    assert place in importing
    calls = calls_of(importing[place], "from_pretrained")
    assert len(calls) == 2, "one for models, one for tokenizers"
    for call in calls:
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert given["trust_remote_code"] == "False"
        assert given["local_files_only"] == "True"
    assert sum('attn_implementation="sdpa"' in ast.unparse(call).replace("'", '"') for call in calls) == 1
    captions = "checkpoints/foreign/vision_language.py"
    assert len(calls_of(importing[captions], "from_pretrained")) == 2
    for call in calls_of(importing[captions], "from_pretrained"):
        assert [ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg is None] == ["options"]
    assert "{'local_files_only': True, 'trust_remote_code': False}" in ast.unparse(importing[captions])
    # Elsewhere only our own classes are loaded by it.
    receivers = {
        ast.unparse(call.func.value)
        for path in SOURCE.rglob("*.py")
        if path.relative_to(SOURCE).as_posix() not in (place, captions)
        for call in calls_of(ast.parse(path.read_text(encoding="utf-8")), "from_pretrained")
        if isinstance(call.func, ast.Attribute)
    }
    assert receivers <= OURS


def test_nothing_is_executed_or_asked() -> None:
    """No exec, eval, input, or standard input in the package."""
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
            assert called not in ("exec", "eval", "input", "compile"), f"{path}:{node.lineno}"  # type: ignore[attr-defined]
            name = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
            assert name not in ("sys.stdin", "os.system", "os.popen", "os.execv"), f"{path}:{node.lineno}"  # type: ignore[attr-defined]
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not {"subprocess", "runpy", "code", "pdb"} & set(imported), f"{path}:{node.lineno}"  # type: ignore[attr-defined]


def test_the_check_of_our_code_sees_imports() -> None:
    tree = ast.parse("def f():\n    import transformers.x\nfrom tokenizers import y\nimport_module('transformers')")
    assert sorted(imports_of_transformers(tree)) == [2, 3, 4]
