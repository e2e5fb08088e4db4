"""Image to image and inpainting: images and masks of every kind, sizes, what is kept exactly, and what is refused."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import impasto
from impasto.errors import InputError
from impasto.pipelines.edit_inputs import Box, Originals, read_originals
from impasto.pipelines.inputs import Canvas
from impasto.pipelines.pixart import PixArtSigmaPipeline
from impasto.pipelines.pixart_edits import (
    PixArtAlphaImg2ImgPipeline,
    PixArtAlphaInpaintPipeline,
    PixArtSigmaImg2ImgPipeline,
    PixArtSigmaInpaintPipeline,
)
from impasto.pipelines.sampling import Edit
from impasto.schedulers.ddim import DDIMScheduler
from impasto.schedulers.lcm import LCMScheduler
from impasto.transforms.step_cache import cache_steps

from ..tiny import tiny_pipeline, tiny_transformer, tiny_vae, write_pipeline


def levels(height: int = 16, width: int = 16, seed: int = 0) -> np.ndarray[Any, Any]:
    """[H, W, 3], uint8."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def square(height: int = 16, width: int = 16) -> np.ndarray[Any, Any]:
    """[H, W]: 255 in the middle."""
    mask = np.zeros((height, width), dtype=np.uint8)
    mask[height // 4 : height // 2, width // 4 : width // 2 + 1] = 255
    return mask


def seeds(count: int, first: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(first + i) for i in range(count)]


@pytest.fixture(scope="module")
def change() -> PixArtSigmaImg2ImgPipeline:
    return tiny_pipeline(PixArtSigmaImg2ImgPipeline)


@pytest.fixture(scope="module")
def repaint(change: PixArtSigmaImg2ImgPipeline) -> PixArtSigmaInpaintPipeline:
    pipe = PixArtSigmaInpaintPipeline.from_pipe(change)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(pipe: Any, prompt: Any = "a cat", **options: Any) -> Any:
    settings = {"num_inference_steps": 4, "guidance_scale": 1.0, "output_type": "pt", "generator": seeds(1)}
    return pipe(prompt, **{**settings, **options}).images


# --- arguments ---


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (PixArtSigmaImg2ImgPipeline, diffusers.StableDiffusionImg2ImgPipeline),
        (PixArtSigmaInpaintPipeline, diffusers.StableDiffusionInpaintPipeline),
    ],
)
def test_arguments_are_in_the_order_of_stable_diffusion(ours: Any, theirs: Any) -> None:
    """Those that both have; PixArt's own follow. Defaults are theirs, except for steps and guidance."""
    mine, other = (inspect.signature(cls.__call__).parameters for cls in (ours, theirs))
    shared = [name for name in other if name in mine]
    assert [name for name in mine if name in other] == shared
    assert list(mine)[: len(shared) - 1] == shared[:-1]  # the last is kwargs
    for name in shared:
        if name not in ("num_inference_steps", "guidance_scale", "callback_on_step_end_tensor_inputs"):
            assert mine[name].default == other[name].default, name
    assert {"strength", "image"} <= set(shared)
    text = inspect.signature(PixArtSigmaPipeline.__call__).parameters
    assert set(text) - set(mine) == set()
    for name in ("num_inference_steps", "guidance_scale", "max_sequence_length", "clean_caption"):
        assert mine[name].default == text[name].default


def test_alpha_has_its_own_text_length() -> None:
    for cls in (PixArtAlphaImg2ImgPipeline, PixArtAlphaInpaintPipeline):
        assert inspect.signature(cls.__call__).parameters["max_sequence_length"].default == 120
        assert inspect.signature(cls.encode_prompt).parameters["max_sequence_length"].default == 120
        assert cls.family.name == "PixArt-α"


# --- components ---


def test_components_are_shared_both_ways(change: PixArtSigmaImg2ImgPipeline) -> None:
    text = PixArtSigmaPipeline.from_pipe(change)
    back = impasto.PixArtSigmaInpaintPipeline.from_pipe(text)
    assert back.transformer is change.transformer
    assert back.vae is change.vae


