"""Token routing: which tokens pass, where they come back, and that gradients flow through both ways."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from impasto.errors import ConfigurationError, InputError
from impasto.models.pixart.model import PixArtTransformer2DModel
from impasto.transforms.token_routing import route_tokens

from ..tiny import tiny_transformer

TEXT = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([[1, 1, 1], [1, 0, 0]])
LATENTS = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
TIMES = torch.tensor([10, 700])


def model() -> PixArtTransformer2DModel:
    return tiny_transformer(num_layers=4).train()


def run(transformer: PixArtTransformer2DModel, latents: Tensor | list[Tensor] = LATENTS) -> Tensor | list[Tensor]:
    output: Tensor | list[Tensor] = transformer(latents, TEXT, TIMES, encoder_attention_mask=MASK).sample
    return output


def gradients(transformer: PixArtTransformer2DModel) -> dict[str, Tensor]:
    transformer.zero_grad()
    output = run(transformer)
    assert isinstance(output, Tensor)
    output.square().mean().backward()
    return {name: p.grad.clone() for name, p in transformer.named_parameters() if p.grad is not None}


def test_a_rate_of_zero_a_missing_choice_and_evaluation_are_plain() -> None:
    transformer = model()
    plain = run(transformer)
    for rate in (0.0, 0.5):
        with route_tokens(transformer, 1, 3, rate) as routing:
            assert torch.equal(run(transformer), plain)
            routing.choose(torch.rand(2, 16))
            assert torch.equal(run(transformer), plain) is (rate == 0.0)
            transformer.eval()
            with torch.enable_grad():
                assert torch.equal(run(transformer), plain)
            transformer.train()
    assert torch.equal(run(transformer), plain)


def test_the_kept_tokens_alone_pass_and_come_back_to_their_places() -> None:
    transformer = model()
    seen: list[Tensor] = []
    for block in transformer.transformer_blocks:
        block.register_forward_pre_hook(lambda module, given: seen.append(given[0].detach()))
    with route_tokens(transformer, 1, 3, 0.75) as routing:
        scores = torch.rand(2, 16)
        routing.choose(scores)
        run(transformer)
    assert [x.shape[1] for x in seen] == [16, 16, 4, 16]  # what each block is given, before the routing
    for row in range(2):
        kept = set(scores[row].argsort()[:4].tolist())
        changed = (seen[3][row] != seen[1][row]).any(-1).nonzero().flatten().tolist()
        assert set(changed) == kept
    block, kept_tokens = transformer.transformer_blocks[1], scores.argsort(1)[:, :4].sort(1).values
    context = transformer.encode_context(TEXT, MASK)
    shared = transformer.modulate(TIMES).shared
    expected = block(torch.stack([seen[1][i, kept_tokens[i]] for i in range(2)]), shared, context.projected)
    assert torch.allclose(seen[2], expected, atol=1e-6)


def test_gradients_flow_and_checkpointing_does_not_change_them() -> None:
    transformer = model()
    plain = gradients(transformer)
    with route_tokens(transformer, 1, 3, 0.5) as routing:
        routing.choose(torch.rand(2, 16))
        routed = gradients(transformer)
        assert routed.keys() == plain.keys()
        assert all(bool(gradient.abs().sum() > 0) for name, gradient in routed.items() if "blocks.2" in name)
        transformer.enable_gradient_checkpointing()
        again = gradients(transformer)
    for name, gradient in routed.items():
        assert torch.allclose(gradient, again[name], atol=1e-6), name


def test_images_of_several_sizes_are_as_each_alone() -> None:
    transformer = model()
    images, scores = [LATENTS[0], LATENTS[1, :, :4]], [torch.rand(16), torch.rand(8)]
    with route_tokens(transformer, 0, 2, 0.5) as routing:
        routing.choose(scores)
        together = run(transformer, images)
        for i, image in enumerate(images):
            routing.choose(scores[i][None])
            alone = transformer(image[None], TEXT[i : i + 1], TIMES[i : i + 1], encoder_attention_mask=MASK[i : i + 1])
            assert torch.allclose(together[i], alone.sample[0], atol=1e-5)


def test_what_cannot_be_routed_is_refused() -> None:
    transformer = model()
    for start, end, rate in ((-1, 2, 0.5), (1, 1, 0.5), (1, 9, 0.5), (1, 2, 1.0), (1, 2, -0.5)):
        with pytest.raises(InputError):
            route_tokens(transformer, start, end, rate)
    with route_tokens(transformer, 1, 2, 0.5) as routing:
        with pytest.raises(ConfigurationError, match="remove"):
            route_tokens(transformer, 2, 3, 0.5)
        routing.choose(torch.rand(2, 9))
        with pytest.raises(InputError, match="choose"):
            run(transformer)
    compressed = tiny_transformer(num_layers=4, kv_compression="conv", kv_compression_layers=[2, 3]).train()
    with pytest.raises(ConfigurationError, match="compresses"):
        route_tokens(compressed, 1, 3, 0.5)
    with route_tokens(compressed, 0, 2, 0.5) as routing:
        routing.choose(torch.rand(2, 16))
        assert run(compressed).shape == (2, 8, 8, 8)  # type: ignore[union-attr]
    with pytest.raises(InputError, match="PixArt"):
        route_tokens(torch.nn.Linear(2, 2), 0, 1, 0.5)
