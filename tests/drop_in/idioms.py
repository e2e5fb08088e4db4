"""Idioms of diffusers' documentation, each a function that runs with either library and returns what it saw.

The source of each is the page of the documentation (https://huggingface.co/docs/diffusers) that teaches it; the code is
our own. ``generated.py`` adds one idiom per public method and per documented argument.
"""

from __future__ import annotations

import copy
import gc
import inspect
import io
import json
import pickle
import threading
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from .building import Make, denoise, noise


class Idiom(NamedTuple):
    name: str
    source: str
    run: Callable[[ModuleType, Make], Any]


IDIOMS: dict[str, Idiom] = {}


def idiom(source: str) -> Callable[[Callable[[ModuleType, Make], Any]], Callable[[ModuleType, Make], Any]]:
    def register(run: Callable[[ModuleType, Make], Any]) -> Callable[[ModuleType, Make], Any]:
        assert run.__name__ not in IDIOMS, run.__name__
        IDIOMS[run.__name__] = Idiom(run.__name__, source, run)
        return run

    return register


def seed(value: int = 0) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(value)


#: What nearly all calls of a small pipeline have.
CALL: dict[str, Any] = {"num_inference_steps": 3, "use_resolution_binning": False, "output_type": "latent"}


def image(seed: int = 0, size: int = 16) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


def glm_call(**changes: Any) -> dict[str, Any]:
    base = {
        "prompt": 'a sign that says "open"',
        "height": 64,
        "width": 96,
        "num_inference_steps": 2,
        "latents": noise(1, 4, 8, 12),
        "prior_token_ids": torch.arange(24)[None] % 32,
        "output_type": "latent",
    }
    return {**base, **changes}


# --- Loading: using-diffusers/loading, api/pipelines/overview, using-diffusers/other-formats, push_to_hub ---


@idiom("using-diffusers/loading#diffusionpipeline")
def a_pipeline_of_its_class(lib: ModuleType, make: Make) -> Any:
    pipe = lib.PixArtSigmaPipeline.from_pretrained(make.checkpoint())
    return sorted(pipe.components), pipe("a cat", generator=seed(), **CALL).images


@idiom("using-diffusers/loading#diffusionpipeline")
def the_class_from_the_checkpoint(lib: ModuleType, make: Make) -> Any:
    return [
        type(lib.DiffusionPipeline.from_pretrained(make.checkpoint(k)))
        for k in ("PixArtSigmaPipeline", "PixArtAlphaPipeline")
    ]


@idiom("using-diffusers/loading#pipelines")
def the_class_of_glm_image(lib: ModuleType, make: Make) -> Any:
    return type(lib.DiffusionPipeline.from_pretrained(make.checkpoint("GlmImagePipeline"))).__name__


@idiom("tutorials/autopipeline")
def auto_pipeline(lib: ModuleType, make: Make) -> Any:
    pipe = lib.AutoPipelineForText2Image.from_pretrained(make.checkpoint())
    return type(pipe), pipe("a cat", generator=seed(), **CALL).images


@idiom("tutorials/autopipeline#from_pipe")
def auto_pipeline_from_another(lib: ModuleType, make: Make) -> Any:
    pipe = make.sigma()
    other = lib.AutoPipelineForText2Image.from_pipe(pipe)
    return type(other), other.transformer is pipe.transformer


@idiom("using-diffusers/loading#specifying-model-specific-data-types")
def a_dtype(lib: ModuleType, make: Make) -> Any:
    pipe = lib.PixArtSigmaPipeline.from_pretrained(make.checkpoint(), torch_dtype=torch.bfloat16)
    return pipe.transformer.dtype, pipe.vae.dtype, pipe.text_encoder.dtype, pipe.dtype


@idiom("using-diffusers/loading#specifying-model-specific-data-types")
def a_dtype_per_component(lib: ModuleType, make: Make) -> Any:
    dtypes = {"transformer": torch.bfloat16, "default": torch.float32}
    pipe = lib.PixArtSigmaPipeline.from_pretrained(make.checkpoint(), torch_dtype=dtypes)
    return pipe.transformer.dtype, pipe.vae.dtype, pipe.text_encoder.dtype


@idiom("using-diffusers/loading#customizing-pipelines")
def another_scheduler_while_loading(lib: ModuleType, make: Make) -> Any:
    scheduler = lib.DDIMScheduler.from_pretrained(make.checkpoint(), subfolder="scheduler")
    pipe = lib.PixArtSigmaPipeline.from_pretrained(make.checkpoint(), scheduler=scheduler)
    return pipe.scheduler is scheduler, pipe("a cat", generator=seed(), **CALL).images


@idiom("using-diffusers/loading#customizing-pipelines")
def another_vae_while_loading(lib: ModuleType, make: Make) -> Any:
    vae = lib.AutoencoderKL.from_pretrained(make.checkpoint(), subfolder="vae", torch_dtype=torch.float32)
    return lib.PixArtSigmaPipeline.from_pretrained(make.checkpoint(), vae=vae).vae is vae


@idiom("using-diffusers/loading#reusing-models-in-multiple-pipelines")
def components_shared_by_construction(lib: ModuleType, make: Make) -> Any:
    one = make.sigma()
    two = lib.PixArtAlphaPipeline(**one.components)
    return two.transformer is one.transformer, two.vae is one.vae, two.scheduler is one.scheduler


@idiom("using-diffusers/loading#reusing-models-in-multiple-pipelines")
def components_shared_by_from_pipe(lib: ModuleType, make: Make) -> Any:
    one = make.sigma()
    two = lib.PixArtAlphaPipeline.from_pipe(one)
    return type(two), two.text_encoder is one.text_encoder, two.vae is one.vae


@idiom("using-diffusers/loading#reusing-models-in-multiple-pipelines")
def from_pipe_with_a_dtype(lib: ModuleType, make: Make) -> Any:
    return lib.PixArtAlphaPipeline.from_pipe(make.sigma(), torch_dtype=torch.bfloat16).transformer.dtype


@idiom("using-diffusers/loading#models")
def models_of_a_subfolder(lib: ModuleType, make: Make) -> Any:
    transformer = lib.PixArtTransformer2DModel.from_pretrained(make.checkpoint(), subfolder="transformer")
    return transformer.training, transformer.dtype, transformer.num_parameters(), transformer.config.num_layers


@idiom("using-diffusers/loading#automodel")
def auto_model(lib: ModuleType, make: Make) -> Any:
    return [type(lib.AutoModel.from_pretrained(make.checkpoint(), subfolder=n)) for n in ("transformer", "vae")]


@idiom("using-diffusers/other-formats")
def a_variant(lib: ModuleType, make: Make) -> Any:
    make.sigma().save_pretrained(make.folder, variant="fp16")
    names = sorted(p.relative_to(make.folder).as_posix() for p in make.folder.rglob("*.safetensors"))
    pipe = lib.PixArtSigmaPipeline.from_pretrained(make.folder, variant="fp16")
    return names, pipe.transformer.dtype


@idiom("using-diffusers/other-formats")
def a_variant_of_some_components(lib: ModuleType, make: Make) -> Any:
    make.sigma().save_pretrained(make.folder)
    make.pixart().half().save_pretrained(make.folder / "transformer", variant="fp16")
    return lib.PixArtSigmaPipeline.from_pretrained(make.folder, variant="fp16").config["transformer"]


@idiom("using-diffusers/loading#loading-pipelines")
def without_a_text_encoder(lib: ModuleType, make: Make) -> Any:
    pipe = lib.PixArtSigmaPipeline.from_pretrained(make.checkpoint(), text_encoder=None, tokenizer=None)
    embeds = {"prompt_embeds": noise(1, 5, 32), "prompt_attention_mask": torch.ones(1, 5)}
    negative = {"negative_prompt_embeds": noise(1, 5, 32, seed=1), "negative_prompt_attention_mask": torch.ones(1, 5)}
    return pipe(negative_prompt=None, generator=seed(), **embeds, **negative, **CALL).images


@idiom("api/pipelines/pixart#inference-with-under-8gb-gpu-vram")
def without_a_transformer(lib: ModuleType, make: Make) -> Any:
    pipe = lib.PixArtAlphaPipeline.from_pretrained(make.checkpoint("PixArtAlphaPipeline"), transformer=None)
    with torch.no_grad():
        embeds, mask, negative, negative_mask = pipe.encode_prompt("a cat")
    kept = embeds * mask[..., None], negative * negative_mask[..., None]
    return pipe.transformer is None, kept, mask, negative_mask


