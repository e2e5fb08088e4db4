"""One idiom per public name and per documented argument of the classes, made from the signatures of diffusers'.

A sample value for each argument is in the tables below; `samples_missing` names an argument that has none.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import diffusers
import torch
from torch import nn

from .building import Make, denoise, noise
from .idioms import CALL, Idiom, glm_call, glm_inputs, image, pixart_inputs, seed

MODELS = ("PixArtTransformer2DModel", "GlmImageTransformer2DModel", "AutoencoderKL")
SCHEDULERS = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "LCMScheduler",
)
PIPELINES = ("PixArtAlphaPipeline", "PixArtSigmaPipeline", "GlmImagePipeline")
CLASSES = MODELS + SCHEDULERS + PIPELINES
SOURCE = "signature of diffusers.{}"

#: Names whose idioms are written by hand (adapters), and those of single files, which are not here yet.
LATER = re.compile(r"lora|adapter|single_file")


class With(dict[str, Any]):
    """The sample of an argument that needs others."""


def instance(make: Make, name: str, **options: Any) -> Any:
    """A small object of a class, with the same weights in both libraries."""
    if name == "PixArtTransformer2DModel":
        return make.pixart(**options)
    if name == "GlmImageTransformer2DModel":
        return make.glm_transformer(**options)
    if name == "AutoencoderKL":
        return make.vae(**options)
    if name in SCHEDULERS:
        return make.scheduler(name, **options)
    if name == "GlmImagePipeline":
        return make.glm(**options)
    return make.pixart_pipeline(name, **options)


#: Methods of pipelines that leave nothing behind.
PURE = ("__call__", "encode", "check", "prepare", "numpy", "get_glyph", "save", "push", "to_json", "progress", "maybe")
_SHARED: dict[tuple[str, str], Any] = {}


def shared(make: Make, name: str) -> Any:
    """One pipeline for all idioms that do not change it."""
    key = make.lib.__name__, name
    if key not in _SHARED:
        _SHARED[key] = instance(make, name)
    return _SHARED[key]


def effect(thing: Any, name: str) -> Any:
    """What an object computes, to see the effect of an option."""
    with torch.no_grad():
        if name == "PixArtTransformer2DModel":
            return thing(**pixart_inputs()).sample
        if name == "GlmImageTransformer2DModel":
            return thing(**glm_inputs()).sample
        if name == "AutoencoderKL":
            return thing(noise(1, 3, 16, 16)).sample
        if name == "FlowMatchEulerDiscreteScheduler":
            return denoise(thing, **({"mu": 0.6} if thing.config.use_dynamic_shifting else {}))
        if name == "DPMSolverMultistepScheduler" and thing.config.use_dynamic_shifting:
            return denoise(thing, mu=0.6)
        if name in SCHEDULERS:
            return denoise(thing)
        if name == "GlmImagePipeline":
            return thing(**glm_call()).images
        return thing("a cat", generator=seed(), **CALL).images


BETAS = [0.01 + 0.001 * i for i in range(20)]
SCHEDULER_OPTIONS: dict[str, Any] = {
    "num_train_timesteps": 500,
    "beta_start": 0.002,
    "beta_end": 0.03,
    "beta_schedule": "scaled_linear",
    "trained_betas": With(trained_betas=BETAS, num_train_timesteps=20, original_inference_steps=10),
    "clip_sample": True,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "prediction_type": "v_prediction",
    "thresholding": With(thresholding=True, sample_max_value=1.5),
    "dynamic_thresholding_ratio": With(dynamic_thresholding_ratio=0.8, thresholding=True, sample_max_value=2.0),
    "clip_sample_range": With(clip_sample_range=0.5, clip_sample=True),
    "sample_max_value": With(sample_max_value=1.3, thresholding=True),
    "timestep_spacing": "trailing",
    "rescale_betas_zero_snr": True,
    "variance_type": "fixed_large",
    "solver_order": 3,
    "algorithm_type": "sde-dpmsolver++",
    "solver_type": "heun",
    "lower_order_final": False,
    "euler_at_final": True,
    "use_karras_sigmas": True,
    "use_exponential_sigmas": True,
    "use_beta_sigmas": True,
    "use_lu_lambdas": True,
    "use_flow_sigmas": With(use_flow_sigmas=True, prediction_type="flow_prediction"),
    "flow_shift": With(flow_shift=3.0, use_flow_sigmas=True, prediction_type="flow_prediction"),
    "final_sigmas_type": "sigma_min",
    "lambda_min_clipped": -5.1,
    "use_dynamic_shifting": True,
    "time_shift_type": With(time_shift_type="linear", use_dynamic_shifting=True),  # of flow matching, see `construct`
    "shift": 3.0,
    "base_shift": 0.3,
    "max_shift": 1.5,
    "base_image_seq_len": 128,
    "max_image_seq_len": 2048,
    "invert_sigmas": True,
    "shift_terminal": With(shift_terminal=0.1),
    "stochastic_sampling": True,
    "original_inference_steps": 40,
    "timestep_scaling": 5.0,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "PixArtTransformer2DModel": {
        "num_attention_heads": With(num_attention_heads=3, cross_attention_dim=36),
        "attention_head_dim": With(attention_head_dim=16, cross_attention_dim=32),
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 1,
        "dropout": 0.3,
        "norm_num_groups": 16,
        "cross_attention_dim": 24,
        "attention_bias": False,
        "sample_size": 16,
        "patch_size": 4,
        "activation_fn": "geglu",
        "num_embeds_ada_norm": 500,
        "upcast_attention": True,
        "norm_type": "ada_norm_single",
        "norm_elementwise_affine": True,
        "norm_eps": 1e-3,
        "interpolation_scale": 2,
        "use_additional_conditions": False,
        "caption_channels": 32,
        "attention_type": "default",
    },
    "GlmImageTransformer2DModel": {
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 6,
        "num_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "text_embed_dim": 16,
        "time_embed_dim": 24,
        "condition_dim": 10,
        "prior_vq_quantizer_codebook_size": 40,
    },
    "AutoencoderKL": {
        "in_channels": 3,
        "out_channels": 2,
        "down_block_types": With(
            down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",), block_out_channels=(8,)
        ),
        "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D"],
        "block_out_channels": [8, 16],
        "layers_per_block": 2,
        "act_fn": "relu",
        "latent_channels": 6,
        "norm_num_groups": 2,
        "sample_size": 32,
        "scaling_factor": 0.5,
        "shift_factor": 0.1,
        "latents_mean": [0.1, 0.2, 0.3, 0.4],
        "latents_std": [1.0, 1.1, 0.9, 1.2],
        "force_upcast": False,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "mid_block_add_attention": False,
    },
}


def folder(make: Make) -> Any:
    return str(make.folder)


def pixels(make: Make) -> Any:
    return noise(1, 3, 16, 16)


def small(make: Make) -> Any:
    return noise(1, 2, 4, 4)


def other(make: Make) -> Any:
    return noise(1, 2, 4, 4, seed=1)


def embeds(make: Make) -> Any:
    return noise(1, 5, 32)


def mask(make: Make) -> Any:
    return torch.tensor([[1, 1, 1, 0, 0]])


EMBEDS: dict[str, Any] = {
    "prompt_embeds": embeds,
    "prompt_attention_mask": mask,
    "negative_prompt_embeds": lambda make: noise(1, 5, 32, seed=9),
    "negative_prompt_attention_mask": mask,
    "negative_prompt": None,
}
CPU = torch.device("cpu")

#: Arguments by method, and by "Class.method" where classes differ. A value, or a function of `make`.
#: "=": what is given in every call. "new": what the object is built with.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "add_noise": {"original_samples": small, "noise": other, "timesteps": torch.tensor([10])},
    "get_velocity": {"sample": small, "noise": other, "timesteps": torch.tensor([10])},
    "scale_noise": {"=": ("noise",), "sample": small, "noise": other, "timestep": torch.tensor([1000.0])},
    "scale_model_input": {"sample": small, "timestep": 10},
    "set_timesteps": {
        "=": ("num_inference_steps",),
        "num_inference_steps": 5,
        "device": "cpu",
        "timesteps": With(timesteps=[900, 500, 100], num_inference_steps=None),
        "sigmas": With(sigmas=[1.0, 0.6, 0.2], num_inference_steps=None),
        "mu": 0.5,
        "original_inference_steps": 20,
        "strength": 0.5,
    },
    "FlowMatchEulerDiscreteScheduler.set_timesteps": {
        "=": ("num_inference_steps",),
        "num_inference_steps": 5,
        "device": "cpu",
        "timesteps": With(timesteps=[900.0, 500.0, 100.0], num_inference_steps=None),
        "sigmas": With(sigmas=[1.0, 0.6, 0.2], num_inference_steps=None),
        "mu": 0.5,
    },
    "step": {
        "=": ("model_output", "timestep", "sample", "generator"),
        "model_output": small,
        "timestep": lambda make: None,  # of the schedule, see `call`
        "sample": other,
        "eta": 0.5,
        "use_clipped_model_output": True,
        "generator": lambda make: seed(3),
        "variance_noise": With(variance_noise=noise(1, 2, 4, 4, seed=7), eta=1.0, generator=None),
        "s_churn": 0.5,
        "s_tmin": 0.1,
        "s_tmax": 10.0,
        "s_noise": 1.1,
        "per_token_timesteps": With(
            per_token_timesteps=torch.full((1, 3), 500.0), model_output=noise(1, 3, 4), sample=noise(1, 3, 4)
        ),
        "return_dict": False,
    },
    "DPMSolverMultistepScheduler.step": {
        "=": ("model_output", "timestep", "sample", "generator"),
        "model_output": small,
        "timestep": lambda make: None,
        "sample": other,
        "generator": lambda make: seed(3),
        "variance_noise": other,
        "return_dict": False,
    },
    "previous_timestep": {"timestep": lambda make: None},
    "index_for_timestep": {"timestep": lambda make: None, "schedule_timesteps": lambda make: None},
    "set_begin_index": {"begin_index": 2},
    "set_shift": {"shift": 2.0},
    "stretch_shift_to_terminal": {"new": {"shift_terminal": 0.1}, "t": torch.linspace(1, 0.1, 5)},
    "DPMSolverMultistepScheduler.set_timesteps": {
        "=": ("num_inference_steps",),
        "num_inference_steps": 5,
        "device": "cpu",
        "mu": 0.5,
        "new mu": {"use_dynamic_shifting": True, "use_flow_sigmas": True, "prediction_type": "flow_prediction"},
        "timesteps": With(timesteps=[900, 500, 100], num_inference_steps=None),
    },
    "time_shift": {"mu": 0.5, "sigma": 1.0, "t": torch.linspace(1, 0.1, 5)},
    "get_scalings_for_boundary_condition_discrete": {"timestep": torch.tensor(500)},
    "convert_model_output": {"=": ("sample",), "model_output": small, "sample": other},
    "dpm_solver_first_order_update": {"=": ("sample",), "model_output": small, "sample": other, "noise": small},
    "multistep_dpm_solver_second_order_update": {
        "=": ("sample",),
        "model_output_list": lambda make: [noise(1, 2, 4, 4), noise(1, 2, 4, 4, seed=1)],
        "sample": other,
        "noise": small,
    },
    "multistep_dpm_solver_third_order_update": {
        "=": ("sample",),
        "model_output_list": lambda make: [noise(1, 2, 4, 4, seed=i) for i in range(3)],
        "sample": other,
        "noise": small,
    },
    "PixArtTransformer2DModel.forward": {
        "=": ("hidden_states", "encoder_hidden_states", "timestep"),
        **pixart_inputs(),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "cross_attention_kwargs": {},
        "attention_mask": torch.tensor([[1.0] * 12 + [0.0] * 4]),
        "return_dict": False,
    },
    "GlmImageTransformer2DModel.forward": {
        **glm_inputs(),
        "attention_kwargs": {},
        "return_dict": False,
        "attention_mask": mask,
        "kv_caches": lambda make: _kv_cache(make),
        "image_rotary_emb": lambda make: make.glm_transformer().rope(noise(1, 4, 8, 8)),
    },
    "AutoencoderKL.forward": {
        "sample": pixels,
        "sample_posterior": With(sample_posterior=True, generator=lambda make: seed()),
        "generator": With(sample_posterior=True, generator=lambda make: seed(2)),
        "return_dict": False,
    },
    "encode": {"x": pixels, "return_dict": False},
    "decode": {"z": lambda make: noise(1, 4, 4, 4), "generator": lambda make: seed(), "return_dict": False},
    "tiled_encode": {"x": pixels, "return_dict": False},
    "tiled_decode": {"z": lambda make: noise(1, 4, 4, 4), "return_dict": False},
    "blend_h": {"a": small, "b": other, "blend_extent": 2},
    "blend_v": {"a": small, "b": other, "blend_extent": 2},
    "num_parameters": {"only_trainable": True, "exclude_embeddings": True},
    "get_memory_footprint": {"return_buffers": False},
    "enable_gradient_checkpointing": {"gradient_checkpointing_func": lambda make: lambda f, *a, **k: f(*a, **k)},
    "enable_group_offload": {
        "=": ("onload_device", "offload_type"),
        "onload_device": CPU,
        "offload_device": CPU,
        "offload_type": "leaf_level",
        "num_blocks_per_group": With(offload_type="block_level", num_blocks_per_group=1),
        "non_blocking": True,
        "use_stream": False,
        "record_stream": False,
        "low_cpu_mem_usage": True,
        "offload_to_disk_path": folder,
        "block_modules": With(offload_type="block_level", num_blocks_per_group=1, block_modules=None),
        "exclude_kwargs": ["kv_caches"],
        "exclude_modules": ["vae"],
    },
    "enable_layerwise_casting": {
        "=": ("compute_dtype",),
        "storage_dtype": torch.float8_e5m2,
        "compute_dtype": torch.float32,
        "skip_modules_pattern": ("attn", "norm"),
        "skip_modules_classes": (nn.Conv2d,),
        "non_blocking": True,
    },
    "enable_parallelism": {"config": None, "cp_plan": None},
    "enable_cache": {"config": lambda make: diffusers.FirstBlockCacheConfig(threshold=0.1)},
    "cache_context": {"name": "cond"},
    "enable_xformers_memory_efficient_attention": {"attention_op": None},
    "set_use_memory_efficient_attention_xformers": {"valid": False, "attention_op": None},
    "set_use_npu_flash_attention": {"valid": False},
    "set_use_xla_flash_attention": {"use_xla_flash_attention": False, "partition_spec": None},
    "enable_xla_flash_attention": {"partition_spec": None},
    "set_attention_backend": {"backend": "native"},
    "set_attn_processor": {"processor": lambda make: diffusers.models.attention_processor.AttnProcessor()},
    "to_json_file": {"json_file_path": lambda make: make.folder / "config.json"},
    "from_config": {
        "config": lambda make: None,
        "return_unused_kwargs": True,
    },
    "load_config": {
        "pretrained_model_name_or_path": "",  # the folder of a saved one
        "return_unused_kwargs": True,
        "return_commit_hash": True,
    },
    "get_config_dict": {"=": ("pretrained_model_name_or_path",), "pretrained_model_name_or_path": ""},
    "extract_init_dict": {"config_dict": lambda make: {"num_train_timesteps": 500, "num_layers": 1}},
    "register_to_config": {"kwargs": {"note": 3}},
    "register_for_auto_class": {"auto_class": "AutoModel"},
    "register_modules": {"kwargs": lambda make: {"vae": make.vae(scaling_factor=0.3)}},
    "save_config": {"save_directory": folder, "push_to_hub": False},
    "save_pretrained": {
        "save_directory": folder,
        "is_main_process": False,
        "save_function": lambda make: torch.save,
        "safe_serialization": True,
        "variant": "fp16",
        "max_shard_size": "60KB",
        "push_to_hub": With(push_to_hub=True, repo_id="me/thing"),
        "use_flashpack": False,
        "kwargs": {"token": None},
    },
    "push_to_hub": {
        "repo_id": "me/thing",
        "commit_message": "first",
        "private": True,
        "token": "secret",
        "create_pr": True,
        "safe_serialization": True,
        "variant": "fp16",
        "subfolder": "inner",
    },
    "download": {"pretrained_model_name": lambda make: str(make.checkpoint())},
    "compile_repeated_blocks": {"kwargs": {"backend": "eager"}, "=": ("kwargs",)},
    "from_pipe": {"pipeline": lambda make: make.sigma()},
    "GlmImagePipeline.from_pipe": {"pipeline": lambda make: make.glm()},
    "numpy_to_pil": {"images": lambda make: noise(2, 4, 4, 3).clamp(0, 1).numpy()},
    "prepare_extra_step_kwargs": {"generator": None, "eta": 0.3},
    "prepare_latents": {
        "batch_size": 1,
        "num_channels_latents": 4,
        "height": 16,
        "width": 24,
        "dtype": torch.float32,
        "device": CPU,
        "generator": lambda make: seed(),
        "latents": lambda make: noise(1, 4, 8, 12),
    },
    "check_inputs": {
        "=": ("prompt", "height", "width", "negative_prompt", "callback_steps"),
        "prompt": "a cat",
        "height": 16,
        "width": 16,
        "negative_prompt": "dark",
        "callback_steps": 1,
        "prompt_embeds": With({**EMBEDS, "prompt": None}),
        "prompt_attention_mask": With({**EMBEDS, "prompt": None}),
        "negative_prompt_embeds": With({**EMBEDS, "prompt": None}),
        "negative_prompt_attention_mask": With({**EMBEDS, "prompt": None}),
    },
    "GlmImagePipeline.check_inputs": {
        "=": ("prompt", "height", "width", "callback_on_step_end_tensor_inputs", "prior_token_ids"),
        "prompt": "a cat",
        "height": 64,
        "width": 64,
        "callback_on_step_end_tensor_inputs": ["latents"],
        "prompt_embeds": With(prompt=None, prompt_embeds=noise(1, 5, 16)),
        "negative_prompt_embeds": With(
            prompt=None, prompt_embeds=noise(1, 5, 16), negative_prompt_embeds=noise(1, 5, 16)
        ),
        "prior_token_ids": torch.zeros(1, 16, dtype=torch.long),
        "prior_token_image_ids": None,
        "source_image_grid_thw": None,
        "image": None,
    },
    "encode_prompt": {
        "prompt": "a red cube",
        "do_classifier_free_guidance": False,
        "negative_prompt": "dark",
        "num_images_per_prompt": 2,
        "device": "cpu",
        "prompt_embeds": With({**EMBEDS, "prompt": None}),
        "prompt_attention_mask": With({**EMBEDS, "prompt": None}),
        "negative_prompt_embeds": With({**EMBEDS, "prompt": None}),
        "negative_prompt_attention_mask": With({**EMBEDS, "prompt": None}),
        "clean_caption": True,
        "max_sequence_length": 4,
    },
    "GlmImagePipeline.encode_prompt": {
        "prompt": 'a sign "open"',
        "do_classifier_free_guidance": False,
        "num_images_per_prompt": 2,
        "prompt_embeds": With(prompt=None, prompt_embeds=noise(1, 5, 16), do_classifier_free_guidance=False),
        "negative_prompt_embeds": With(
            prompt=None, prompt_embeds=noise(1, 5, 16), negative_prompt_embeds=noise(1, 5, 16, seed=1)
        ),
        "device": CPU,
        "dtype": torch.float64,
        "max_sequence_length": 64,
    },
    "generate_prior_tokens": {
        "new": {"prior": True},
        "prompt": "a cat",
        "height": 64,
        "width": 64,
        "image": None,
        "device": CPU,
        "generator": None,
    },
    "get_glyph_texts": {"prompt": "a \"b\" and 'c'"},
    "enable_attention_slicing": {"slice_size": "max"},
    "set_attention_slice": {"slice_size": 2},
    "enable_model_cpu_offload": {"gpu_id": With(device="cpu"), "device": "cpu", "=": ("device",)},
    "enable_sequential_cpu_offload": {"gpu_id": With(device="cpu"), "device": "cpu", "=": ("device",)},
    "progress_bar": {"=": ("iterable",), "iterable": lambda make: range(2), "total": With(iterable=None, total=3)},
    "set_progress_bar_config": {"kwargs": {"desc": "x", "disable": True}},
}
PIXART_CALL: dict[str, Any] = {
    "=": ("prompt", "num_inference_steps", "use_resolution_binning", "output_type", "generator"),
    "prompt": ["a red cube", "a cat"],
    "negative_prompt": "dark",
    "num_inference_steps": 3,
    "timesteps": With(timesteps=[900, 500, 100], num_inference_steps=20),
    "sigmas": With(sigmas=[10.0, 3.0, 0.5], num_inference_steps=20),
    "new sigmas": lambda make: {"scheduler": make.scheduler("EulerDiscreteScheduler")},
    "guidance_scale": 2.0,
    "num_images_per_prompt": 2,
    "height": 24,
    "width": 8,
    "eta": 0.5,
    "generator": lambda make: seed(),
    "latents": With(latents=noise(1, 4, 8, 8), prompt="a cat"),
    "prompt_embeds": With({**EMBEDS, "prompt": None}),
    "prompt_attention_mask": With({**EMBEDS, "prompt": None}),
    "negative_prompt_embeds": With({**EMBEDS, "prompt": None}),
    "negative_prompt_attention_mask": With({**EMBEDS, "prompt": None}),
    "output_type": "latent",
    "return_dict": False,
    "callback": lambda make: lambda i, t, latents: latents.mul_(0.9),
    "callback_steps": With(callback_steps=2, callback=lambda make: lambda i, t, latents: latents.mul_(0.9)),
    "clean_caption": False,
    "use_resolution_binning": False,
    "max_sequence_length": 4,
    "kwargs": {"mask_feature": False},
}
ARGUMENTS["PixArtAlphaPipeline.__call__"] = ARGUMENTS["PixArtSigmaPipeline.__call__"] = PIXART_CALL
ARGUMENTS["GlmImagePipeline.__call__"] = {
    "=": tuple(glm_call()),
    **glm_call(),
    "image": With(
        image=[image(0, 64)],
        prior_token_image_ids=[torch.arange(16) % 32],
        source_image_grid_thw=[torch.tensor([[1, 4, 4]])],
    ),
    "timesteps": With(timesteps=[900, 500], num_inference_steps=2),
    "sigmas": With(sigmas=[1.0, 0.4], num_inference_steps=2),
    "guidance_scale": 4.0,
    "num_images_per_prompt": With(num_images_per_prompt=2, latents=noise(2, 4, 8, 12)),
    "generator": With(generator=lambda make: seed(5), latents=None),
    "prompt_embeds": With(prompt_embeds=noise(1, 5, 16), guidance_scale=1.0, prompt=None),
    "negative_prompt_embeds": With(
        prompt_embeds=noise(1, 5, 16), negative_prompt_embeds=noise(1, 5, 16, seed=3), prompt=None
    ),
    "prior_token_image_ids": None,
    "source_image_grid_thw": None,
    "crops_coords_top_left": (32, 16),
    "return_dict": False,
    "attention_kwargs": {},
    "callback_on_step_end": lambda make: lambda p, i, t, k: {"latents": k["latents"] * 0.9},
    "callback_on_step_end_tensor_inputs": With(
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
        callback_on_step_end=lambda make: lambda p, i, t, k: {"latents": k["latents"] * 0.9},
    ),
    "max_sequence_length": 64,
}

#: Keywords that the docstrings of from_pretrained document, with a value that needs neither a network nor a GPU.
LOADING: dict[str, Any] = {
    "torch_dtype": torch.bfloat16,
    "dtype": torch.bfloat16,
    "cache_dir": folder,
    "force_download": True,
    "proxies": None,
    "output_loading_info": True,
    "local_files_only": True,
    "token": "secret",
    "revision": "main",
    "custom_revision": None,
    "mirror": "https://example.com",
    "subfolder": None,  # given where the class is a component
    "from_flax": False,
    "device_map": None,
    "max_memory": None,
    "offload_folder": folder,
    "offload_state_dict": False,
    "low_cpu_mem_usage": False,
    "variant": None,
    "use_safetensors": True,
    "disable_mmap": True,
    "use_onnx": False,
    "custom_pipeline": None,
    "load_connected_pipeline": False,
    "return_unused_kwargs": True,
    "dduf_file": None,
    "quantization_config": None,
    "trust_remote_code": False,
    "use_flashpack": False,
    "return_commit_hash": True,
    "user_agent": {"a": "b"},
    "parallel_config": None,
    "keep_in_fp32_modules": None,
}
#: Names in those docstrings that are no keywords.
NO_KEYWORD = {"pretrained_model_name_or_path", "kwargs", "flashpack_kwargs"}


def _kv_cache(make: Make) -> Any:
    if make.lib is diffusers:
        from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache

        return GlmImageKVCache(2)
    return make.lib.GlmImageKVCache(2)


def public_names(cls: type) -> list[str]:
    """What a class has beyond a module of torch."""
    ignored = set(dir(nn.Module)) - {"forward"}
    return [n for n in dir(cls) if not n.startswith("_") and n not in ignored and not LATER.search(n)]


def parameters_of(function: Any) -> dict[str, inspect.Parameter]:
    found = inspect.signature(inspect.unwrap(function)).parameters
    return {n: p for n, p in found.items() if n not in ("self", "cls")}


def given(value: Any, make: Make) -> Any:
    return value(make) if inspect.isfunction(value) else value


def arguments_for(table: dict[str, Any], parameters: dict[str, Any], name: str | None, make: Make) -> dict[str, Any]:
    """The required arguments, those of every call, and ``name``."""
    needed = set(table.get("=", ())) | {
        n for n, p in parameters.items() if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    }
    names = [n for n in table if n in {*needed, name}]
    names.sort(key=lambda n: n == name)  # what `name` brings wins
    arguments: dict[str, Any] = {}
    for n in names:
        value = table[n]
        if isinstance(value, With):
            arguments.update(value)
        elif n == "kwargs":
            arguments.update(given(value, make))
        else:
            arguments[n] = value
    keeps = any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters.values())
    return {n: given(v, make) for n, v in arguments.items() if n in parameters or keeps}


def call(make: Make, owner: str, method: str, argument: str | None) -> Any:
    """Call a method with the sample of one argument, and report the result and what changed."""
    reference = getattr(diffusers, owner)
    table = ARGUMENTS.get(f"{owner}.{method}", ARGUMENTS.get(method, {}))
    arguments = arguments_for(table, parameters_of(getattr(reference, method)), argument, make)
    cls = getattr(make.lib, owner)
    if method == "from_config":
        arguments["config"] = instance(make, owner).config
        return getattr(cls, method)(**arguments)
    if method in ("get_config_dict", "load_config"):
        folder = str(make.saved(owner, instance))
        return getattr(cls, method)(**{n: folder if a == "" else a for n, a in arguments.items()} or {})
    if method == "register_for_auto_class":
        try:
            return getattr(cls, method)(**arguments)
        finally:
            if "_auto_class" in vars(cls):
                del cls._auto_class
    if method in ("extract_init_dict", "from_pipe", "download"):
        return getattr(cls, method)(**arguments)
    new = given(table.get(f"new {argument}", table.get("new", {})), make)
    pure = owner in PIPELINES and method.startswith(PURE) and not new
    thing = shared(make, owner) if pure else instance(make, owner, **new)
    if owner in SCHEDULERS:
        if method.startswith(("step", "index", "convert", "dpm_", "multi", "previous", "get_scal", "scale", "set_beg")):
            thing.set_timesteps(5)
        if method.startswith(("dpm_", "multi", "convert")):
            for t in thing.timesteps[:3]:
                thing.step(noise(1, 2, 4, 4), t, noise(1, 2, 4, 4, seed=1))
        for name in ("timestep", "schedule_timesteps"):
            if name in arguments and arguments[name] is None:
                arguments[name] = thing.timesteps[1] if name == "timestep" else thing.timesteps
    context: AbstractContextManager[Any] = make.hub()
    with context, torch.no_grad():
        found = getattr(thing, method)(**arguments)
        if method == "cache_context":
            with found:
                pass
        if method == "progress_bar":
            found = found.total
        seen: list[Any] = [found]
        if method.startswith(("save_", "to_json_file", "push")):  # what was written
            files = (p.relative_to(make.folder).as_posix() for p in make.folder.rglob("*") if p.is_file())
            seen.append(sorted(f for f in files if f != "README.md"))
            return [None if method == "push_to_hub" else found, seen[1], make.uploads]
        if method == "to_json_string":
            return [len(found.splitlines()) > 3]
        if found is None or found is thing:
            if method == "set_timesteps":
                seen.append([thing.timesteps, getattr(thing, "sigmas", None)])
            elif method not in ("check_inputs", "enable_cache"):
                seen.append(effect(thing, owner))
            if owner in MODELS:
                seen.append(thing.is_gradient_checkpointing)
        if method == "encode_prompt" and owner != "GlmImagePipeline":  # embeddings of padding differ, see the docs
            for i in (0, 2):
                if found[i] is not None:
                    seen.append(found[i] * found[i + 1][..., None])
            seen[0] = [found[i] for i in (1, 3)]
    return seen


def loading_keywords(cls: type) -> list[str]:
    """The keywords that the docstring of `from_pretrained` documents."""
    found = re.findall(r"^ {12}(\w+)(?:, \w+)* \(", inspect.getdoc(cls.from_pretrained) or "", re.M)
    found += re.findall(r"^ {4}(\w+) \(", inspect.getdoc(cls.from_pretrained) or "", re.M)
    return [n for n in dict.fromkeys(found) if n not in NO_KEYWORD]


def load(make: Make, owner: str, keyword: str | None) -> Any:
    folder = str(make.saved(owner, instance))
    options = {keyword: given(LOADING[keyword], make)} if keyword else {}
    if owner in PIPELINES and keyword not in (None, "torch_dtype", "variant"):  # these take long to load
        pipe = shared(make, owner)
        options |= {"tokenizer": pipe.tokenizer, "text_encoder": pipe.text_encoder}
        if owner == "GlmImagePipeline":
            prior = instance(make, owner, prior=True)
            options |= {"processor": prior.processor, "vision_language_encoder": prior.vision_language_encoder}
    found = getattr(make.lib, owner).from_pretrained(folder, **options)
    thing, *rest = found if isinstance(found, tuple) else (found,)
    dtype = thing.dtype if owner not in SCHEDULERS else None
    return [type(thing), dtype, rest, effect(thing, owner) if keyword not in ("torch_dtype", "dtype") else None]


def construct(make: Make, owner: str, argument: str) -> Any:
    table = OPTIONS.get(owner, SCHEDULER_OPTIONS)
    value = table[argument]
    if argument == "time_shift_type" and owner == "DPMSolverMultistepScheduler":
        value = With(time_shift_type="exponential", use_dynamic_shifting=True)  # the only one that it has
    known = parameters_of(getattr(diffusers, owner).__init__)
    options = {n: v for n, v in (value if isinstance(value, With) else {argument: value}).items() if n in known}
    thing = instance(make, owner, **options)
    shapes = {n: list(p.shape) for n, p in thing.named_parameters()} if owner in MODELS else {}
    seen = None if owner in MODELS and argument == "in_channels" and options[argument] != 4 else effect(thing, owner)
    return [thing.config[argument], shapes, seen]


def construct_pipeline(make: Make, owner: str, argument: str) -> Any:
    """A pipeline whose component is another one, or None."""
    if argument in ("text_encoder", "tokenizer", "processor", "vision_language_encoder"):
        return sorted(n for n, c in instance(make, owner, **{argument: None}).components.items() if c is None)
    changed = {
        "vae": lambda: make.vae(scaling_factor=0.3),
        "transformer": lambda: make.pixart(num_layers=1),
        "scheduler": lambda: make.scheduler("DDIMScheduler"),
    }
    if owner == "GlmImagePipeline":
        changed["transformer"] = lambda: make.glm_transformer(num_layers=1)
        changed["vae"] = lambda: make.glm().vae
        changed["scheduler"] = lambda: make.scheduler("FlowMatchEulerDiscreteScheduler", shift=2.0)
    pipe = instance(make, owner, **{argument: changed[argument]()})
    return [type(getattr(pipe, argument)), effect(pipe, owner)]


def read(make: Make, owner: str, name: str) -> Any:
    thing = shared(make, owner) if owner in PIPELINES else instance(make, owner)
    if owner in SCHEDULERS and name not in ("config", "compatibles", "begin_index"):
        thing.set_timesteps(5)
        thing.step(noise(1, 2, 4, 4), thing.timesteps[0], noise(1, 2, 4, 4, seed=1))
    if owner == "GlmImagePipeline" and name in (
        "current_timestep",
        "guidance_scale",
        "num_timesteps",
        "interrupt",
        "attention_kwargs",
        "do_classifier_free_guidance",
    ):
        thing(**glm_call())
    value = getattr(thing, name)
    if name == "compatibles":
        ours = {*SCHEDULERS, "DPMSolverMultistepScheduler"}
        return sorted({c.__name__ for c in value} & ours)
    if name == "components":
        return {n: type(c) for n, c in value.items()}
    return value.sub("!", "a #b (c) [d] {e} |f/ *g") if isinstance(value, re.Pattern) else value


def generated() -> Iterator[Idiom]:
    """All of them, by name."""
    for owner in CLASSES:
        cls = getattr(diffusers, owner)
        source = SOURCE.format(owner)
        for argument in parameters_of(cls.__init__):
            build = construct_pipeline if owner in PIPELINES else construct
            yield _idiom(f"{owner}({argument})", source, build, owner, argument)
        names = public_names(cls) + (["__call__"] if owner in PIPELINES else [])
        for name in names:
            if isinstance(inspect.getattr_static(cls, name), property) or not callable(getattr(cls, name)):
                yield _idiom(f"{owner}.{name}", source, read, owner, name)
            elif name == "from_pretrained":
                for keyword in [None, *loading_keywords(cls)]:
                    label = f"{owner}.from_pretrained({keyword or ''})"
                    yield _idiom(label, source, load, owner, keyword)
            else:
                for argument in [None, *_optional(owner, name)]:
                    yield _idiom(f"{owner}.{name}({argument or ''})", source, call, owner, name, argument)


def _optional(owner: str, method: str) -> list[str]:
    """The arguments that a call with all defaults does not show."""
    table = ARGUMENTS.get(f"{owner}.{method}", ARGUMENTS.get(method, {}))
    parameters = parameters_of(getattr(getattr(diffusers, owner), method))
    free = {n for n, p in parameters.items() if p.default is not p.empty or (p.kind is p.VAR_KEYWORD and n in table)}
    return [n for n in parameters if n in free]


def _idiom(name: str, source: str, run: Callable[..., Any], *arguments: Any) -> Idiom:
    def perform(lib: ModuleType, make: Make) -> Any:
        return run(make, *arguments)

    return Idiom(name, source, perform)


def samples_missing() -> list[str]:
    """Arguments without a sample."""
    missing = []
    for owner in CLASSES:
        cls = getattr(diffusers, owner)
        if owner not in PIPELINES:
            known = OPTIONS.get(owner, SCHEDULER_OPTIONS)
            missing += [f"{owner}({a})" for a in parameters_of(cls.__init__) if a not in known]
        for name in public_names(cls) + (["__call__"] if owner in PIPELINES else []):
            if isinstance(inspect.getattr_static(cls, name), property) or not callable(getattr(cls, name)):
                continue
            if name == "from_pretrained":
                missing += [f"{owner}.{name}({k})" for k in loading_keywords(cls) if k not in LOADING]
                continue
            table = ARGUMENTS.get(f"{owner}.{name}", ARGUMENTS.get(name, {}))
            free = ("args", "kwargs")
            missing += [f"{owner}.{name}({a})" for a in parameters_of(getattr(cls, name)) if a not in (*table, *free)]
    return missing
