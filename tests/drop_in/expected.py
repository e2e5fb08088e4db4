"""Idioms that differ on purpose, with the words of docs/differences.md that say why."""

_MODELS = ("PixArtTransformer2DModel", "GlmImageTransformer2DModel", "AutoencoderKL")
_PIPELINES = ("PixArtAlphaPipeline", "PixArtSigmaPipeline", "GlmImagePipeline")

EXPECTED_DIFFERENT: dict[str, str] = {
    "a_keyword_misspelt": "An unknown keyword of `from_pretrained` is an error",
    "sizes_that_do_not_fit": "`ignore_mismatched_sizes=True` are errors",
    "a_tensor_that_is_missing": "A tensor that is missing, unexpected or misshapen is an error",
    "saving_pickles": "Pickles are never written",
    "a_prompt_and_its_embeddings": "`encode_prompt` with both `prompt` and `prompt_embeds` is an error",
    "images_and_their_batch": "Padding of glyphs is masked",
    "a_config_assigned_to": "Any assignment to a `config` is an error",
    "embeddings_of_padding": "The embeddings of padding are zero in what `encode_prompt` returns",
    "PixArtTransformer2DModel.get_memory_footprint()": "The positions of PixArt's transformer are not a buffer",
    "dequantized": "`dequantize()` of a model that is not quantized does nothing",
    "names_of_all_modules": "Modules without parameters",
    "AutoencoderKL(act_fn)": '`act_fn` of the autoencoder other than `"silu"`',
    "DPMSolverMultistepScheduler.add_noise()": "`DPMSolverMultistepScheduler.add_noise` before `set_timesteps`",
    "FlowMatchEulerDiscreteScheduler.step(per_token_timesteps)": "Euler steps with a timestep per token",
    "GlmImageTransformer2DModel.forward(attention_mask)": "`attention_mask` removes tokens",
    **{
        f"{m}.save_pretrained(is_main_process)": "`save_pretrained(is_main_process=False)` writes nothing"
        for m in _MODELS
    },
    **{f"{p}.from_pretrained(dtype)": "`dtype=` is `torch_dtype=`" for p in _PIPELINES},
    **{f"{p}.enable_group_offload(offload_to_disk_path)": "`offload_to_disk_path` works" for p in _PIPELINES},
}

#: Those in which diffusers is wrong by chance: which of its components' files is left depends on timing.
BY_CHANCE = {name for name in EXPECTED_DIFFERENT if "offload_to_disk_path" in name}