@idiom("using-diffusers/loading")
def keywords_that_scripts_carry(lib: ModuleType, make: Make) -> Any:
    options = {"low_cpu_mem_usage": True, "use_safetensors": True, "local_files_only": True, "force_download": False}
    pipe = lib.PixArtSigmaPipeline.from_pretrained(
        make.checkpoint(), **options, proxies=None, token=None, revision=None
    )
    return pipe.transformer.num_parameters()


@idiom("using-diffusers/loading#disable-safety-checker")
def a_safety_checker_that_is_not_there(lib: ModuleType, make: Make) -> Any:
    pipe = lib.PixArtSigmaPipeline.from_pretrained(
        make.checkpoint(), safety_checker=None, requires_safety_checker=False
    )
    return sorted(pipe.components)


@idiom("using-diffusers/loading#models")
def loading_info(lib: ModuleType, make: Make) -> Any:
    model, info = lib.PixArtTransformer2DModel.from_pretrained(
        make.checkpoint(), subfolder="transformer", output_loading_info=True
    )
    return type(model), {k: len(v) for k, v in info.items()}


@idiom("using-diffusers/loading")
def a_folder_that_is_not_there(lib: ModuleType, make: Make) -> Any:
    try:
        lib.PixArtSigmaPipeline.from_pretrained(str(make.folder / "nowhere"))
    except OSError:
        return "refused"
    return None


@idiom("using-diffusers/loading")
def a_model_that_is_not_there(lib: ModuleType, make: Make) -> Any:
    try:
        lib.PixArtTransformer2DModel.from_pretrained(make.folder)
    except OSError:
        return "refused"
    return None


@idiom("using-diffusers/loading")
def a_keyword_misspelt(lib: ModuleType, make: Make) -> Any:
    return type(lib.PixArtSigmaPipeline.from_pretrained(make.checkpoint(), torch_dytpe=torch.bfloat16))


@idiom("api/models/overview")
def sizes_that_do_not_fit(lib: ModuleType, make: Make) -> Any:
    options = {"subfolder": "transformer", "ignore_mismatched_sizes": True, "low_cpu_mem_usage": False}
    return type(lib.PixArtTransformer2DModel.from_pretrained(make.checkpoint(), caption_channels=16, **options))


@idiom("api/models/overview")
def a_tensor_that_is_missing(lib: ModuleType, make: Make) -> Any:
    make.pixart().save_pretrained(make.folder)
    file = make.folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    save_file({k: v for k, v in tensors.items() if k != "proj_out.bias"}, file, {"format": "pt"})
    return type(lib.PixArtTransformer2DModel.from_pretrained(make.folder))


@idiom("using-diffusers/push_to_hub")
def saving_pickles(lib: ModuleType, make: Make) -> Any:
    make.pixart().save_pretrained(make.folder, safe_serialization=False)
    return sorted(p.name for p in make.folder.iterdir())


@idiom("using-diffusers/push_to_hub")
def saving_and_loading_a_pipeline(lib: ModuleType, make: Make) -> Any:
    pipe = make.sigma()
    pipe.save_pretrained(make.folder, safe_serialization=True)
    again = lib.PixArtSigmaPipeline.from_pretrained(make.folder)
    found = sorted(p.relative_to(make.folder).as_posix() for p in make.folder.rglob("*.safetensors"))
    return found, *(p("a cat", generator=seed(), **CALL).images for p in (pipe, again))


@idiom("using-diffusers/push_to_hub")
def the_index_of_a_saved_pipeline(lib: ModuleType, make: Make) -> Any:
    make.sigma().save_pretrained(make.folder)
    index = json.loads((make.folder / "model_index.json").read_text())
    return {k: v for k, v in index.items() if not k.startswith("_")}, index["_class_name"]


@idiom("using-diffusers/push_to_hub")
def saving_in_shards(lib: ModuleType, make: Make) -> Any:
    make.pixart().save_pretrained(make.folder, max_shard_size="40KB")
    again = lib.PixArtTransformer2DModel.from_pretrained(make.folder)
    return len(list(make.folder.glob("*.safetensors"))) > 1, again.state_dict()["proj_out.weight"]


@idiom("using-diffusers/push_to_hub")
def pushing_a_model(lib: ModuleType, make: Make) -> Any:
    with make.hub():
        make.pixart().push_to_hub("me/model", private=True)
    return make.uploads


@idiom("using-diffusers/push_to_hub")
def pushing_a_scheduler(lib: ModuleType, make: Make) -> Any:
    with make.hub():
        make.scheduler().push_to_hub("me/scheduler")
    return make.uploads


@idiom("using-diffusers/push_to_hub")
def pushing_a_pipeline(lib: ModuleType, make: Make) -> Any:
    with make.hub():
        make.sigma().push_to_hub("me/pipeline", commit_message="first")
    return make.uploads


@idiom("using-diffusers/loading")
def registering_a_component(lib: ModuleType, make: Make) -> Any:
    pipe = make.sigma()
    scheduler = make.scheduler("DDIMScheduler")
    pipe.register_modules(scheduler=scheduler)
    return pipe.scheduler is scheduler, pipe.config["scheduler"]


@idiom("tutorials/basic")
def assigning_a_component(lib: ModuleType, make: Make) -> Any:
    pipe = make.sigma()
    pipe.vae = make.vae(scaling_factor=0.5)
    return pipe.components["vae"] is pipe.vae, pipe("a cat", generator=seed(), **{**CALL, "output_type": "np"}).images


@idiom("api/pipelines/overview#diffusers.DiffusionPipeline")
def the_config_of_a_pipeline(lib: ModuleType, make: Make) -> Any:
    pipe = make.sigma()
    return isinstance(pipe.config, dict), dict(pipe.config)


@idiom("api/pipelines/overview#diffusers.DiffusionPipeline")
def where_a_pipeline_came_from(lib: ModuleType, make: Make) -> Any:
    pipe = lib.PixArtSigmaPipeline.from_pretrained(make.checkpoint())
    return pipe.name_or_path == make.checkpoint(), pipe.config_name


# --- Configs and outputs: api/configuration, api/outputs ---


@idiom("api/configuration")
def a_config_is_a_dict(lib: ModuleType, make: Make) -> Any:
    config = make.pixart().config
    return (
        isinstance(config, dict),
        config["num_layers"],
        config.num_layers,
        config.get("missing", 3),
        "sample_size" in config,
    )


@idiom("api/configuration")
def a_config_cannot_be_popped(lib: ModuleType, make: Make) -> Any:
    raised = []
    for change in (lambda c: c.update(a=1), lambda c: c.pop("num_layers"), lambda c: c.setdefault("a", 1)):
        try:
            change(make.pixart().config)
            raised.append(None)
        except Exception:
            raised.append("refused")
    return raised


@idiom("api/configuration")
def a_config_assigned_to(lib: ModuleType, make: Make) -> Any:
    scheduler = make.scheduler("DDIMScheduler")
    scheduler.config.clip_sample = False
    return scheduler.config.clip_sample


@idiom("using-diffusers/weighted_prompts")
def embeddings_of_padding(lib: ModuleType, make: Make) -> Any:
    with torch.no_grad():
        return make.sigma().encode_prompt("a cat", do_classifier_free_guidance=False)[0]


@idiom("api/configuration")
def a_config_as_json(lib: ModuleType, make: Make) -> Any:
    return json.loads(make.scheduler().to_json_string()), json.loads(json.dumps(dict(make.vae().config)))


@idiom("api/configuration")
def a_config_merged(lib: ModuleType, make: Make) -> Any:
    merged = make.scheduler("DDIMScheduler").config | {"steps_offset": 1}
    return {k: v for k, v in dict(merged).items() if not k.startswith("_")}


@idiom("api/configuration")
def a_config_copied(lib: ModuleType, make: Make) -> Any:
    config = make.pixart().config
    return copy.deepcopy(config) == config, pickle.loads(pickle.dumps(config)) == config


@idiom("api/configuration")
def a_model_from_a_config(lib: ModuleType, make: Make) -> Any:
    model = make.pixart()
    again = type(model).from_config(model.config, num_layers=1)
    return again.config.num_layers, again.config.sample_size, again.num_parameters()


@idiom("api/configuration")
def a_config_from_a_folder(lib: ModuleType, make: Make) -> Any:
    config = lib.PixArtTransformer2DModel.load_config(make.checkpoint(), subfolder="transformer")
    return type(config), lib.PixArtTransformer2DModel.from_config(config).num_parameters()


@idiom("api/configuration")
def unused_keywords_returned(lib: ModuleType, make: Make) -> Any:
    _, unused = lib.DDIMScheduler.from_config(make.scheduler().config, return_unused_kwargs=True, extra=3)
    return {k: v for k, v in unused.items() if k == "extra"}


