"""Twenty patterns of scripts that people have: trainers, node packs, notebooks."""

from __future__ import annotations

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import impasto

from .building import Make, comparable, difference, noise
from .idioms import CALL, Recorder, glm_inputs, pixart_inputs, seed

EMBEDS = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")


@pytest.fixture
def ours(tmp_path: Path) -> Make:
    return Make(impasto, tmp_path)


@pytest.fixture
def theirs(tmp_path: Path) -> Make:
    return Make(diffusers, tmp_path)


def same(ours: Any, theirs: Any) -> None:
    assert difference(comparable(ours), comparable(theirs)) is None


def generate(pipe: Any, value: int = 0, **changes: Any) -> Any:
    return pipe(**{"prompt": "a red cube", "generator": seed(value), **CALL, **changes}).images


def test_attention_maps_by_hooks(ours: Make, theirs: Make) -> None:
    """Hooks on the layers of attention, from which scripts compute the maps themselves."""
    seen: list[list[Tensor]] = [[], []]
    for make, kept in zip((ours, theirs), seen):
        pipe = make.sigma()
        for block in pipe.transformer.transformer_blocks:
            block.attn2.to_q.register_forward_hook(lambda module, inputs, output, kept=kept: kept.append(output))
            block.attn2.register_forward_hook(lambda module, inputs, output, kept=kept: kept.append(output))
        generate(pipe, height=16, width=16)
    assert len(seen[0]) == len(seen[1]) == 2 * 2 * 3  # blocks, layers, steps
    same(seen[0], seen[1])


def test_a_recording_attention_processor(ours: Make, theirs: Make) -> None:
    maps = []
    for make in (ours, theirs):
        pipe = make.sigma()
        recorder = Recorder()
        pipe.transformer.set_attn_processor(dict.fromkeys(pipe.transformer.attn_processors, recorder))
        images = generate(pipe)
        maps.append((images, [shape[:2] for shape in recorder.shapes]))
    assert len(maps[0][1]) == 2 * 2 * 3
    same(*maps)


def test_perturbed_attention_guidance_of_diffusers(ours: Make, theirs: Make) -> None:
    """diffusers' PAG pipeline, of our components through `to_diffusers`."""
    images = []
    for pipe in (impasto.to_diffusers(ours.sigma()), theirs.sigma()):
        layers = {"pag_applied_layers": ["blocks.1"]}
        pag = diffusers.PixArtSigmaPAGPipeline(**pipe.components, **layers)
        pag.set_progress_bar_config(disable=True)
        images.append(pag("a cat", generator=seed(), pag_scale=2.0, **CALL).images)
    same(*images)
    assert difference(comparable(generate(ours.sigma(), prompt="a cat")), comparable(images[0]))  # it has an effect


def test_a_trainer_of_low_rank_layers_with_peft_and_accelerate(ours: Make, theirs: Make, tmp_path: Path) -> None:
    import accelerate
    import peft

    results = []
    for make in (ours, theirs):
        torch.manual_seed(0)
        model, scheduler = make.pixart().requires_grad_(False), make.scheduler("DDPMScheduler")
        config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
        model = peft.get_peft_model(model, config)
        trained = [p for p in model.parameters() if p.requires_grad]
        accelerator = accelerate.Accelerator(cpu=True)
        model, optimizer = accelerator.prepare(model, torch.optim.AdamW(trained, lr=1e-2))
        model.train()
        losses = []
        for step in range(3):
            with accelerator.accumulate(model):
                clean, target = noise(2, 4, 8, 8, seed=step), noise(2, 4, 8, 8, seed=step + 9)
                timesteps = torch.tensor([100, 600])
                noisy = scheduler.add_noise(clean, target, timesteps)
                predicted = model(noisy, encoder_hidden_states=noise(2, 5, 32), timestep=timesteps).sample
                loss = nn.functional.mse_loss(predicted.chunk(2, dim=1)[0], target)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
        accelerator.unwrap_model(model).save_pretrained(tmp_path / "lora")
        base = peft.PeftModel.from_pretrained(make.pixart(), str(tmp_path / "lora")).merge_and_unload()
        results.append((losses, base(**pixart_inputs()).sample))
        assert losses[-1] < losses[0]
    same(*results)


def test_averaged_weights(ours: Make, theirs: Make, tmp_path: Path) -> None:
    from diffusers.training_utils import EMAModel

    results = []
    for make in (ours, theirs):
        model = make.pixart()
        ema = EMAModel(model.parameters(), decay=0.9, model_cls=type(model), model_config=model.config)
        for _ in range(3):
            for parameter in model.parameters():
                parameter.data += 0.1
            ema.step(model.parameters())
        ema.store(model.parameters())
        ema.copy_to(model.parameters())
        averaged = model(**pixart_inputs()).sample
        ema.restore(model.parameters())
        ema.save_pretrained(str(tmp_path / type(model).__module__.split(".")[0]))
        results.append((averaged, model(**pixart_inputs()).sample))
    again = EMAModel.from_pretrained(str(tmp_path / "impasto"), impasto.PixArtTransformer2DModel)
    assert again.optimization_step == 3
    same(*results)


