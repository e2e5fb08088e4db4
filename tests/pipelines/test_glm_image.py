"""GlmImagePipeline: from a prompt to a picture, its prior, sizes, callbacks, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from impasto import GlmImagePipeline
from impasto.checkpoints.foreign import from_transformers
from impasto.errors import InputError, MissingDependencyError
from impasto.family import small_grid, tokens_to_generate
from impasto.pipelines.glm_image_inputs import reference_image
from impasto.pipelines.resolution import resize_and_crop

from ..tiny_glm import pipelines, prior_parts


@pytest.fixture(scope="module")
def whole() -> GlmImagePipeline:
    pipe, _ = pipelines()
    for name, part in prior_parts().items():
        setattr(pipe, name, part)
    return pipe


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def call(**changes: Any) -> dict[str, Any]:
    arguments = {"prompt": 'a sign "open"', "height": 64, "width": 96, "num_inference_steps": 2, "output_type": "np"}
    return {**arguments, "generator": seeded(1), **changes}


def given(**changes: Any) -> dict[str, Any]:
    return call(prior_token_ids=torch.zeros(1, 24, dtype=torch.long), **changes)


def picture(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def test_the_prior_draws_a_small_picture_first(whole: GlmImagePipeline) -> None:
    assert small_grid(36, 24) == (19, 13)
    assert tokens_to_generate(64, 96, with_images=False) == 2 * 3 + 13 * 19
    assert tokens_to_generate(64, 96, with_images=True) == 2 * 3
    tokens = whole.generate_prior_tokens("a cube", 64, 96, generator=seeded(0))
    assert tokens.prior_token_ids.shape == (1, 24)
    assert tokens.prior_token_ids.max() < 32  # ends and other tokens that are none of a picture are not sampled
    grid = tokens.prior_token_ids.view(4, 6)
    assert torch.equal(grid[::2, ::2], grid[1::2, 1::2])
    assert torch.equal(grid[::2, ::2], grid[::2, 1::2])


def test_each_picture_has_a_generator_of_its_own_and_no_global_state_is_touched(whole: GlmImagePipeline) -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    both = whole.generate_prior_tokens(["a cube", "a ball"], 64, 96, generator=[seeded(0), seeded(1)]).prior_token_ids
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(8)
    alone = whole.generate_prior_tokens("a ball", 64, 96, generator=seeded(1)).prior_token_ids
    assert torch.equal(both[1:], alone)
    assert not torch.equal(both[0], both[1])
    of_one = whole.generate_prior_tokens("a ball", 64, 96, generator=seeded(1), num_images_per_prompt=2).prior_token_ids
    assert torch.equal(of_one[:1], alone)
    assert not torch.equal(of_one[0], of_one[1])


def test_from_prompt_to_picture_with_and_without_images(whole: GlmImagePipeline) -> None:
    first = whole(**call()).images
    assert first.shape == (1, 64, 96, 3)
    assert np.array_equal(whole(**call()).images, first)
    image = picture(100, 70)  # the prior and the autoencoder see 96 x 64 of it
    changed = whole(**call(image=image, height=None, width=None)).images
    assert changed.shape == first.shape
    assert not np.array_equal(changed, first)
    as_tensor = torch.tensor(np.array(image)).permute(2, 0, 1) / 255
    assert np.array_equal(whole(**call(image=[as_tensor])).images, changed)
    two = whole(**call(prompt=["a", "b"], image=[[image], [picture(64, 64)]], generator=[seeded(1), seeded(2)])).images
    assert two.shape == (2, 64, 96, 3)


@pytest.mark.parametrize("size", [(96, 32), (50, 70), (20, 100)])
def test_edits_have_the_size_that_is_asked_for(whole: GlmImagePipeline, size: tuple[int, int]) -> None:
    """Whatever the size of the image; sizes that are not multiples of 32 are generated larger and scaled down."""
    height, width = size
    found = whole(**call(image=picture(64, 64), height=height, width=width)).images
    assert found.shape == (1, height, width, 3)
    generated = {"height": -(-height // 32) * 32, "width": -(-width // 32) * 32}
    larger = whole.decode(whole(**call(image=picture(64, 64), **generated, output_type="latent")).images)
    expected = whole.image_processor.postprocess(resize_and_crop(larger, height, width), "np")
    assert np.allclose(found, expected, atol=1e-5)


def test_sizes_from_the_prompt_and_from_the_model(whole: GlmImagePipeline) -> None:
    written = given(prompt="a cube<sop>2 3<eop>", height=None, width=None)
    assert np.array_equal(whole(**written).images, whole(**given(prompt="a cube")).images)
    wider = call(
        prompt="a cube<sop>2 3<eop>", height=32, width=None, prior_token_ids=torch.zeros(1, 12, dtype=torch.long)
    )
    assert whole(**wider).images.shape == (1, 32, 96, 3)
    usual = call(height=None, width=None, prior_token_ids=torch.zeros(1, 16, dtype=torch.long))
    assert whole(**usual).images.shape == (1, 64, 64, 3)
    with pytest.raises(InputError, match=r"different sizes, \[\(2, 3\), \(3, 2\)\]"):
        whole(**call(prompt=["a<sop>2 3<eop>", "b<sop>3 2<eop>"], height=None))


def test_negative_prompts_and_given_embeddings(whole: GlmImagePipeline) -> None:
    plain = whole(**given()).images
    assert not np.array_equal(whole(**given(negative_prompt='"shut"', guidance_scale=5.0)).images, plain)
    assert np.array_equal(whole(**given(negative_prompt="")).images, plain)
    embeds = whole.encode_prompt('a sign "open"')
    assert embeds.negative_prompt_embeds is not None
    handed = given(
        prompt=None, prompt_embeds=embeds.prompt_embeds, negative_prompt_embeds=embeds.negative_prompt_embeds
    )
    assert np.array_equal(whole(**handed).images, plain)
    padded = torch.nn.functional.pad(embeds.prompt_embeds, (0, 0, 3, 0))  # as the reference pads
    np.testing.assert_allclose(
        whole(**(handed | {"prompt_embeds": padded, "generator": seeded(1)})).images, plain, atol=1e-4
    )


def test_callbacks_see_and_change_steps_and_end_the_loop(whole: GlmImagePipeline) -> None:
    seen: list[tuple[int, float]] = []

    def watch(pipe: Any, index: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append((index, float(timestep)))
        assert tensors["latents"].shape == (1, 4, 8, 12)
        pipe.interrupt = index == 1
        return {"latents": torch.zeros_like(tensors["latents"])}

    latents = whole(**given(num_inference_steps=4, callback_on_step_end=watch, output_type="latent")).images
    assert [index for index, _ in seen] == [0, 1]
    assert seen[0][1] == 1000
    assert not latents.any()
    empty = whole.encode_prompt("a").prompt_embeds

    def swap(pipe: Any, index: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"prompt_embeds": empty}

    names = {"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    changed = whole(**given(callback_on_step_end=swap, **names)).images
    assert not np.array_equal(changed, whole(**given()).images)


def test_the_prior_can_be_ended(whole: GlmImagePipeline) -> None:
    counted: list[int] = []

    def count(module: Any, inputs: Any, output: Any) -> None:
        counted.append(1)
        whole.interrupt = len(counted) >= 5

    handle = whole.vision_language_encoder.model.language_model.norm.register_forward_hook(count)
    tokens = whole.generate_prior_tokens("a cube", 64, 96, generator=seeded(0))
    handle.remove()
    whole.interrupt = False
    assert len(counted) == 5
    assert not tokens.prior_token_ids.any()


def test_the_prior_alone_takes_images_as_the_call_does(whole: GlmImagePipeline) -> None:
    image = picture(70, 64)
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    expected = whole.generate_prior_tokens("bluer", 64, 96, [[image]], generator=seeded(0))
    for same in (image, [image], np.array(image), tensor, [[tensor]]):
        found = whole.generate_prior_tokens("bluer", 64, 96, same, generator=seeded(0))
        assert torch.equal(found.prior_token_ids, expected.prior_token_ids)
        assert found.prior_token_image_ids is not None
        assert expected.prior_token_image_ids is not None
        assert torch.equal(found.prior_token_image_ids[0], expected.prior_token_image_ids[0])
    with pytest.raises(InputError, match="multiples of 32, not 48 x 96"):
        whole.generate_prior_tokens("bluer", 48, 96)
    with pytest.raises(InputError, match="width must be a whole number"):
        whole.generate_prior_tokens("bluer", 64, None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="a list of 2 lists"):
        whole.generate_prior_tokens(["a", "b"], 64, 96, [image])
    with pytest.raises(InputError, match="num_images_per_prompt"):
        whole.generate_prior_tokens("a", 64, 96, num_images_per_prompt=0)


IMAGE = {"image": picture(64, 64)}
TOKENS = {
    "prior_token_image_ids": [torch.zeros(16, dtype=torch.long)],
    "source_image_grid_thw": [torch.tensor([[1, 4, 4]])],
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prior_token_ids": torch.full((1, 24), 32)}, "tokens from 0 to 31"),
        ({"prior_token_ids": [[0] * 24]}, "prior_token_ids must be tensors"),
        ({"prior_token_ids": torch.zeros(1, 24)}, "tokens from 0 to 31"),
        ({"prior_token_ids": torch.zeros(1, 24, dtype=torch.bool)}, "tokens from 0 to 31"),
        (IMAGE | TOKENS | {"prior_token_image_ids": [[torch.zeros(16)]]}, "prior_token_image_ids must be tensors"),
        (IMAGE | TOKENS | {"source_image_grid_thw": [[1, 4, 4]]}, r"must be tensors \[images, 3\]"),
        ({"prior_token_ids": None} | TOKENS, "belong to prior_token_ids"),
        ({"prompt": None, "prompt_embeds": torch.zeros(1, 2, 16), "prior_token_ids": None}, "the prior needs a prompt"),
        ({"prior_token_ids": None, "num_inference_steps": 0}, "num_inference_steps"),
        ({"image": "cat.png"}, "not a str"),
        ({"image": torch.zeros(64)}, r"not \[64\]"),
        ({"image": np.zeros((64, 64), dtype=np.uint8)}, r"not \[64, 64\]"),
        ({"height": 48}, "multiples of 32, not 48 x 96; the nearest size is 64 x 96"),
        ({"width": 0}, "width must be a whole number"),
        ({"prompt": None}, "nothing to generate"),
        ({"prompt": []}, "one or more texts"),
        ({"prior_token_ids": torch.zeros(1, 23, dtype=torch.long)}, r"24 tokens: expected \[1, 24\]"),
        ({"prior_token_ids": torch.zeros(3, 24, dtype=torch.long)}, r"expected \[1, 24\]"),
        (IMAGE, "image needs its own tokens"),
        (TOKENS, "image is None"),
        (IMAGE | TOKENS | {"source_image_grid_thw": [torch.tensor([[1, 4, 6]])]}, "with 24 tokens"),
        (IMAGE | TOKENS | {"prior_token_image_ids": []}, "for 0 prompts; there are 1"),
        ({"prompt": ["a", "b"], "image": [picture(64, 64)] * 2}, "a list of 2 lists"),
        ({"prompt": ["a", "b"], "image": [[picture(64, 64)], []]}, "as many images"),
        ({"latents": torch.zeros(1, 4, 8, 8)}, r"\[1, 4, 8, 12\], of images generated at 64 x 96 pixels"),
        ({"output_type": "jpeg"}, "output_type"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "noise"),
        ({"attention_kwargs": {"gain": 1}}, "gain"),
        ({"generator": [seeded(0)] * 2}, "2 generators were given for 1"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt"),
        ({"negative_prompt": ["a", "b"]}, "2 texts for 1"),
    ],
)
def test_what_cannot_be_used_is_refused_early(whole: GlmImagePipeline, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        whole(**(given() | changes))


def test_images_that_cannot_be_referred_to() -> None:
    with pytest.raises(InputError, match="too small"):
        reference_image(picture(31, 64))
    with pytest.raises(InputError, match="not a str"):
        reference_image("cat.png")
    assert reference_image(np.zeros((64, 70, 3), dtype=np.uint8)).size == (64, 64)
    assert reference_image(Image.new("L", (64, 64))).mode == "RGB"
    image = torch.arange(3 * 64 * 64).view(3, 64, 64) % 256
    for same in (image, image.to(torch.uint8), image / 255, image.numpy().transpose(1, 2, 0)):
        assert np.array_equal(np.array(reference_image(same)), image.permute(1, 2, 0).numpy())
    assert reference_image((image / 255).to(torch.bfloat16)).size == (64, 64)


def test_a_cast_keeps_the_priors_rotary_frequencies(whole: GlmImagePipeline) -> None:
    pipe, _ = pipelines()
    pipe.vision_language_encoder = prior_parts()["vision_language_encoder"]
    rotary = pipe.vision_language_encoder.model.language_model.rotary_emb
    before = rotary.inv_freq.clone()
    pipe.to(torch.bfloat16)
    assert pipe.vision_language_encoder.dtype == torch.bfloat16
    assert rotary.inv_freq.dtype == torch.float32
    assert torch.equal(rotary.inv_freq, before)


def test_a_missing_part_is_named() -> None:
    pipe, _ = pipelines()
    with pytest.raises(InputError, match="processor"):
        pipe(**call())


def test_folders_both_ways(whole: GlmImagePipeline, tmp_path: Path) -> None:
    expected = whole(**call()).images
    whole.save_pretrained(tmp_path / "ours")
    index = json.loads((tmp_path / "ours" / "model_index.json").read_text())
    assert index["_class_name"] == "GlmImagePipeline"
    assert index["vision_language_encoder"] == ["transformers", "GlmImageForConditionalGeneration"]
    assert index["transformer"] == ["diffusers", "GlmImageTransformer2DModel"]
    loaded = GlmImagePipeline.from_pretrained(tmp_path / "ours")
    loaded.set_progress_bar_config(disable=True)
    np.testing.assert_allclose(loaded(**call()).images, expected, atol=1e-5)

    reference = diffusers.GlmImagePipeline.from_pretrained(tmp_path / "ours")
    reference.set_progress_bar_config(disable=True)
    theirs = reference(**given()).images
    np.testing.assert_allclose(whole(**given()).images, theirs, atol=1e-4)
    reference.save_pretrained(tmp_path / "theirs")
    back = GlmImagePipeline.from_pretrained(tmp_path / "theirs", vision_language_encoder=None, processor=None)
    back.set_progress_bar_config(disable=True)
    np.testing.assert_allclose(back(**given()).images, theirs, atol=1e-4)


def test_a_transformers_without_the_prior_is_named() -> None:
    with pytest.raises(
        MissingDependencyError, match="has no GlmImageOfTomorrow; update it: pip install -U transformers"
    ):
        from_transformers.class_of_transformers("GlmImageOfTomorrow")


def test_low_precision_draws_nearly_the_same_and_an_autoencoder_that_overflows_works_in_float32() -> None:
    pipe, _ = pipelines()
    expected = pipe(**given()).images
    pipe.to(torch.bfloat16)
    assert 0 < abs(pipe(**given()).images - expected).max() < 0.1
    pipe, _ = pipelines()
    pipe.to(torch.float16)
    seen: list[torch.dtype] = []
    hook = pipe.vae.decoder.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    first = pipe(**given()).images
    assert abs(first - expected).max() < 0.05
    hook.remove()
    assert seen == [torch.float32]  # force_upcast is the default of its config
    assert pipe.vae.dtype == torch.float16


def test_several_pictures_of_each_prompt_refer_to_its_images() -> None:
    pipe, _ = pipelines()
    images = [[picture(64, 64)], [picture(64, 64).rotate(90)]]
    ids = torch.arange(2 * 16).view(2, 16) % 32
    own = [torch.arange(16), torch.arange(16) + 8]
    grids = [torch.tensor([[1, 4, 4]])] * 2
    options: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "np"}

    def drawn(rows: list[int], per_prompt: int, seeds: list[int]) -> np.ndarray[Any, Any]:
        pictures: np.ndarray[Any, Any] = pipe(
            [["a cube", "a ball"][row] for row in rows],
            image=[images[row] for row in rows],
            prior_token_ids=ids[rows],
            prior_token_image_ids=[own[row] for row in rows],
            source_image_grid_thw=[grids[row] for row in rows],
            num_images_per_prompt=per_prompt,
            generator=[seeded(seed) for seed in seeds],
            **options,
        ).images
        return pictures

    together = drawn([0, 1], 2, [0, 1, 2, 3])
    alone = drawn([1], 1, [3])
    np.testing.assert_allclose(together[3:], alone, atol=1e-4)
    assert abs(together[2] - together[3]).max() > 1e-2


@pytest.mark.long
def test_compiled_blocks_generate_the_same() -> None:
    pipe, _ = pipelines()
    pipe.to(torch.bfloat16)
    expected = pipe(**given()).images
    with pipe.compile(backend="eager"):
        np.testing.assert_allclose(pipe(**given()).images, expected, atol=0.05, rtol=0)


def test_glyphs_are_kept_on_disk(whole: GlmImagePipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, _ = pipelines()
    texts = ["a \"cat\" and a 'dog'", "nothing", '"cat" again']
    expected = pipe.encode_prompt(texts)
    pipe.enable_prompt_cache(tmp_path)
    first = pipe.encode_prompt(texts)
    assert len(list(tmp_path.glob("*.safetensors"))) == len({*texts, ""})
    with monkeypatch.context() as patch:
        patch.delattr(type(pipe.text_encoder), "forward")  # the encoder cannot be called
        again = pipe.encode_prompt(texts)
    for a, b, c in zip(expected, first, again, strict=True):
        assert a is not None
        assert b is not None
        torch.testing.assert_close(b, a, atol=1e-5, rtol=1e-5)
        assert torch.equal(b, c)  # type: ignore[arg-type]


def test_a_pipeline_of_diffusers_is_shared() -> None:
    ours, theirs = pipelines()
    shared = GlmImagePipeline.from_pipe(theirs)
    shared.set_progress_bar_config(disable=True)
    assert shared.transformer.proj_out.weight.data_ptr() == theirs.transformer.proj_out.weight.data_ptr()
    np.testing.assert_allclose(shared(**given()).images, ours(**given()).images, atol=1e-5)


def test_a_callback_may_say_which_tensors_it_reads() -> None:
    pipe, _ = pipelines()

    class Callback:
        tensor_inputs = ("latents", "prompt_embeds")
        seen: tuple[str, ...] = ()

        def __call__(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            self.seen = tuple(tensors)
            return {}

    callback = Callback()
    pipe(**given(callback_on_step_end=callback))
    assert callback.seen == ("latents", "prompt_embeds")


def test_in_a_call_each_image_has_a_prior_of_its_own(whole: GlmImagePipeline) -> None:
    prompts = ["a cube", "a ball"]
    together = whole(**call(prompt=prompts, num_images_per_prompt=2, generator=[seeded(i) for i in range(4)])).images
    alone = whole(**call(prompt="a ball", generator=[seeded(3)])).images
    np.testing.assert_allclose(together[3:], alone, atol=1e-4)
    noise = torch.zeros(2, 4, 8, 12)  # the same for both, so that only the prior differs
    both = whole(**call(num_images_per_prompt=2, latents=noise, generator=[seeded(0), seeded(1)])).images
    assert abs(both[0] - both[1]).max() > 1e-3


def test_sizes_and_schedules_in_other_forms(whole: GlmImagePipeline) -> None:
    pixels = np.asarray(picture(96, 64))
    assert np.array_equal(
        whole(**call(image=pixels[None], height=None, width=None)).images, whole(**call(image=pixels)).images
    )
    listed = whole(**given(sigmas=[1.0, 0.5], timesteps=[992.0, 496.0])).images
    narrow = {name: torch.tensor(x).bfloat16() for name, x in (("sigmas", [1.0, 0.5]), ("timesteps", [992.0, 496.0]))}
    assert np.array_equal(whole(**given(**narrow)).images, listed)
    assert np.array_equal(whole(**given(callback_on_step_end_tensor_inputs=None)).images, whole(**given()).images)