@idiom("api/configuration")
def a_config_saved(lib: ModuleType, make: Make) -> Any:
    make.scheduler().save_config(make.folder)
    written = json.loads((make.folder / "scheduler_config.json").read_text())
    return written, lib.DDIMScheduler.from_pretrained(make.folder).config.beta_end


@idiom("api/configuration")
def a_config_file(lib: ModuleType, make: Make) -> Any:
    make.vae().to_json_file(make.folder / "x.json")
    return json.loads((make.folder / "x.json").read_text())


@idiom("api/outputs")
def an_output_in_every_way(lib: ModuleType, make: Make) -> Any:
    output = make.pixart()(**pixart_inputs())
    return list(output.keys()), output.sample, output["sample"], output[0], len(output.to_tuple()), "sample" in output


@idiom("api/outputs")
def an_output_is_an_ordered_dict(lib: ModuleType, make: Make) -> Any:
    output = make.scheduler("DDIMScheduler")
    output.set_timesteps(2)
    found = output.step(noise(1, 2, 4, 4), 500, noise(1, 2, 4, 4, seed=1))
    return isinstance(found, dict), list(found), list(found.values()), len(found)


@idiom("api/outputs")
def an_output_changed(lib: ModuleType, make: Make) -> Any:
    output = make.sigma()("a cat", generator=seed(), **CALL)
    output.images = output.images * 2
    output["images"] = output["images"] + 1
    return output[0], type(output).__name__


@idiom("api/outputs")
def an_output_as_a_pytree(lib: ModuleType, make: Make) -> Any:
    output = make.pixart()(**pixart_inputs())
    doubled = torch.utils._pytree.tree_map(lambda x: 2 * x, output)
    return type(doubled).__name__, doubled.sample


@idiom("api/outputs")
def tuples_instead(lib: ModuleType, make: Make) -> Any:
    pipe = make.sigma()
    found = pipe("a cat", generator=seed(), return_dict=False, **CALL)
    return type(found), found[0], pipe.vae.decode(noise(1, 4, 4, 4), return_dict=False)


# --- Schedulers: using-diffusers/schedulers, api/schedulers/* ---

SWAPS = (
    "DDIMScheduler",
    "DDPMScheduler",
    "LCMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "UniPCMultistepScheduler",
    "HeunDiscreteScheduler",
    "DEISMultistepScheduler",
    "KDPM2DiscreteScheduler",
    "DPMSolverSinglestepScheduler",
    "DPMSolverMultistepScheduler",
)


def _swap(name: str) -> None:
    def run(lib: ModuleType, make: Make) -> Any:
        import diffusers

        pipe = make.sigma()
        target = getattr(lib if hasattr(lib, name) else diffusers, name)
        pipe.scheduler = target.from_config(pipe.scheduler.config)
        kept = {k: v for k, v in pipe.scheduler.config.items() if not k.startswith("_")}
        return kept, pipe("a cat", generator=seed(), **CALL).images

    run.__name__ = f"a_scheduler_swapped_for_{name}"
    idiom("using-diffusers/schedulers")(run)


for _name in SWAPS:
    _swap(_name)


@idiom("using-diffusers/schedulers#timestep-spacing")
def options_while_swapping(lib: ModuleType, make: Make) -> Any:
    options = {"timestep_spacing": "trailing", "use_karras_sigmas": True, "algorithm_type": "sde-dpmsolver++"}
    scheduler = lib.DPMSolverMultistepScheduler.from_config(make.scheduler("DDIMScheduler").config, **options)
    return scheduler.config.timestep_spacing, denoise(scheduler)


@idiom("using-diffusers/schedulers#rescale-noise-schedule")
def zero_terminal_snr(lib: ModuleType, make: Make) -> Any:
    options = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
    return denoise(make.scheduler("DDIMScheduler", **options))


@idiom("using-diffusers/schedulers")
def compatible_schedulers(lib: ModuleType, make: Make) -> Any:
    found = {c.__name__ for c in make.scheduler().compatibles}
    return sorted(found & {"DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler", "LCMScheduler"})


@idiom("using-diffusers/schedulers")
def a_scheduler_printed(lib: ModuleType, make: Make) -> Any:
    return type(make.scheduler()).__name__ in repr(make.scheduler()), "beta_start" in repr(make.scheduler())


@idiom("using-diffusers/schedulers#custom-timesteps")
def custom_timesteps(lib: ModuleType, make: Make) -> Any:
    call = {k: v for k, v in CALL.items() if k != "num_inference_steps"}
    pipe = make.sigma()
    images = pipe("a cat", timesteps=[900, 500, 30], generator=seed(), **call).images
    return images, pipe.scheduler.timesteps


@idiom("api/schedulers/multistep_dpm_solver")
def karras_sigmas(lib: ModuleType, make: Make) -> Any:
    return denoise(make.scheduler(use_karras_sigmas=True, algorithm_type="sde-dpmsolver++", solver_order=2))


@idiom("api/schedulers/multistep_dpm_solver")
def a_solver_midway(lib: ModuleType, make: Make) -> Any:
    scheduler = make.scheduler()
    scheduler.set_timesteps(6)
    scheduler.set_begin_index(3)
    found = scheduler.step(noise(1, 2, 4, 4), scheduler.timesteps[3], noise(1, 2, 4, 4, seed=1))
    return scheduler.step_index, scheduler.begin_index, found.prev_sample


@idiom("api/schedulers/ddim")
def eta(lib: ModuleType, make: Make) -> Any:
    scheduler = make.scheduler("DDIMScheduler", clip_sample=False)
    scheduler.set_timesteps(5)
    return scheduler.step(noise(1, 2, 4, 4), 400, noise(1, 2, 4, 4, seed=1), eta=0.5, generator=seed()).prev_sample


@idiom("api/schedulers/ddpm")
def attributes_that_scripts_read(lib: ModuleType, make: Make) -> Any:
    scheduler = make.scheduler("DDPMScheduler")
    return (
        scheduler.alphas_cumprod[:5],
        scheduler.betas[-1],
        len(scheduler),
        scheduler.init_noise_sigma,
        scheduler.order,
    )


@idiom("api/schedulers/flow_match_euler_discrete")
def flow_matching_shifted(lib: ModuleType, make: Make) -> Any:
    scheduler = make.scheduler("FlowMatchEulerDiscreteScheduler", use_dynamic_shifting=True)
    return denoise(scheduler, mu=0.7), scheduler.sigmas


@idiom("api/schedulers/flow_match_euler_discrete")
def flow_matching_from_sigmas(lib: ModuleType, make: Make) -> Any:
    scheduler = make.scheduler("FlowMatchEulerDiscreteScheduler", shift=3.0)
    scheduler.set_timesteps(sigmas=[1.0, 0.5, 0.2])
    return scheduler.timesteps, scheduler.sigmas


@idiom("api/schedulers/lcm")
def few_steps(lib: ModuleType, make: Make) -> Any:
    pipe = make.alpha(scheduler=make.scheduler("LCMScheduler"))
    return pipe("a cat", guidance_scale=0.0, generator=seed(), **CALL).images


@idiom("api/schedulers/overview")
def a_foreign_scheduler_in_a_pipeline(lib: ModuleType, make: Make) -> Any:
    pipe = make.sigma(scheduler=make.scheduler("EulerDiscreteScheduler"))
    return pipe("a cat", generator=seed(), **CALL).images


@idiom("api/schedulers/overview")
def scaling_of_a_models_input(lib: ModuleType, make: Make) -> Any:
    scheduler = make.scheduler()
    return scheduler.scale_model_input(noise(1, 2, 4, 4), 3), hasattr(scheduler, "set_timesteps"), scheduler.order


# --- Callbacks: using-diffusers/callback ---


@idiom("using-diffusers/callback")
def the_old_callback(lib: ModuleType, make: Make) -> Any:
    seen: list[Any] = []
    make.sigma()(
        "a cat",
        generator=seed(),
        callback=lambda i, t, latents: seen.append((i, int(t), latents)),
        callback_steps=1,
        **CALL,
    )
    return seen


@idiom("using-diffusers/callback")
def a_callback_changes_latents(lib: ModuleType, make: Make) -> Any:
    def change(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"latents": tensors["latents"] * 0.5}

    return make.glm()(**glm_call(callback_on_step_end=change)).images


