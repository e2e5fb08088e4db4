"""Idioms that differ on purpose, with the words of docs/differences.md that say why."""

EXPECTED_DIFFERENT: dict[str, str] = {
    "a_config_assigned_to": "Any assignment to a `config` is an error",
    "embeddings_of_padding": "The embeddings of padding are zero in what `encode_prompt` returns",
    "DPMSolverMultistepScheduler.add_noise()": "`DPMSolverMultistepScheduler.add_noise` before `set_timesteps`",
    "GlmImageTransformer2DModel.forward(attention_mask)": "`attention_mask` removes tokens",
}