def test_a_saved_pipeline_is_that_of_text_to_image(
    tmp_path: Path, change: PixArtSigmaImg2ImgPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    change.save_pretrained(tmp_path / "saved")
    index = json.loads((tmp_path / "saved/model_index.json").read_text())
    assert index["_class_name"] == "PixArtSigmaPipeline"
    write_pipeline(tmp_path / "alpha", PixArtAlphaInpaintPipeline)
    index = json.loads((tmp_path / "alpha/model_index.json").read_text())
    assert index["_class_name"] == "PixArtAlphaPipeline"
    loaded = PixArtSigmaInpaintPipeline.from_pretrained(tmp_path / "saved")
    assert "is loaded as" not in caplog.text
    loaded.set_progress_bar_config(disable=True)
    assert call(loaded, image=levels(), mask_image=square()).shape == (1, 3, 16, 16)


# --- images ---


def test_images_of_every_kind_are_the_same(change: PixArtSigmaImg2ImgPipeline) -> None:
    array = levels()
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    expected = call(change, image=Image.fromarray(array))
    for given in (array, array / np.float32(255), tensor, tensor / 255, tensor[None], [Image.fromarray(array)]):
        assert torch.allclose(call(change, image=given), expected, atol=1e-6)


def test_latents_are_taken_as_they_are(change: PixArtSigmaImg2ImgPipeline) -> None:
    pixels = torch.from_numpy(levels()).permute(2, 0, 1)[None] / 255
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    latents = change.encode_images(pixels * 2 - 1, torch.Generator().manual_seed(0))
    expected = call(change, image=pixels, latents=noise, output_type="latent")
    assert torch.allclose(call(change, image=latents, latents=noise, output_type="latent"), expected, atol=1e-5)


def test_encoding_is_the_inverse_of_decoding() -> None:
    """In scale, shift and statistics, also with an autoencoder without a distribution."""

    class Plain:
        def encode(self, x: Tensor) -> Any:
            return diffusers.models.autoencoders.autoencoder_tiny.AutoencoderTinyOutput(latents=x)

        def decode(self, z: Tensor, return_dict: bool) -> tuple[Tensor]:
            return (z,)

    pipe = tiny_pipeline(PixArtSigmaImg2ImgPipeline)
    images = torch.randn(2, 3, 4, 4)
    for config in (
        {"scaling_factor": 0.5},
        {"scaling_factor": 2.0, "shift_factor": 0.3},
        {"latents_mean": [1.0, 2.0, 3.0], "latents_std": [0.5, 2.0, 4.0], "scaling_factor": 0.7},
    ):
        vae = tiny_vae()
        vae.encode, vae.decode = Plain().encode, Plain().decode  # type: ignore[method-assign]
        vae.config = type(vae.config)({"block_out_channels": [8, 8], **config})
        pipe.vae = vae
        assert torch.allclose(pipe.decode(pipe.encode_images(images)), images, atol=1e-6)
        assert not torch.allclose(pipe.encode_images(images), images)


def test_each_image_has_its_own_prompt_seed_and_autoencoder_noise(change: PixArtSigmaImg2ImgPipeline) -> None:
    images, prompts = [levels(seed=0), levels(seed=1)], ["a cat", "a dog"]
    together = call(change, prompts, image=images, num_images_per_prompt=2, generator=seeds(4))
    for i in range(4):
        alone = call(change, prompts[i // 2], image=images[i // 2], generator=seeds(1, i))
        assert torch.allclose(together[i], alone[0], atol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-2)


def test_one_prompt_for_all_images_and_one_image_for_all_prompts(change: PixArtSigmaImg2ImgPipeline) -> None:
    images = [levels(seed=0), levels(seed=1)]
    one = call(change, "a cat", image=images, generator=seeds(2))
    assert torch.allclose(one, call(change, ["a cat"] * 2, image=images, generator=seeds(2)), atol=1e-6)
    assert call(change, ["a cat", "a dog"], image=images[0], generator=seeds(2)).shape == (2, 3, 16, 16)


# --- sizes ---


@pytest.mark.parametrize(
    ("size", "options", "generated", "returned"),
    [
        ((16, 16), {}, (8, 8), (16, 16)),
        ((33, 70), {}, (6, 12), (33, 70)),  # about the training area
        ((33, 70), {"height": 20, "width": 24}, (10, 12), (20, 24)),
        ((21, 27), {"use_resolution_binning": False}, (10, 14), (21, 27)),  # about its own size
    ],
)
def test_sizes(
    change: PixArtSigmaImg2ImgPipeline, size: tuple[int, int], options: Any, generated: Any, returned: Any
) -> None:
    image = Image.fromarray(levels(*size))
    assert call(change, image=image, output_type="latent", **options).shape[2:] == generated
    assert call(change, image=image, **options).shape[2:] == returned


def test_binning_generates_at_the_nearest_training_size(change: PixArtSigmaImg2ImgPipeline) -> None:
    components = {"vae": tiny_vae(levels=4), "transformer": tiny_transformer(sample_size=32)}  # 256 px
    binned = PixArtSigmaImg2ImgPipeline.from_pipe(change, **components)
    binned.set_progress_bar_config(disable=True)
    options = {"image": levels(100, 203), "num_inference_steps": 1, "strength": 1.0}
    assert call(binned, **options, output_type="latent").shape == (1, 4, 22, 44)  # 176 x 352 px
    assert call(binned, **options).shape == (1, 3, 100, 203)


def test_what_is_resized_stays_in_place(change: PixArtSigmaImg2ImgPipeline) -> None:
    """An image that is scaled for generation and back is not shifted or cropped."""
    image = np.zeros((40, 60, 3), dtype=np.uint8)
    image[:8, -12:] = 255
    originals = Originals([torch.from_numpy(image).permute(2, 0, 1) / 255], Canvas(16, 24, 40, 60))
    back = originals.finished(originals.to_encode() * 0.5 + 0.5)
    assert back.shape == (1, 3, 40, 60)
    assert back[0, :, 2, -3].min() > 0.9
    assert back[0, :, 20].max() < 0.1


# --- strength and the loop ---


def test_strength_decides_how_many_steps_are_taken_and_how_much_is_kept(change: PixArtSigmaImg2ImgPipeline) -> None:
    seen: list[tuple[int, int]] = []

    def note(pipe: Any, index: int, t: Tensor, tensors: dict[str, Tensor]) -> None:
        seen.append((index, int(t)))

    image = torch.full((1, 3, 16, 16), 0.7)
    distances = []
    for strength in (0.1, 0.5, 1.0):
        seen.clear()
        out = call(
            change, image=image, strength=strength, num_inference_steps=10, callback_on_step_end=note,
            output_type="latent",
        )  # fmt: skip
        assert [index for index, _ in seen] == list(range(int(10 * strength)))
        clean = change.encode_images(image * 2 - 1, torch.Generator().manual_seed(0))
        distances.append(float((out - clean).norm()))
    assert distances == sorted(distances)
    change.scheduler.set_timesteps(10)
    assert [t for _, t in seen] == change.scheduler.timesteps.tolist()


def test_strength_of_a_custom_schedule(change: PixArtSigmaImg2ImgPipeline) -> None:
    seen: list[float] = []
    embeds = change.encode_prompt("a cat", do_classifier_free_guidance=False)
    latents, noise = torch.randn(2, 1, 4, 8, 8)
    for step in change.denoise(noise, embeds, timesteps=[900, 500, 250, 20], edit=Edit(latents, 0.5)):
        seen.append(float(step.timestep))
        assert step.count == 2
    assert seen == [250, 20]


def test_the_old_callback_counts_the_steps_that_are_taken(change: PixArtSigmaImg2ImgPipeline) -> None:
    steps: list[int] = []
    call(
        change, image=levels(), strength=0.5, num_inference_steps=8, callback=lambda i, t, x: steps.append(i),
        callback_steps=2,
    )  # fmt: skip
    assert steps == [0, 2]


def test_the_loop_is_public(repaint: PixArtSigmaInpaintPipeline) -> None:
    """Loops of edits may take turns, and their callers may preview and stop them."""
    embeds = repaint.encode_prompt("a cat", do_classifier_free_guidance=False)
    noise, image = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1

    def latents(steps: list[Any]) -> Tensor:
        return steps[-1].latents

    alone = [
        latents(list(repaint.denoise(noise, embeds, num_inference_steps=6, edit=edit)))
        for edit in (Edit(image, 0.5), Edit(image, 1.0, mask))
    ]
    first = repaint.denoise(noise, embeds, num_inference_steps=6, edit=Edit(image, 0.5))
    second = repaint.denoise(noise, embeds, num_inference_steps=6, edit=Edit(image, 1.0, mask))
    next(second)
    turns = [latents(list(first)), latents(list(second))]
    assert all(torch.equal(a, b) for a, b in zip(alone, turns))
    assert torch.equal(alone[1][..., 4:], image[..., 4:])
    for edit, message in (
        (Edit(image, 0.0), "strength"),
        (Edit(image[:, :3]), r"edit.latents must be .* \[1, 4, 8, 8\]"),
        (Edit(image, mask=mask[0]), "edit.mask"),
        (Edit(image, mask=mask.expand(2, 1, 8, 8)), r"edit.mask must be .* \[1, 1, 8, 8\]"),
    ):
        with pytest.raises(InputError, match=message):
            next(repaint.denoise(noise, embeds, edit=edit))


def test_an_interrupted_edit_returns_what_there_is(change: PixArtSigmaImg2ImgPipeline) -> None:
    def stop(pipe: Any, index: int, t: Tensor, tensors: dict[str, Tensor]) -> None:
        pipe.interrupt = True

    assert call(change, image=levels(), callback_on_step_end=stop).shape == (1, 3, 16, 16)


def test_a_step_cache_counts_from_the_first_step_that_is_taken() -> None:
    pipe = tiny_pipeline(PixArtSigmaImg2ImgPipeline, scheduler=DDIMScheduler())
    with cache_steps(pipe, method="interval", interval=2) as cache:
        call(pipe, image=levels(), strength=0.5, num_inference_steps=16)
        assert cache.computed + cache.reused == 8
        assert cache.reused > 0


# --- masks ---


def test_masks_of_every_kind_are_the_same(repaint: PixArtSigmaInpaintPipeline) -> None:
    mask = square()
    expected = call(repaint, image=levels(), mask_image=Image.fromarray(mask))
    for given in (
        mask, mask[..., None], mask > 0, mask // 255, mask / np.float32(255), torch.from_numpy(mask),
        torch.from_numpy(mask)[None], torch.from_numpy(mask)[None, None] > 0, [Image.fromarray(mask).convert("1")],
        Image.fromarray(mask).convert("RGB"),
    ):  # fmt: skip
        assert torch.equal(call(repaint, image=levels(), mask_image=given), expected)


def test_latents_outside_of_the_mask_are_those_of_the_image(repaint: PixArtSigmaInpaintPipeline) -> None:
    pixels = torch.from_numpy(levels()).permute(2, 0, 1)[None].contiguous() / 255
    out = call(repaint, image=pixels, mask_image=square(), output_type="latent", strength=0.9)
    z = repaint.encode_images(pixels * 2 - 1, seeds(1))
    changed = (out != z).any(dim=1)[0]
    covered = torch.nn.functional.max_pool2d(torch.from_numpy(square())[None].float(), 2)[0] > 0
    assert torch.equal(changed, covered)  # a latent that is covered in part is repainted


def test_at_full_strength_what_is_under_the_mask_does_not_matter(repaint: PixArtSigmaInpaintPipeline) -> None:
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    other = z.clone()
    mask = torch.zeros(16, 16)
    mask[:, :8] = 1
    other[..., :4] += 1
    noise = torch.randn(1, 4, 8, 8)
    results = [
        [call(repaint, image=x, mask_image=mask, latents=noise, strength=s, output_type="latent") for x in (z, other)]
        for s in (1.0, 0.75)
    ]
    assert torch.allclose(*results[0], atol=1e-6)
    assert not torch.allclose(*results[1], atol=1e-3)


def test_a_batch_of_masks(repaint: PixArtSigmaInpaintPipeline) -> None:
    masks = [square(), 255 - square()]
    together = call(repaint, image=levels(), mask_image=masks, generator=seeds(2))
    for i, mask in enumerate(masks):
        alone = call(repaint, image=levels(), mask_image=mask, generator=seeds(1, i))
        assert torch.allclose(together[i], alone[0], atol=1e-5)
    stacked = call(repaint, image=levels(), mask_image=np.stack(masks), generator=seeds(2))
    assert torch.equal(stacked, together)


# --- pasting back ---


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
@pytest.mark.parametrize("options", [{"overlay": True}, {"padding_mask_crop": 3}, {"padding_mask_crop": 0}], ids=str)
@pytest.mark.parametrize("kind", ["uint8", "float32"])
def test_pixels_outside_of_the_mask_are_returned_exactly(
    repaint: PixArtSigmaInpaintPipeline, output_type: str, options: dict[str, Any], kind: str
) -> None:
    array, mask = levels(53, 38), square(53, 38)
    image: Any = Image.fromarray(array)
    expected = array / np.float32(255)
    if kind == "float32":
        expected = np.random.default_rng(0).random((53, 38, 3), dtype=np.float32) * np.float32(0.3)
        image, array = expected, (expected * 255).round().astype(np.uint8)
    out = call(repaint, image=image, mask_image=mask, output_type=output_type, **options)[0]
    if output_type == "pil":
        out, expected = np.asarray(out), array
    elif output_type == "pt":
        out = out.permute(1, 2, 0).numpy()
    assert out.shape == expected.shape
    same = (out == expected).all(axis=-1)
    assert same[mask == 0].all()
    assert not same[mask > 0].all()


def test_soft_masks_blend_when_pasted(repaint: PixArtSigmaInpaintPipeline) -> None:
    mask = np.tile(np.linspace(0, 1, 16, dtype=np.float32), (16, 1))
    image = np.zeros((16, 16, 3), dtype=np.float32)
    plain = call(repaint, image=image, mask_image=mask)
    pasted = call(repaint, image=image, mask_image=mask, overlay=True)
    assert torch.allclose(pasted, plain * torch.from_numpy(mask), atol=1e-6)


def test_the_crop_surrounds_the_mask_and_has_the_ratio_of_generation() -> None:
    pipe = tiny_pipeline(PixArtSigmaInpaintPipeline)
    mask = np.zeros((100, 200), dtype=np.uint8)
    mask[40:50, 150:190] = 255
    arguments: dict[str, Any] = {
        "image": levels(100, 200), "mask_image": mask, "height": None, "width": None, "padding_mask_crop": 5,
        "output_type": "pil", "use_resolution_binning": True,
    }  # fmt: skip
    found = read_originals(pipe, arguments)
    assert found.boxes is not None
    box = found.boxes[0]
    assert found.canvas[:2] == (12, 24)  # about the training area of 16 x 16
    assert box == Box(33, 145, 25, 50)  # 20 x 50 with its padding, and higher for a ratio of 1 : 2
    found = read_originals(pipe, {**arguments, "height": 16, "width": 16, "padding_mask_crop": 40})
    assert found.boxes == [Box(0, 110, 90, 90)]  # within the image
    assert found.to_encode().shape == (1, 3, 16, 16)


def test_only_the_crop_is_generated(repaint: PixArtSigmaInpaintPipeline) -> None:
    """A small region of a large image is generated at the model's size: what is far from it has no influence."""
    mask = np.zeros((64, 64), dtype=np.uint8)
    mask[20:28, 20:28] = 255
    image = levels(64, 64)
    other = image.copy()
    other[40:] = 0
    options = {"mask_image": mask, "padding_mask_crop": 4}
    results = [call(repaint, image=x, **options)[0, :, 16:32, 16:32] for x in (image, other)]
    assert torch.equal(*results)


# --- refused ---

IMAGE = levels()
BLACK = np.zeros((16, 16), dtype=np.uint8)
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no image": ({"image": None}, "image must be a PIL image, an array or a tensor"),
    "no images": ({"image": []}, "image must be a PIL image"),
    "text": ({"image": "cat.png"}, "image must be a PIL image"),
    "strength": ({"strength": 1.5}, "strength"),
    "negative strength": ({"strength": -0.1}, "strength"),
    "no strength": ({"strength": None}, "strength"),
    "NaN": ({"strength": float("nan")}, "strength"),
    "no step of many": ({"strength": 0.02, "num_inference_steps": 49}, "of 49 steps; give at least 0.0205"),
    "no step": ({"strength": 0.2}, "strength=0.2 leaves none of 4 steps; give at least 0.25"),
    "range": ({"image": IMAGE.astype(np.float32)}, r"must be in \[0, 1\]"),
    "huge": ({"image": torch.zeros(1, 1, 1).expand(3, 10**6, 10**6)}, "too large"),
    "channels": ({"image": np.zeros((16, 16, 2))}, "1 or 3 channels, not 2"),
    "latents with NaN": ({"image": torch.full((1, 4, 8, 8), torch.nan), "mask_image": BLACK + 1}, "NaN"),
    "count": ({"image": [IMAGE] * 3, "prompt": ["a", "b"], "generator": None}, "3 images for 2 prompts"),
    "sizes": ({"image": [IMAGE, levels(20, 16)]}, "different sizes, 16 x 16 and 20 x 16"),
    "sizes of latents": (
        {"image": [torch.zeros(4, 8, 8), torch.zeros(4, 8, 4)], "height": 16, "width": 16},
        "different sizes, 8 x 4 and 8 x 8",
    ),
    "sides": ({"height": 18}, "multiples of 4, not 18 x 16"),
    "latents": ({"image": torch.zeros(1, 4, 8, 8), "height": 32}, "cannot be resized"),
    "kinds": ({"image": [torch.zeros(4, 8, 8), IMAGE]}, "both latents and images"),
    "noise": ({"latents": torch.zeros(1, 4, 4, 4)}, "latents"),
    "unknown": ({"ip_adapter_image": IMAGE}, "no argument 'ip_adapter_image'"),
}
REFUSED_MASKS: dict[str, tuple[dict[str, Any], str]] = {
    "none": ({"mask_image": None}, "mask_image must be a PIL image"),
    "black": ({"mask_image": BLACK}, "black everywhere"),
    "one black": ({"mask_image": [square(), BLACK]}, r"mask_image\[1\] is black"),
    "size": ({"mask_image": square(16, 20)}, "16 x 20 for images of 16 x 16|16 x 20 pixels for images of 16 x 16"),
    "channels": ({"mask_image": np.zeros((1, 16, 16, 3))}, "1 channel"),
    "range": ({"mask_image": square() / 100}, "from 0 to 1"),
    "negative": ({"mask_image": -torch.ones(16, 16)}, "from 0 to 1"),
    "NaN": ({"mask_image": torch.full((16, 16), torch.nan)}, "from 0 to 1"),
    "huge": ({"mask_image": torch.zeros(1, 1, dtype=torch.bool).expand(10**6, 10**6)}, "too large"),
    "huge array": ({"mask_image": np.broadcast_to(np.zeros(1, dtype=bool), (10**6, 10**6))}, "too large"),
    "count": ({"mask_image": [square()] * 3, "image": [IMAGE] * 2}, "2 images and 3 are needed"),
    "padding": ({"padding_mask_crop": -1}, "padding_mask_crop"),
    "padding type": ({"padding_mask_crop": "4"}, "padding_mask_crop"),
    "latents": ({"image": torch.zeros(1, 4, 8, 8), "overlay": True}, "need images"),
    "latent": ({"output_type": "latent", "padding_mask_crop": 2}, "need images"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_arguments(change: PixArtSigmaImg2ImgPipeline, repaint: PixArtSigmaInpaintPipeline, name: str) -> None:
    options, message = REFUSED[name]
    with pytest.raises(InputError, match=message):
        call(repaint, **{"image": IMAGE, "mask_image": square(), **options})
    options.pop("mask_image", None)
    with pytest.raises(InputError, match=message):
        call(change, **{"image": IMAGE, **options})


@pytest.mark.parametrize("name", REFUSED_MASKS)
def test_wrong_masks(repaint: PixArtSigmaInpaintPipeline, name: str) -> None:
    options, message = REFUSED_MASKS[name]
    with pytest.raises(InputError, match=message):
        call(repaint, **{"image": IMAGE, "mask_image": square(), **options})


def test_a_scheduler_that_cannot_add_noise() -> None:
    class Bare(LCMScheduler):
        add_noise = property()  # type: ignore[assignment]

    pipe = tiny_pipeline(PixArtSigmaImg2ImgPipeline, scheduler=Bare())
    with pytest.raises(InputError, match="Bare has no add_noise"):
        call(pipe, image=IMAGE)