@idiom("using-diffusers/callback#early-stopping")
def a_callback_interrupts(lib: ModuleType, make: Make) -> Any:
    steps: list[int] = []

    def stop(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        steps.append(step)
        pipe._interrupt = step == 1
        return tensors

    pipe = make.glm()
    return pipe(**glm_call(num_inference_steps=4, callback_on_step_end=stop)).images, steps, pipe.interrupt


@idiom("using-diffusers/callback#dynamic-classifier-free-guidance")
def a_callback_ends_guidance(lib: ModuleType, make: Make) -> Any:
    seen: list[Any] = []

    def cut(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append((pipe.guidance_scale, pipe.do_classifier_free_guidance, pipe.num_timesteps))
        pipe._guidance_scale = 1.0
        return {}

    return make.glm()(**glm_call(num_inference_steps=3, callback_on_step_end=cut)).images, seen


@idiom("using-diffusers/callback")
def a_callback_asks_for_embeddings(lib: ModuleType, make: Make) -> Any:
    seen: list[Any] = []

    def look(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(sorted(tensors))
        return tensors

    names = ["latents", "prompt_embeds"]
    call = glm_call(callback_on_step_end=look, callback_on_step_end_tensor_inputs=names)
    return make.glm()(**call).images, seen


@idiom("using-diffusers/callback")
def a_callback_asks_for_what_is_not_there(lib: ModuleType, make: Make) -> Any:
    try:
        make.glm()(**glm_call(callback_on_step_end=print, callback_on_step_end_tensor_inputs=["nothing"]))
    except ValueError:
        return "refused"
    return None


@idiom("using-diffusers/callback#display-image-after-each-generation-step")
def previews_by_a_callback(lib: ModuleType, make: Make) -> Any:
    previews: list[Any] = []
    pipe = make.sigma()

    def preview(step: int, timestep: Any, latents: torch.Tensor) -> None:
        decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor, return_dict=False)[0]
        previews.append(pipe.image_processor.postprocess(decoded.detach(), output_type="np"))

    with torch.no_grad():
        pipe("a cat", generator=seed(), callback=preview, callback_steps=1, **CALL)
    return previews


@idiom("using-diffusers/callback")
def what_a_pipeline_says_after_a_call(lib: ModuleType, make: Make) -> Any:
    pipe = make.glm()
    pipe(**glm_call(attention_kwargs={}))
    return (
        pipe.guidance_scale,
        pipe.num_timesteps,
        pipe.interrupt,
        pipe.attention_kwargs,
        pipe.do_classifier_free_guidance,
    )


@idiom("using-diffusers/callback#official-callbacks")
def callback_classes(lib: ModuleType, make: Make) -> Any:
    module = import_module(f"{lib.__name__}.callbacks")
    cut = module.SDCFGCutoffCallback(cutoff_step_ratio=0.4)
    return cut.tensor_inputs, module.MultiPipelineCallbacks([cut, cut]).tensor_inputs


@idiom("api/pipelines/overview")
def a_progress_bar(lib: ModuleType, make: Make) -> Any:
    pipe = make.sigma()
    pipe.set_progress_bar_config(disable=True, desc="x")
    with pipe.progress_bar(total=3) as bar:
        bar.update()
        return bar.total, list(pipe.progress_bar(range(3)))


# --- Reproducibility and batches: using-diffusers/reusing_seeds, batched_inference ---


@idiom("using-diffusers/reusing_seeds")
def one_generator(lib: ModuleType, make: Make) -> Any:
    return make.sigma()("a cat", generator=seed(7), num_images_per_prompt=2, **CALL).images


@idiom("using-diffusers/reusing_seeds")
def a_generator_per_image(lib: ModuleType, make: Make) -> Any:
    return make.sigma()(["a cat", "a cube"], generator=[seed(i) for i in range(2)], **CALL).images


@idiom("using-diffusers/reusing_seeds")
def the_global_seed(lib: ModuleType, make: Make) -> Any:
    torch.manual_seed(3)
    return make.sigma()("a cat", **CALL).images


@idiom("using-diffusers/reusing_seeds")
def random_tensors(lib: ModuleType, make: Make) -> Any:
    randn_tensor = import_module(f"{lib.__name__}.utils.torch_utils").randn_tensor
    two = randn_tensor((2, 3), generator=[seed(0), seed(1)], device=torch.device("cpu"), dtype=torch.float32)
    return randn_tensor((2, 3), generator=seed()), two


@idiom("using-diffusers/batched_inference")
def a_batch(lib: ModuleType, make: Make) -> Any:
    prompts = ["a red cube", "a cat on a wall , a painting", ""]
    return make.alpha()(prompts, negative_prompt=["dark", "", "grey"], generator=seed(), **CALL).images


@idiom("using-diffusers/batched_inference")
def too_few_generators(lib: ModuleType, make: Make) -> Any:
    try:
        make.sigma()(["a", "b", "c"], generator=[seed(), seed()], **CALL)
    except ValueError:
        return "refused"
    return None


@idiom("using-diffusers/write_own_pipeline")
def given_latents(lib: ModuleType, make: Make) -> Any:
    return make.sigma()("a cat", latents=noise(1, 4, 8, 8), **CALL).images


@idiom("tutorials/basic")
def arrays_and_images(lib: ModuleType, make: Make) -> Any:
    pipe = make.sigma()
    return [pipe("a cat", generator=seed(), **{**CALL, "output_type": t}).images for t in ("pil", "np", "pt")]


@idiom("using-diffusers/batched_inference")
def prompts_and_embeddings_together(lib: ModuleType, make: Make) -> Any:
    try:
        make.sigma()("a cat", prompt_embeds=noise(1, 5, 32), prompt_attention_mask=torch.ones(1, 5), **CALL)
    except ValueError:
        return "refused"
    return None


# --- Pipelines: api/pipelines/pixart, pixart_sigma, glm_image; write_own_pipeline; weighted_prompts ---


@idiom("using-diffusers/weighted_prompts")
def embeddings_computed_before(lib: ModuleType, make: Make) -> Any:
    pipe = make.sigma()
    with torch.no_grad():
        names = ["prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask"]
        embeds = dict(zip(names, pipe.encode_prompt("a cat", negative_prompt="dark", device="cpu")))
    return pipe(None, negative_prompt=None, generator=seed(), **embeds, **CALL).images


@idiom("api/pipelines/pixart#inference-with-under-8gb-gpu-vram")
def stages_with_little_memory(lib: ModuleType, make: Make) -> Any:
    pipe = lib.PixArtAlphaPipeline.from_pretrained(make.checkpoint("PixArtAlphaPipeline"), transformer=None)
    with torch.no_grad():
        names = ["prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask"]
        embeds = dict(zip(names, pipe.encode_prompt("a cat")))
    del pipe
    gc.collect()
    pipe = lib.PixArtAlphaPipeline.from_pretrained(make.checkpoint("PixArtAlphaPipeline"), text_encoder=None)
    latents = pipe(negative_prompt=None, **embeds, num_images_per_prompt=1, generator=seed(), **CALL).images
    with torch.no_grad():
        image = pipe.vae.decode(latents / pipe.vae.config.scaling_factor, return_dict=False)[0]
    return pipe.image_processor.postprocess(image, output_type="pil")


@idiom("using-diffusers/write_own_pipeline")
def the_loop_by_hand(lib: ModuleType, make: Make) -> Any:
    pipe = make.sigma()
    with torch.no_grad():
        embeds, mask, negative, negative_mask = pipe.encode_prompt("a cat", do_classifier_free_guidance=True)
        both, masks = torch.cat([negative, embeds]), torch.cat([negative_mask, mask])
        latents = noise(1, 4, 8, 8) * pipe.scheduler.init_noise_sigma
        pipe.scheduler.set_timesteps(3, device="cpu")
        for t in pipe.progress_bar(pipe.scheduler.timesteps):
            inputs = pipe.scheduler.scale_model_input(torch.cat([latents] * 2), t)
            predicted = pipe.transformer(
                inputs,
                encoder_hidden_states=both,
                encoder_attention_mask=masks,
                timestep=t.expand(2),
                added_cond_kwargs={"resolution": None, "aspect_ratio": None},
                return_dict=False,
            )[0]
            uncond, cond = predicted.chunk(2)
            guided = (uncond + 4.5 * (cond - uncond)).chunk(2, dim=1)[0]
            latents = pipe.scheduler.step(guided, t, latents, return_dict=False)[0]
    return latents


@idiom("using-diffusers/img2img")
def image_to_image_by_hand(lib: ModuleType, make: Make) -> Any:
    pipe = make.sigma()
    with torch.no_grad():
        pixels = pipe.image_processor.preprocess(image())
        latents = pipe.vae.encode(pixels).latent_dist.sample(seed()) * pipe.vae.config.scaling_factor
        pipe.scheduler.set_timesteps(4)
        timesteps = pipe.scheduler.timesteps[2:]
        latents = pipe.scheduler.add_noise(latents, noise(*latents.shape), timesteps[:1])
        embeds, mask, *_ = pipe.encode_prompt("a cat", do_classifier_free_guidance=False)
        for t in timesteps:
            predicted = pipe.transformer(latents, embeds, t[None], {}, encoder_attention_mask=mask).sample
            latents = pipe.scheduler.step(predicted.chunk(2, dim=1)[0], t, latents).prev_sample
    return latents


@idiom("api/pipelines/pixart")
def bins_of_aspect_ratios(lib: ModuleType, make: Make) -> Any:
    module = import_module(f"{lib.__name__}.pipelines.pixart_alpha.pipeline_pixart_alpha")
    sigma = import_module(f"{lib.__name__}.pipelines.pixart_alpha.pipeline_pixart_sigma")
    return (
        module.ASPECT_RATIO_512_BIN,
        module.ASPECT_RATIO_1024_BIN,
        module.ASPECT_RATIO_256_BIN,
        sigma.ASPECT_RATIO_2048_BIN,
    )


@idiom("api/pipelines/pixart")
def a_size_in_bins(lib: ModuleType, make: Make) -> Any:
    four = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    vae = make.vae(block_out_channels=[8] * 4, **four)
    pipe = make.sigma(transformer=make.pixart(sample_size=32), vae=vae)
    call = {"num_inference_steps": 1, "output_type": "pil", "generator": seed()}
    return [i.size for i in pipe("a cat", height=100, width=150, **call).images]


@idiom("api/pipelines/pixart")
def a_size_that_does_not_fit(lib: ModuleType, make: Make) -> Any:
    try:
        make.sigma()("a cat", height=13, width=16, **CALL)
    except ValueError:
        return "refused"
    return None


@idiom("api/pipelines/pixart")
def helpers_of_the_pipeline(lib: ModuleType, make: Make) -> Any:
    pipe = make.sigma()
    latents = pipe.prepare_latents(1, 4, 16, 16, torch.float32, torch.device("cpu"), seed())
    extra = pipe.prepare_extra_step_kwargs(seed(), 0.3)
    return latents, sorted(extra), pipe._execution_device, pipe.vae_scale_factor


@idiom("api/pipelines/pixart")
def cleaned_captions(lib: ModuleType, make: Make) -> Any:
    pipe = make.sigma()
    texts = ["A <b>Cat</b> &amp; dog https://example.com (640x480)", "“quotes” @name #123456 file.jpg"]
    return [pipe._clean_caption(t) for t in texts], pipe._text_preprocessing(texts, clean_caption=False)


@idiom("api/pipelines/pixart")
def checked_inputs(lib: ModuleType, make: Make) -> Any:
    pipe = make.sigma()
    found = []
    for arguments in (("a cat", 16, 16, "", 1), (None, 16, 16, "", 1), ("a cat", 15, 16, "", 1), (3, 16, 16, None, 1)):
        try:
            found.append(pipe.check_inputs(*arguments))
        except ValueError:
            found.append("refused")
    return found


@idiom("using-diffusers/weighted_prompts")
def a_prompt_and_its_embeddings(lib: ModuleType, make: Make) -> Any:
    embeds = {"prompt_embeds": noise(1, 5, 32), "prompt_attention_mask": torch.ones(1, 5)}
    with torch.no_grad():
        return make.sigma().encode_prompt("a cat", do_classifier_free_guidance=False, **embeds)[0]


@idiom("api/pipelines/glm_image")
def images_and_their_batch(lib: ModuleType, make: Make) -> Any:
    call = glm_call(prompt=['a sign that says "open"', "a cube"], latents=noise(2, 4, 8, 12))
    call["prior_token_ids"] = call["prior_token_ids"].repeat(2, 1)
    return make.glm()(**call).images


@idiom("api/pipelines/pixart")
def micro_conditions(lib: ModuleType, make: Make) -> Any:
    transformer = make.pixart(sample_size=128, use_additional_conditions=True)
    conditions = {"resolution": torch.tensor([[1024.0, 512.0]]), "aspect_ratio": torch.tensor([[2.0]])}
    return transformer(**{**pixart_inputs(), "added_cond_kwargs": conditions}).sample


@idiom("api/pipelines/glm_image")
def glm_image(lib: ModuleType, make: Make) -> Any:
    return make.glm()(**glm_call(output_type="pil")).images


@idiom("api/pipelines/glm_image")
def glyphs_of_a_prompt(lib: ModuleType, make: Make) -> Any:
    return make.glm().get_glyph_texts(["a sign 'a' and “b” and \"c\" and 「d」"])


@idiom("api/pipelines/glm_image")
def glm_image_prompt_embeddings(lib: ModuleType, make: Make) -> Any:
    with torch.no_grad():
        return make.glm().encode_prompt('a sign that says "open"', num_images_per_prompt=2, device="cpu")


@idiom("api/models/pixart_transformer2d")
def a_forward_pass(lib: ModuleType, make: Make) -> Any:
    return make.pixart()(**pixart_inputs(2), return_dict=False)


@idiom("api/models/glm_image_transformer2d")
def a_forward_pass_of_glm_image(lib: ModuleType, make: Make) -> Any:
    return make.glm_transformer()(**glm_inputs()).sample


@idiom("api/models/autoencoderkl")
def encoding_and_decoding(lib: ModuleType, make: Make) -> Any:
    vae = make.vae()
    posterior = vae.encode(noise(1, 3, 16, 16)).latent_dist
    return posterior.mode(), posterior.sample(seed()), posterior.kl(), vae.decode(posterior.mean).sample


@idiom("api/models/autoencoderkl")
def a_whole_autoencoder(lib: ModuleType, make: Make) -> Any:
    return make.vae()(noise(1, 3, 16, 16), sample_posterior=True, generator=seed()).sample


@idiom("api/image_processor")
def image_processing(lib: ModuleType, make: Make) -> Any:
    processor = import_module(f"{lib.__name__}.image_processor").VaeImageProcessor(vae_scale_factor=8)
    pixels = processor.preprocess(image(1, 37), height=32, width=24)
    return pixels, processor.postprocess(pixels, output_type="np"), processor.config.vae_scale_factor


@idiom("api/image_processor")
def a_mask_processed(lib: ModuleType, make: Make) -> Any:
    module = import_module(f"{lib.__name__}.image_processor")
    options = {"do_normalize": False, "do_binarize": True, "do_convert_grayscale": True}
    processor = module.VaeImageProcessor(vae_scale_factor=8, **options)
    mask = processor.preprocess(image(2, 32))
    return mask, processor.blur(image(3), 2), processor.get_crop_region(image(4).convert("L"), 16, 16, 2)


@idiom("api/image_processor")
def denormalized(lib: ModuleType, make: Make) -> Any:
    processor = make.sigma().image_processor
    values = noise(1, 3, 4, 4)
    arrays = processor.pt_to_numpy(processor.denormalize(values))
    return arrays, processor.numpy_to_pil(arrays), processor.numpy_to_pt(arrays), processor.normalize(values)


@idiom("api/utilities")
def a_grid_of_images(lib: ModuleType, make: Make) -> Any:
    grid = import_module(f"{lib.__name__}.utils").make_image_grid([image(i) for i in range(4)], rows=2, cols=2)
    return grid.size, grid


@idiom("api/utilities")
def an_image_loaded(lib: ModuleType, make: Make) -> Any:
    image(5).save(make.folder / "a.png")
    load_image = import_module(f"{lib.__name__}.utils").load_image
    return load_image(str(make.folder / "a.png")), load_image(image(5))


@idiom("api/utilities")
def numpy_to_pil(lib: ModuleType, make: Make) -> Any:
    return make.sigma().numpy_to_pil(np.random.default_rng(0).random((2, 4, 4, 3)))


@idiom("api/logging")
def verbosity(lib: ModuleType, make: Make) -> Any:
    logging = import_module(f"{lib.__name__}.utils").logging
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    during = logging.get_verbosity()
    logging.set_verbosity(before)
    return during, type(logging.get_logger(f"{lib.__name__}.x"))


@idiom("using-diffusers/loading#diffusionpipeline")
def a_pipeline_printed(lib: ModuleType, make: Make) -> Any:
    name, config = str(make.sigma()).split(" ", 1)
    return name, json.loads(config)


@idiom("using-diffusers/custom_pipeline_overview")
def a_subclass_that_encodes_prompts_otherwise(lib: ModuleType, make: Make) -> Any:
    class Halved(lib.PixArtSigmaPipeline):
        def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
            embeds, *others = super().encode_prompt(*args, **kwargs)
            return embeds / 2, *others

    pipe = Halved(**make.sigma().components)
    pipe.set_progress_bar_config(disable=True)
    return pipe("a cat", generator=seed(), **CALL).images


@idiom("using-diffusers/custom_pipeline_overview")
def methods_replaced_on_the_object(lib: ModuleType, make: Make) -> Any:
    pipe = make.sigma()
    calls: list[str] = []
    for owner, name in ((pipe.transformer, "forward"), (pipe.scheduler, "step"), (pipe.vae, "decode")):
        original = getattr(owner, name)

        def counted(*args: Any, original: Any = original, name: str = name, **kwargs: Any) -> Any:
            calls.append(name)
            return original(*args, **kwargs)

        setattr(owner, name, counted)
    images = pipe("a cat", generator=seed(), **{**CALL, "output_type": "np"}).images
    return images, calls


@idiom("api/models/overview")
def blocks_removed_and_skipped(lib: ModuleType, make: Make) -> Any:
    shorter, skipping = make.pixart(), make.pixart()
    shorter.transformer_blocks = shorter.transformer_blocks[:1]
    skipping.transformer_blocks[0].forward = lambda hidden_states, *args, **kwargs: hidden_states
    return shorter(**pixart_inputs()).sample, skipping(**pixart_inputs()).sample


@idiom("api/models/overview")
def hooks_that_change_blocks(lib: ModuleType, make: Make) -> Any:
    pipe = make.sigma()
    blocks, outputs = pipe.transformer.transformer_blocks, []
    blocks[0].register_forward_pre_hook(lambda module, args: (args[0] * 1.1, *args[1:]))
    blocks[1].register_forward_hook(lambda module, args, output: outputs.append(output))
    return pipe("a cat", generator=seed(), **CALL).images, outputs


@idiom("api/models/overview")
def names_of_modules(lib: ModuleType, make: Make) -> Any:
    models = make.pixart(), make.vae(), make.glm_transformer()
    return [sorted(n for n, module in m.named_modules() if list(module.parameters())) for m in models]


@idiom("api/models/overview")
def names_of_all_modules(lib: ModuleType, make: Make) -> Any:
    return sorted(name for name, _ in make.glm_transformer().named_modules())


@idiom("api/pipelines/overview#diffusers.DiffusionPipeline")
def pipelines_copied_and_pickled(lib: ModuleType, make: Make) -> Any:
    pipes = copy.deepcopy(make.sigma()), pickle.loads(pickle.dumps(make.sigma()))
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
    return [pipe("a cat", generator=seed(), **CALL).images for pipe in pipes]


@idiom("optimization/memory#device-placement")
def a_device_map(lib: ModuleType, make: Make) -> Any:
    pipe = lib.PixArtSigmaPipeline.from_pretrained(make.checkpoint(), device_map="cpu")
    return bool(pipe.hf_device_map), pipe.device


@idiom("training/overview")
def an_offload_by_accelerate(lib: ModuleType, make: Make) -> Any:
    import accelerate

    offloaded, dispatched = make.pixart(), make.pixart()
    accelerate.cpu_offload(offloaded, execution_device="cpu")
    accelerate.dispatch_model(dispatched, {"": "cpu"}, main_device="cpu")
    return offloaded(**pixart_inputs()).sample, dispatched(**pixart_inputs()).sample


# --- Memory: optimization/memory ---


@idiom("optimization/memory#sliced-vae")
def sliced_decoding(lib: ModuleType, make: Make) -> Any:
    pipe = make.sigma()
    pipe.vae.enable_slicing()
    return pipe(["a", "b"], generator=seed(), **{**CALL, "output_type": "np"}).images, pipe.vae.use_slicing


@idiom("optimization/memory#tiled-vae")
def tiling_that_a_small_image_does_not_need(lib: ModuleType, make: Make) -> Any:
    vae = make.vae()
    vae.enable_tiling()
    return vae.decode(noise(1, 4, 4, 4)).sample, vae.use_tiling


@idiom("optimization/memory#tiled-vae")
def the_sizes_of_tiles(lib: ModuleType, make: Make) -> Any:
    vae = make.vae()
    found = vae.tile_sample_min_size, vae.tile_latent_min_size, vae.tile_overlap_factor
    vae.tile_latent_min_size = 6
    return found, vae.tile_latent_min_size


@idiom("optimization/memory#model-offloading")
def offload_without_a_gpu(lib: ModuleType, make: Make) -> Any:
    pipe = make.sigma()
    pipe.enable_model_cpu_offload(device="cpu")
    return pipe("a cat", generator=seed(), **CALL).images


@idiom("optimization/memory#cpu-offloading")
def sequential_offload_without_a_gpu(lib: ModuleType, make: Make) -> Any:
    pipe = make.sigma()
    pipe.enable_sequential_cpu_offload(device="cpu")
    return pipe("a cat", generator=seed(), **CALL).images


@idiom("optimization/memory#group-offloading")
def group_offload_of_a_model(lib: ModuleType, make: Make) -> Any:
    model = make.pixart()
    cpu = torch.device("cpu")
    model.enable_group_offload(
        onload_device=cpu, offload_device=cpu, offload_type="block_level", num_blocks_per_group=1, use_stream=False
    )
    return model(**pixart_inputs()).sample


@idiom("optimization/memory#group-offloading")
def group_offload_of_leaves(lib: ModuleType, make: Make) -> Any:
    model = make.vae()
    model.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    return model.decode(noise(1, 4, 4, 4)).sample


@idiom("optimization/memory#group-offloading")
def group_offload_of_a_pipeline(lib: ModuleType, make: Make) -> Any:
    pipe = make.sigma()
    pipe.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level", exclude_modules=["vae"])
    return pipe("a cat", generator=seed(), **CALL).images


@idiom("optimization/memory#group-offloading")
def group_offload_by_function(lib: ModuleType, make: Make) -> Any:
    model = make.pixart()
    apply = import_module(f"{lib.__name__}.hooks").apply_group_offloading
    apply(model, onload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=2)
    return model(**pixart_inputs()).sample


@idiom("optimization/memory#layerwise-casting")
def layers_stored_in_float8(lib: ModuleType, make: Make) -> Any:
    model = make.pixart()
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    stored = model.transformer_blocks[0].attn1.to_q.weight.dtype
    with torch.no_grad():
        return stored, model.proj_out.weight.dtype, model(**pixart_inputs()).sample


@idiom("optimization/memory#layerwise-casting")
def layerwise_casting_by_function(lib: ModuleType, make: Make) -> Any:
    model = make.vae()
    apply = import_module(f"{lib.__name__}.hooks").apply_layerwise_casting
    apply(model, storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    with torch.no_grad():
        return model.decode(noise(1, 4, 4, 4)).sample


@idiom("optimization/memory")
def memory_footprint(lib: ModuleType, make: Make) -> Any:
    model = make.glm_transformer()
    return model.get_memory_footprint(), model.get_memory_footprint(return_buffers=False), model.num_parameters()


@idiom("optimization/memory")
def devices_and_hooks(lib: ModuleType, make: Make) -> Any:
    pipe = make.sigma()
    pipe.remove_all_hooks()
    pipe.maybe_free_model_hooks()
    return pipe.device, pipe.hf_device_map, pipe.to("cpu") is pipe, pipe.model_cpu_offload_seq


@idiom("optimization/memory")
def moving_with_a_dtype(lib: ModuleType, make: Make) -> Any:
    pipe = make.sigma().to("cpu", torch.bfloat16)
    return pipe.dtype, pipe.transformer.dtype, pipe.vae.dtype


@idiom("optimization/memory#channels-last-memory-format")
def channels_last(lib: ModuleType, make: Make) -> Any:
    vae = make.vae().to(memory_format=torch.channels_last)
    return vae.decode(noise(1, 4, 4, 4)).sample, vae.decoder.conv_in.weight.stride()[1]


@idiom("optimization/memory#attention-slicing")
def attention_slicing(lib: ModuleType, make: Make) -> Any:
    pipe = make.sigma()
    pipe.enable_attention_slicing()
    found = pipe("a cat", generator=seed(), **CALL).images
    pipe.disable_attention_slicing()
    return found


# --- Speed: optimization/fp16, attention_backends, cache ---


@idiom("optimization/fp16#fused-qkv")
def fused_projections(lib: ModuleType, make: Make) -> Any:
    model = make.pixart()
    model.fuse_qkv_projections()
    found = model(**pixart_inputs()).sample
    model.unfuse_qkv_projections()
    return found, model(**pixart_inputs()).sample


@idiom("optimization/fp16#fused-qkv")
def fused_projections_of_the_autoencoder(lib: ModuleType, make: Make) -> Any:
    vae = make.vae()
    vae.fuse_qkv_projections()
    return vae.decode(noise(1, 4, 4, 4)).sample


@idiom("optimization/attention_backends")
def an_attention_backend(lib: ModuleType, make: Make) -> Any:
    model = make.glm_transformer()
    model.set_attention_backend("native")
    found = model(**glm_inputs()).sample
    model.reset_attention_backend()
    return found


@idiom("optimization/attention_backends")
def an_attention_backend_for_a_while(lib: ModuleType, make: Make) -> Any:
    model = make.glm_transformer()
    with lib.attention_backend("native"):
        return model(**glm_inputs()).sample


@idiom("optimization/attention_backends")
def an_unknown_attention_backend(lib: ModuleType, make: Make) -> Any:
    try:
        make.glm_transformer().set_attention_backend("fastest")
    except ValueError:
        return "refused"
    return None


@idiom("optimization/cache#firstblockcache")
def a_cache_on_and_off(lib: ModuleType, make: Make) -> Any:
    import diffusers

    model = make.glm_transformer()
    before = model.is_cache_enabled
    config = (lib if hasattr(lib, "FirstBlockCacheConfig") else diffusers).FirstBlockCacheConfig(threshold=0.1)
    model.enable_cache(config)
    during = model.is_cache_enabled
    model.disable_cache()
    return before, during, model.is_cache_enabled, model(**glm_inputs()).sample


@idiom("optimization/fp16#torchcompile")
def compiled_lazily(lib: ModuleType, make: Make) -> Any:
    pipe = make.sigma()
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    return pipe("a cat", generator=seed(), **CALL).images


@idiom("optimization/fp16#regional-compilation")
def compiled_by_region(lib: ModuleType, make: Make) -> Any:
    model = make.pixart()
    model.compile_repeated_blocks(backend="eager")
    with torch.no_grad():
        return model(**pixart_inputs()).sample


@idiom("optimization/fp16")
def autocast(lib: ModuleType, make: Make) -> Any:
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        return make.pixart()(**pixart_inputs()).sample.dtype


# --- Quantization: quantization/overview, bitsandbytes, torchao ---


@idiom("quantization/torchao")
def a_quantized_transformer(lib: ModuleType, make: Make) -> Any:
    import diffusers
    from torchao.quantization import Int8WeightOnlyConfig

    config = diffusers.TorchAoConfig(Int8WeightOnlyConfig())
    model = lib.PixArtTransformer2DModel.from_pretrained(
        make.checkpoint(), subfolder="transformer", quantization_config=config, torch_dtype=torch.float32
    )
    return type(model).__name__, model(**pixart_inputs()).sample.shape


@idiom("quantization/overview#pipeline-level")
def a_quantized_pipeline(lib: ModuleType, make: Make) -> Any:
    import diffusers
    from torchao.quantization import Int8WeightOnlyConfig

    config = diffusers.PipelineQuantizationConfig(
        quant_mapping={"transformer": diffusers.TorchAoConfig(Int8WeightOnlyConfig())}
    )
    pipe = lib.PixArtSigmaPipeline.from_pretrained(
        make.checkpoint(), quantization_config=config, torch_dtype=torch.float32
    )
    return pipe("a cat", generator=seed(), **CALL).images.shape


@idiom("quantization/overview")
def dequantized(lib: ModuleType, make: Make) -> Any:
    try:
        make.pixart().dequantize()
    except ValueError:
        return "refused"
    return None


# --- Training: training/overview, api/models/overview, tutorials/basic_training ---


@idiom("tutorials/basic_training")
def a_training_step(lib: ModuleType, make: Make) -> Any:
    model, scheduler = make.pixart().train(), make.scheduler("DDPMScheduler")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for step in range(2):
        clean, target = noise(2, 4, 8, 8, seed=step), noise(2, 4, 8, 8, seed=step + 10)
        timesteps = torch.tensor([100, 700])
        noisy = scheduler.add_noise(clean, target, timesteps)
        text = noise(2, 5, 32, seed=3)
        predicted = model(noisy, encoder_hidden_states=text, timestep=timesteps, return_dict=False)[0]
        loss = torch.nn.functional.mse_loss(predicted.chunk(2, dim=1)[0], target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@idiom("training/overview")
def gradient_checkpointing(lib: ModuleType, make: Make) -> Any:
    model = make.pixart().train()
    model.enable_gradient_checkpointing()
    on = model.is_gradient_checkpointing
    model(**pixart_inputs()).sample.sum().backward()
    gradient = model.proj_out.weight.grad
    model.disable_gradient_checkpointing()
    return on, model.is_gradient_checkpointing, gradient


@idiom("training/overview")
def gradient_checkpointing_by_a_function(lib: ModuleType, make: Make) -> Any:
    calls: list[int] = []

    def checkpoint(module: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return module(*args, **kwargs)

    model = make.pixart().train()
    model.enable_gradient_checkpointing(checkpoint)
    model(**pixart_inputs()).sample.sum().backward()
    return len(calls), model.proj_out.weight.grad


@idiom("api/schedulers/ddpm")
def velocity_targets(lib: ModuleType, make: Make) -> Any:
    scheduler = make.scheduler("DDPMScheduler", prediction_type="v_prediction")
    return scheduler.get_velocity(noise(2, 4, 4, 4), noise(2, 4, 4, 4, seed=1), torch.tensor([3, 900]))


@idiom("training/text2image#min-snr-weighting")
def signal_to_noise(lib: ModuleType, make: Make) -> Any:
    from diffusers.training_utils import compute_snr

    return compute_snr(make.scheduler("DDPMScheduler"), torch.tensor([0, 500, 999]))


@idiom("training/text2image")
def averaged_weights(lib: ModuleType, make: Make) -> Any:
    from diffusers.training_utils import EMAModel

    model = make.pixart()
    ema = EMAModel(model.parameters(), decay=0.5, model_cls=type(model), model_config=model.config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    ema.step(model.parameters())
    ema.step(model.parameters())
    ema.copy_to(model.parameters())
    return model.proj_out.weight


@idiom("training/text2image")
def averaged_weights_saved(lib: ModuleType, make: Make) -> Any:
    from diffusers.training_utils import EMAModel

    model = make.pixart()
    EMAModel(model.parameters(), model_cls=type(model), model_config=model.config).save_pretrained(str(make.folder))
    again = EMAModel.from_pretrained(str(make.folder), type(model))
    return again.decay, again.shadow_params[0]


@idiom("training/lora")
def trainable_parameters_in_float32(lib: ModuleType, make: Make) -> Any:
    from diffusers.training_utils import cast_training_params

    model = make.pixart().to(torch.bfloat16).requires_grad_(False)
    model.proj_out.requires_grad_(True)
    cast_training_params(model, dtype=torch.float32)
    return model.proj_out.weight.dtype, model.pos_embed.proj.weight.dtype, model.num_parameters(only_trainable=True)


@idiom("training/lora")
def low_rank_layers_by_peft(lib: ModuleType, make: Make) -> Any:
    from peft import LoraConfig, inject_adapter_in_model

    model = make.pixart()
    config = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    torch.manual_seed(0)
    inject_adapter_in_model(config, model)
    return model(**pixart_inputs()).sample, sum("lora_" in n for n, _ in model.named_parameters())


def _adapted(make: Make, *names: str) -> Any:
    """GLM-Image's transformer with adapters of known numbers."""
    from peft import LoraConfig

    model = make.glm_transformer()
    for i, name in enumerate(names):
        torch.manual_seed(i)
        model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False), name)
    return model


def _shown(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**glm_inputs()).sample


@idiom("training/lora")
def an_adapter_added_and_switched(lib: ModuleType, make: Make) -> Any:
    model = _adapted(make, "one", "two")
    seen = [_shown(model), model.active_adapters(), sorted(model.peft_config)]
    model.set_adapter("one")
    seen += [_shown(model), model.active_adapters()]
    model.set_adapters(["one", "two"], [0.5, 2.0])
    seen += [_shown(model), model.active_adapters()]
    model.disable_adapters()
    seen.append(_shown(model))
    model.enable_adapters()
    model.disable_lora()
    model.enable_lora()
    seen.append(_shown(model))
    model.delete_adapters("two")
    return [*seen, _shown(model), sorted(model.peft_config), model.active_adapters()]


@idiom("tutorials/using_peft_for_inference")
def an_adapter_fused_and_unloaded(lib: ModuleType, make: Make) -> Any:
    model = _adapted(make, "one", "two")
    model.set_adapters(["one", "two"])
    model.fuse_lora(lora_scale=0.5)
    seen = [_shown(model)]
    model.unfuse_lora()
    model = _adapted(make, "one", "two")
    model.fuse_lora(adapter_names=["one"], safe_fusing=True)
    model.unload_lora()
    return [*seen, _shown(model), hasattr(model, "peft_config")]


@idiom("training/lora")
def an_adapter_saved_and_loaded(lib: ModuleType, make: Make) -> Any:
    """diffusers names no component in the file."""
    model = _adapted(make, "one")
    model.save_lora_adapter(str(make.folder), adapter_name="one")
    files = [path.name for path in make.folder.iterdir()]
    new = make.glm_transformer()
    prefix = None if lib.__name__ == "diffusers" else "transformer"
    new.load_lora_adapter(str(make.folder), prefix=prefix, adapter_name="again", use_safetensors=True)
    return files, _shown(new), new.active_adapters()


@idiom("training/lora")
def an_adapter_that_is_not_there(lib: ModuleType, make: Make) -> Any:
    model, found = make.glm_transformer(), []
    for call in (
        lambda: model.set_adapter("x"),
        lambda: model.active_adapters(),
        lambda: model.save_lora_adapter(str(make.folder)),
        lambda: model.add_adapter({"r": 2}),
        lambda: _adapted(make, "one").set_adapters(["one"], [1.0, 2.0]),
    ):
        try:
            call()
        except ValueError:
            found.append(True)
    return found, _shown(model)


@idiom("training/overview")
def freezing(lib: ModuleType, make: Make) -> Any:
    vae = make.vae()
    vae.requires_grad_(False)
    vae.to("cpu", dtype=torch.bfloat16)
    return vae.dtype, vae.device, vae.num_parameters(only_trainable=True), vae.num_parameters(exclude_embeddings=True)


# --- Attention processors and hooks: api/attnprocessor ---


@idiom("api/attnprocessor")
def names_of_attention_processors(lib: ModuleType, make: Make) -> Any:
    return {k: type(v).__name__ for k, v in make.pixart().attn_processors.items()}


@idiom("api/attnprocessor")
def a_set_attention_processor(lib: ModuleType, make: Make) -> Any:
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    model = make.pixart()
    found = []
    for processor in (AttnProcessor(), AttnProcessor2_0()):
        model.set_attn_processor(processor)
        found.append(model(**pixart_inputs()).sample)
    return found, {type(p).__name__ for p in model.attn_processors.values()}


@idiom("api/attnprocessor")
def a_recording_attention_processor(lib: ModuleType, make: Make) -> Any:
    pipe = make.sigma()
    pipe.transformer.set_attn_processor(recorder := Recorder())
    return pipe("a cat", generator=seed(), **CALL).images, [shape[:2] for shape in recorder.shapes]


@idiom("api/attnprocessor")
def the_text_that_a_processor_sees(lib: ModuleType, make: Make) -> Any:
    pipe = make.sigma()
    pipe.transformer.set_attn_processor(recorder := Recorder())
    pipe("a cat", generator=seed(), **CALL)
    return [shape[2] for shape in recorder.shapes]


@idiom("api/attnprocessor")
def a_processor_of_the_autoencoder(lib: ModuleType, make: Make) -> Any:
    from diffusers.models.attention_processor import AttnProcessor

    vae = make.vae()
    vae.set_attn_processor(AttnProcessor())
    found = vae.decode(noise(1, 4, 4, 4)).sample
    vae.set_default_attn_processor()
    return found, sorted(vae.attn_processors)


@idiom("api/attnprocessor")
def hooks_on_layers(lib: ModuleType, make: Make) -> Any:
    pipe = make.sigma()
    counts: dict[str, int] = {}
    block = pipe.transformer.transformer_blocks[0]
    layers = {"attn1": block.attn1, "attn2": block.attn2, "ff": block.ff, "to_q": block.attn1.to_q}
    for name, layer in layers.items():
        layer.register_forward_hook(lambda *_, name=name: counts.__setitem__(name, counts.get(name, 0) + 1))
    images = pipe("a cat", generator=seed(), **CALL).images
    return images, counts


class Recorder:
    """An attention processor as scripts write them."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def __call__(
        self, attn: Any, hidden_states: Any, encoder_hidden_states: Any = None, attention_mask: Any = None, **_: Any
    ) -> Any:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, context.shape[1], hidden_states.shape[0])
        query, key, value = (
            attn.head_to_batch_dim(x) for x in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        )
        scores = attn.get_attention_scores(query, key, attention_mask)
        self.shapes.append(tuple(scores.shape))
        return attn.to_out[1](attn.to_out[0](attn.batch_to_head_dim(torch.bmm(scores, value))))


# --- Around the libraries: threads, copies, tracing ---


@idiom("using-diffusers/create_a_server")
def a_pipeline_in_threads(lib: ModuleType, make: Make) -> Any:
    scheduler = make.scheduler()
    pipes = [make.sigma(scheduler=scheduler.from_config(scheduler.config)) for _ in range(2)]
    results: dict[int, Any] = {}

    def work(i: int) -> None:
        results[i] = pipes[i]("a cat", generator=seed(i), **CALL).images

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[i] for i in range(2)]


@idiom("api/models/overview")
def copies_of_models(lib: ModuleType, make: Make) -> Any:
    model = make.pixart()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return [m(**pixart_inputs()).sample for m in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)))]


@idiom("api/models/overview")
def state_dicts(lib: ModuleType, make: Make) -> Any:
    return [
        {k: list(v.shape) for k, v in m.state_dict().items()}
        for m in (make.pixart(), make.vae(), make.glm_transformer())
    ]


@idiom("api/models/overview")
def signatures_that_tools_inspect(lib: ModuleType, make: Make) -> Any:
    names = "PixArtTransformer2DModel", "AutoencoderKL", "DDIMScheduler", "PixArtSigmaPipeline"
    found = {n: list(inspect.signature(getattr(lib, n).__init__).parameters) for n in names}
    others = {"use_linear_projection", "num_vector_embeds"}
    for n in names:
        others |= getattr(getattr(lib, n), "not_in_diffusers", set())  # documented, after those of diffusers
    return {n: [p for p in found[n] if p not in others] for n in names}


@idiom("api/models/overview")
def import_paths(lib: ModuleType, make: Make) -> Any:
    paths = {
        "models": "AutoencoderKL PixArtTransformer2DModel",
        "models.transformers": "PixArtTransformer2DModel",
        "models.autoencoders": "AutoencoderKL",
        "schedulers": "DDIMScheduler DPMSolverMultistepScheduler",
        "pipelines": "PixArtAlphaPipeline PixArtSigmaPipeline",
        "pipelines.pixart_alpha": "PixArtAlphaPipeline PixArtSigmaPipeline",
        "image_processor": "VaeImageProcessor PixArtImageProcessor",
        "callbacks": "PipelineCallback MultiPipelineCallbacks",
        "utils": "load_image make_image_grid logging BaseOutput",
    }
    return [bool(getattr(import_module(f"{lib.__name__}.{p}"), n)) for p, ns in paths.items() for n in ns.split()]


@idiom("api/models/overview")
def classes_by_isinstance(lib: ModuleType, make: Make) -> Any:
    pipe = make.sigma()
    return (
        isinstance(pipe, lib.DiffusionPipeline),
        isinstance(pipe.transformer, torch.nn.Module),
        Path(pipe.config_name),
    )


def pixart_inputs(batch: int = 1) -> dict[str, Any]:
    """Arguments of a forward pass of PixArt's transformer."""
    return {
        "hidden_states": noise(batch, 4, 8, 8),
        "encoder_hidden_states": noise(batch, 5, 32, seed=1),
        "timestep": torch.tensor([500] * batch),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0]] * batch),
    }


def glm_inputs(batch: int = 1) -> dict[str, Any]:
    """Arguments of a forward pass of GLM-Image's transformer."""
    return {
        "hidden_states": noise(batch, 4, 8, 8),
        "encoder_hidden_states": noise(batch, 5, 16, seed=1),
        "prior_token_id": torch.arange(16).repeat(batch, 1),
        "prior_token_drop": torch.arange(16).repeat(batch, 1) % 3 == 0,
        "timestep": torch.tensor([500.0] * batch),
        "target_size": torch.tensor([[64.0, 64.0]] * batch),
        "crop_coords": torch.zeros(batch, 2),
    }


def all_idioms() -> Iterator[Idiom]:
    from .generated import generated

    yield from IDIOMS.values()
    yield from generated()