def test_quantized_loading(ours: Make) -> None:
    """A quantized transformer is loaded, generates, and is near the one that is not."""
    from torchao.quantization import Int8WeightOnlyConfig

    config = diffusers.TorchAoConfig(Int8WeightOnlyConfig())
    folder = ours.checkpoint()
    options = {"subfolder": "transformer", "torch_dtype": torch.float32}
    model = impasto.PixArtTransformer2DModel.from_pretrained(folder, quantization_config=config, **options)
    plain = impasto.PixArtTransformer2DModel.from_pretrained(folder, **options)
    with torch.no_grad():
        found, expected = (m(**pixart_inputs()).sample for m in (model, plain))
    distance = ((found - expected).norm() / expected.norm()).item()
    assert 0 < distance < 0.05
    pipe = impasto.PixArtSigmaPipeline.from_pretrained(folder, transformer=model)
    assert generate(pipe).isfinite().all()


def test_image_to_image_by_hand(ours: Make, theirs: Make) -> None:
    results = []
    for make in (ours, theirs):
        pipe = make.sigma(scheduler=make.scheduler("DDIMScheduler", clip_sample=False))
        with torch.no_grad():
            pixels = pipe.image_processor.preprocess(Image.fromarray(np.full((16, 16, 3), 90, np.uint8)))
            clean = pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor
            pipe.scheduler.set_timesteps(5)
            timesteps = pipe.scheduler.timesteps[2:]
            latents = pipe.scheduler.add_noise(clean, noise(*clean.shape), timesteps[:1])
            text = dict(zip(EMBEDS, pipe.encode_prompt("a cat", do_classifier_free_guidance=False)))
            for t in timesteps:
                predicted = pipe.transformer(
                    latents,
                    encoder_hidden_states=text["prompt_embeds"],
                    encoder_attention_mask=text["prompt_attention_mask"],
                    timestep=t.reshape(1),
                    added_cond_kwargs={"resolution": None, "aspect_ratio": None},
                ).sample.chunk(2, 1)[0]
                latents = pipe.scheduler.step(predicted, t, latents).prev_sample
            decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
        results.append(pipe.image_processor.postprocess(decoded, output_type="np"))
    same(*results)


def test_latents_passed_on_to_a_second_pipeline(ours: Make, theirs: Make) -> None:
    results = []
    for make in (ours, theirs):
        latents = generate(make.sigma(), output_type="latent")
        results.append(generate(make.alpha(), latents=latents, output_type="np"))
    same(*results)


@pytest.mark.parametrize(
    "name",
    [
        "DDIMScheduler",
        "LCMScheduler",
        "EulerAncestralDiscreteScheduler",
        "UniPCMultistepScheduler",
        "DEISMultistepScheduler",
    ],
)
def test_schedulers_swapped_back_and_forth(name: str, ours: Make, theirs: Make) -> None:
    results = []
    for make in (ours, theirs):
        pipe = make.sigma()
        original = pipe.scheduler.config
        pipe.scheduler = getattr(make.lib if hasattr(make.lib, name) else diffusers, name).from_config(original)
        first = generate(pipe)
        pipe.scheduler = make.lib.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
        results.append((first, generate(pipe)))
    same(*results)


def test_previews_and_cancel(ours: Make) -> None:
    """A callback that shows each step and then stops, as user interfaces have it."""
    pipe = ours.sigma()
    previews: list[Image.Image] = []

    def show(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        assert pipe.num_timesteps == 5
        decoded = pipe.vae.decode(tensors["latents"] / pipe.vae.config.scaling_factor, return_dict=False)[0]
        previews.extend(pipe.image_processor.postprocess(decoded.detach()))
        if step == 2:
            pipe._interrupt = True
        return tensors

    generate(pipe, callback_on_step_end=show, num_inference_steps=5)
    assert len(previews) == 3
    assert all(p.size == (16, 16) for p in previews)
    assert pipe.interrupt
    plain = ours.sigma()
    assert torch.equal(generate(pipe), generate(plain))  # the next call is complete


def test_guidance_cut_off_by_a_callback_of_diffusers(ours: Make) -> None:
    """diffusers' own callback, on ours; after the cut-off the loop is the one without guidance."""
    from diffusers.callbacks import SDCFGCutoffCallback

    cut = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)
    options = {
        "callback_on_step_end": cut,
        "callback_on_step_end_tensor_inputs": cut.tensor_inputs,
        "num_inference_steps": 4,
        "prompt": ["a cat"],
    }
    scales: list[float] = []
    pipe = ours.sigma()

    def both(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        scales.append(pipe.guidance_scale)
        return cut(pipe, step, timestep, tensors)

    found = generate(pipe, **options)
    assert difference(comparable(found), comparable(generate(ours.sigma(), num_inference_steps=4, prompt=["a cat"])))
    generate(pipe, **{**options, "callback_on_step_end": both})
    assert scales == [4.5, 4.5, 0.0, 0.0]


def test_a_pipeline_shared_by_a_pool_of_threads(ours: Make) -> None:
    pipe = ours.sigma()
    alone = [generate(pipe, i) for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda i: generate(pipe, i), range(4)))
    assert all(torch.equal(a, b) for a, b in zip(alone, together))


