"""The keywords of loading that scripts carry and nothing here needs: which values are accepted, which are refused.

An accepted value is the keyword's default or would change nothing. One that would be misleading if it were ignored is
an error that says what to do instead, and so is an unknown name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from ..checks import nearest, shown
from ..errors import InputError


class Keyword(NamedTuple):
    """A keyword without effect."""

    #: What to do instead of a value that asks for something; None: every value is accepted.
    instead: str | None = None


_NO_EFFECT = Keyword()
_NO_CODE = Keyword("no code of a checkpoint or a repository is ever executed; import the class yourself and call it")
_NO_ONNX = Keyword("weights are run by torch; export the model to ONNX after loading it")
_NO_CHECKER = Keyword("these pipelines have no such component; check the returned images yourself")
_SAFETENSORS = Keyword("weights are read from safetensors or .bin; convert the file first")

KEYWORDS: Mapping[str, Keyword] = {
    # Loading always maps files and fills one tensor after the other, so these ask for what happens anyway.
    "low_cpu_mem_usage": _NO_EFFECT,
    "offload_folder": _NO_EFFECT,
    "offload_state_dict": _NO_EFFECT,
    "offload_buffers": _NO_EFFECT,
    "_fast_init": _NO_EFFECT,
    # Of the download.
    "mirror": _NO_EFFECT,
    "resume_download": _NO_EFFECT,
    "local_dir_use_symlinks": _NO_EFFECT,
    "user_agent": _NO_EFFECT,
    "proxies": Keyword("set the environment variable HTTPS_PROXY, which the download reads"),
    "use_auth_token": Keyword("give it as token="),
    "local_dir": Keyword("download the repository there first (hf download --local-dir), and load that folder"),
    "return_cached_folder": Keyword("call download(), which returns the folder"),
    # Of weights, which schedulers do not have.
    "torch_dtype": _NO_EFFECT,
    "dtype": _NO_EFFECT,
    "variant": _NO_EFFECT,
    "use_safetensors": _NO_EFFECT,
    # Components and pipelines of other families.
    "safety_checker": _NO_CHECKER,
    "requires_safety_checker": _NO_CHECKER,
    "feature_extractor": _NO_CHECKER,
    "image_encoder": _NO_CHECKER,
    "add_watermarker": _NO_CHECKER,
    "load_connected_pipeline": _NO_EFFECT,
    "enable_pag": Keyword("load the pipeline without it; diffusers' PAG pipeline runs on to_diffusers(pipe)"),
    # Foreign code and foreign formats.
    "custom_pipeline": _NO_CODE,
    "custom_revision": _NO_CODE,
    "trust_remote_code": _NO_CODE,
    "provider": _NO_ONNX,
    "provider_options": _NO_ONNX,
    "sess_options": _NO_ONNX,
    "use_onnx": _NO_ONNX,
    "export": _NO_ONNX,
    "from_flax": _SAFETENSORS,
    "from_tf": _SAFETENSORS,
    "use_flashpack": _SAFETENSORS,
    "flashpack_kwargs": _SAFETENSORS,
    "dduf_file": Keyword("unpack the archive (it is a zip file) and load the folder"),
    "gguf_file": _SAFETENSORS,
    # Of models.
    "ignore_mismatched_sizes": Keyword(
        "tensors that do not fit would be left random; build the model with from_config and load those that fit"
    ),
    "keep_in_fp32_modules": Keyword("give dtype= a dict of components, or cast those modules after loading"),
    "parallel_config": Keyword("load the model without it, and distribute it after that"),
    "disable_mmap": Keyword("call the model's or the pipeline's from_pretrained with it"),
    "output_loading_info": Keyword("models return it; loading is strict, so it never lists anything"),
    "max_memory": Keyword("it goes with device_map, on a model or a pipeline"),
    "device_map": Keyword("move it after loading, with to()"),
    "quantization_config": Keyword("give it to the model, or to the pipeline"),
    "memory_budget": Keyword("give it to the pipeline"),
    "force_download": _NO_EFFECT,
}


def settle(owner: str, given: Mapping[str, Any], known: Iterable[str] = (), also: str = "") -> None:
    """Check the keywords that a ``from_pretrained`` was given beyond those it acts on.

    Args:
        owner: the class, for messages.
        known: further names, to suggest one of them.
        also: the end of the message about an unknown name.

    Raises:
        InputError: an unknown name, or a value that would be misleading if it were ignored.
    """
    for name, value in given.items():
        if name not in KEYWORDS:
            raise InputError(f"{owner} has no argument {name!r}{also}{nearest(name, [*known, *KEYWORDS])}")
        instead = KEYWORDS[name].instead
        if instead is not None and value is not None and value is not False and value != {}:
            raise InputError(f"{owner} cannot act on {name}={shown(value)}: {instead}")