@pytest.mark.parametrize("strict", [False, True])
def test_export_by_torch(ours: Make, strict: bool) -> None:
    model = ours.pixart().eval()
    inputs = pixart_inputs(2)
    with torch.no_grad():
        program = torch.export.export(model, (), {**inputs, "return_dict": False}, strict=strict)
        same(program.module()(**inputs, return_dict=False), model(**inputs, return_dict=False))


def test_traced(ours: Make) -> None:
    """Node packs trace the decoder and the transformer."""
    vae, model = ours.vae().eval(), ours.pixart().eval()

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vae = vae

        def forward(self, latents: Tensor) -> Tensor:
            return self.vae.decode(latents, return_dict=False)[0]

    class Denoiser(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, latents: Tensor, text: Tensor, timestep: Tensor, mask: Tensor) -> Tensor:
            return self.model(latents, text, timestep, encoder_attention_mask=mask, return_dict=False)[0]

    example = tuple(pixart_inputs().values())
    other = tuple({**pixart_inputs(), "hidden_states": noise(1, 4, 8, 8, seed=5)}.values())
    with torch.no_grad():
        decoder = torch.jit.trace(Decoder(), noise(1, 4, 4, 4))
        denoiser = torch.jit.trace(Denoiser(), example)
        same(decoder(noise(1, 4, 4, 4, seed=4)), vae.decode(noise(1, 4, 4, 4, seed=4)).sample)
        same(denoiser(*other), Denoiser()(*other))


def test_embeddings_computed_before_and_stored(ours: Make, theirs: Make, tmp_path: Path) -> None:
    """Prompts encoded by one process, images made by another that has no text encoder."""
    from safetensors.torch import load_file, save_file

    results = []
    for make in (ours, theirs):
        with torch.no_grad():
            text = dict(zip(EMBEDS, make.alpha(transformer=None, vae=None).encode_prompt("a cat")))
        save_file({k: v.contiguous() for k, v in text.items()}, tmp_path / "text.safetensors")
        pipe = make.alpha(text_encoder=None, tokenizer=None)
        stored = load_file(tmp_path / "text.safetensors")
        results.append(generate(pipe, prompt=None, negative_prompt=None, **stored))
    same(*results)


def test_offload_calls(ours: Make, theirs: Make) -> None:
    expected = generate(theirs.sigma())
    for enable in (
        lambda p: p.enable_model_cpu_offload(device="cpu"),
        lambda p: p.enable_sequential_cpu_offload(device="cpu"),
        lambda p: p.enable_group_offload(torch.device("cpu"), offload_type="leaf_level"),
        lambda p: (p.enable_attention_slicing(), p.vae.enable_slicing(), p.vae.enable_tiling()),
    ):
        pipe = ours.sigma()
        enable(pipe)
        same(generate(pipe), expected)
        pipe.maybe_free_model_hooks()
        pipe.remove_all_hooks()
        same(generate(pipe), expected)


def test_folders_of_one_library_loaded_by_the_other(ours: Make, theirs: Make, tmp_path: Path) -> None:
    mine, reference = tmp_path / "ours", tmp_path / "theirs"
    ours.sigma().save_pretrained(mine, variant="fp16", max_shard_size="40KB")
    theirs.sigma().save_pretrained(reference, variant="fp16", max_shard_size="40KB")
    for folder, lib in ((mine, diffusers), (reference, impasto)):
        pipe = lib.DiffusionPipeline.from_pretrained(str(folder), variant="fp16")
        pipe.set_progress_bar_config(disable=True)
        assert type(pipe).__name__ == "PixArtSigmaPipeline"
        same(generate(pipe), generate(ours.sigma()))


def test_saving_by_diffusers(ours: Make, tmp_path: Path) -> None:
    """What `to_diffusers` makes is saved whole, shares its tensors, and comes back by `from_pipe`."""
    pipe = ours.sigma()
    other = impasto.to_diffusers(pipe)
    assert type(other) is diffusers.PixArtSigmaPipeline
    weight = other.transformer.proj_out.weight
    assert weight.data_ptr() == pipe.transformer.proj_out.weight.data_ptr()
    other.save_pretrained(tmp_path)
    same(generate(impasto.PixArtSigmaPipeline.from_pretrained(tmp_path)), generate(pipe))
    back = impasto.PixArtSigmaPipeline.from_pipe(other)
    back.set_progress_bar_config(disable=True)
    same(generate(back), generate(pipe))


def test_a_loop_by_hand_in_which_each_image_has_its_generator(ours: Make, theirs: Make) -> None:
    results = []
    for make in (ours, theirs):
        pipe = make.sigma(scheduler=make.scheduler("DDPMScheduler", clip_sample=False))
        batch = generate(pipe, prompt=["a cat", "a cube"], generator=[seed(0), seed(1)])
        results.append(batch)
    same(*results)
    pipe = ours.sigma(scheduler=ours.scheduler("DDPMScheduler", clip_sample=False))
    same(generate(pipe, 1, prompt="a cube"), results[0][1:])  # an image does not depend on its batch


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_a_training_step_without_a_trainer(kind: str, ours: Make, theirs: Make) -> None:
    results = []
    for make in (ours, theirs):
        model, scheduler = make.pixart().train(), make.scheduler("DDPMScheduler", prediction_type=kind)
        model.enable_gradient_checkpointing()
        clean, target, timesteps = noise(2, 4, 8, 8), noise(2, 4, 8, 8, seed=1), torch.tensor([20, 800])
        noisy = scheduler.add_noise(clean, target, timesteps)
        if kind == "v_prediction":
            target = scheduler.get_velocity(clean, target, timesteps)
        found = model(noisy, encoder_hidden_states=noise(2, 5, 32), timestep=timesteps).sample.chunk(2, 1)[0]
        nn.functional.mse_loss(found, target).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        results.append((norm, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    same(*results)


def test_a_grid_of_images(ours: Make) -> None:
    from impasto.utils import load_image, make_image_grid

    images = ours.sigma()(["a", "b"], generator=seed(), **{**CALL, "output_type": "pil"}).images
    grid = make_image_grid(images, rows=1, cols=2, resize=32)
    assert grid.size == (64, 32)
    grid.save(ours.folder / "grid.png")
    assert load_image(str(ours.folder / "grid.png")).size == (64, 32)
    with pytest.raises(ValueError, match=r"[23]"):
        make_image_grid(images, rows=3, cols=1)


def test_auto_pipelines(ours: Make) -> None:
    folder = ours.checkpoint()
    text = impasto.AutoPipelineForText2Image.from_pretrained(folder)
    text.set_progress_bar_config(disable=True)
    edit = impasto.AutoPipelineForImage2Image.from_pipe(text)
    edit.set_progress_bar_config(disable=True)
    paint = impasto.AutoPipelineForInpainting.from_pipe(edit)
    assert type(text) is impasto.PixArtSigmaPipeline
    assert type(edit) is impasto.PixArtSigmaImg2ImgPipeline
    assert type(paint) is impasto.PixArtSigmaInpaintPipeline
    assert text.transformer is edit.transformer is paint.transformer
    image = text("a cat", generator=seed(), **{**CALL, "output_type": "pil"}).images[0]
    assert edit("a cube", image=image, strength=0.5, num_inference_steps=4, generator=seed()).images[0].size == (16, 16)


def test_copies_and_pickles(ours: Make) -> None:
    for model, inputs in ((ours.pixart(), pixart_inputs()), (ours.glm_transformer(), glm_inputs())):
        expected = model(**inputs).sample
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]
        for one in copies:
            assert torch.equal(one(**inputs).sample, expected)
            assert one.config == model.config
            assert one.proj_out.weight.data_ptr() != model.proj_out.weight.data_ptr()
    scheduler = ours.scheduler()
    scheduler.set_timesteps(4)
    again = pickle.loads(pickle.dumps(scheduler))
    assert torch.equal(again.timesteps, scheduler.timesteps)


def test_a_foreign_autoencoder_and_scheduler_saved_and_loaded(ours: Make, theirs: Make, tmp_path: Path) -> None:
    pipe = ours.sigma(vae=theirs.vae(), scheduler=diffusers.EulerDiscreteScheduler())
    expected = generate(pipe, output_type="np")
    pipe.save_pretrained(tmp_path / "mixed")
    again = impasto.PixArtSigmaPipeline.from_pretrained(tmp_path / "mixed")
    again.set_progress_bar_config(disable=True)
    assert type(again.scheduler) is diffusers.EulerDiscreteScheduler
    same(generate(again, output_type="np"), expected)
