"""Prompts -> embeddings, by a T5 encoder that is run without padding."""

from __future__ import annotations

import logging
import weakref
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import MAX_TOKENS, QUOTES_PROMPT, shown, whole_number
from ..errors import InputError
from ..nn.changes import adapters_in_force, is_intercepted, is_plain_tensor
from ..nn.precision import class_of, precision_of
from .learned_tokens import pattern_of, spelled_out

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger("impasto")


def prepare(text: str, clean: bool, concepts: Mapping[str, Sequence[str]] | None = None) -> str:
    """A prompt as it is encoded: cleaned as the training captions were, or only stripped and in lower case.

    Args:
        concepts: learned tokens (``learned_tokens.concepts_of``), which are neither cleaned nor put in lower case.
    """
    pattern = pattern_of(concepts or ())
    if pattern is not None:
        pieces = pattern.split(text)  # every second one is a name
        prepared = [spelled_out(p, concepts or {}) if i % 2 else prepare(p, clean) for i, p in enumerate(pieces)]
        return " ".join(filter(None, prepared))
    if not clean:
        return text.lower().strip()
    from .cleaning import clean_prompt

    return clean_prompt(text)


class EncodedTexts(NamedTuple):
    embeds: Tensor  # [B, max_sequence_length, C], zeros after the end token
    mask: Tensor  # [B, max_sequence_length] int64, 1 where there is a token


def encode_texts(
    tokenizer: PreTrainedTokenizerBase,
    text_encoder: PreTrainedModel,
    texts: list[str],
    max_sequence_length: int,
    device: torch.device | str,
) -> EncodedTexts:
    """Tokenize and encode texts.

    The encoder runs without padding, once for each length, and never twice on the same text: T5 has relative
    positions, so the embedding of a token does not depend on masked padding. The embedding of the empty text is
    kept between calls, unless gradients are recorded.

    Args:
        texts: cleaned already, if they are to be cleaned.
        max_sequence_length: tokens of a text, including its end token; a warning quotes what is cut off.
        device: of the result. The encoder runs where its weights are.

    Returns:
        embeds [B, max_sequence_length, C] in the encoder's dtype; mask [B, max_sequence_length], int64.

    Raises:
        InputError: ``texts`` is empty or is not a list of texts, or ``max_sequence_length`` is out of range.
    """
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise InputError(f"expected a list of one or more texts to encode, not {shown(texts)}")
    max_sequence_length = whole_number("max_sequence_length", max_sequence_length, most=MAX_TOKENS)

    tokens = _tokenize(tokenizer, texts, max_sequence_length)
    empty = next((ids for ids, text in zip(tokens, texts) if text == ""), None)
    states: dict[Tokens, Tensor] = {}
    by_length: defaultdict[int, list[Tokens]] = defaultdict(list)
    for ids in dict.fromkeys(tokens):  # each once, in order
        if ids == empty:
            states[ids] = _encode_empty(text_encoder, ids, device)
        else:
            by_length[len(ids)].append(ids)
    for batch in by_length.values():
        states.update(zip(batch, _run(text_encoder, batch, device)))

    rows = {ids: F.pad(state, (0, 0, 0, max_sequence_length - len(ids))) for ids, state in states.items()}
    lengths = torch.tensor([len(ids) for ids in tokens], device=device)
    return EncodedTexts(
        embeds=torch.stack([rows[ids] for ids in tokens]).to(device),  # [B, max_sequence_length, C]
        mask=(torch.arange(max_sequence_length, device=device) < lengths[:, None]).long(),
    )


Tokens = tuple[int, ...]


def _tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str], max_length: int) -> list[Tokens]:
    from ..checkpoints.foreign.errors import TOKENIZING

    def tokenize(texts: list[str], **options: Any) -> list[Tokens]:
        with TOKENIZING:
            return [tuple(ids) for ids in tokenizer(texts, add_special_tokens=True, **options)["input_ids"]]

    tokens = tokenize(texts, truncation=True, max_length=max_length)
    full = list(dict.fromkeys(text for text, ids in zip(texts, tokens) if len(ids) >= max_length))
    if full:
        # verbose=False: the tokenizer's own warning would give another limit.
        for ids in tokenize(full, truncation=False, verbose=False):
            if len(ids) > max_length:
                logger.warning(
                    "the prompt is %d tokens long, of which the text encoder reads %d (max_sequence_length); "
                    "this part of it has no effect: %s",
                    len(ids),
                    max_length,
                    shown(tokenizer.decode(list(ids[max_length - 1 : -1])), 400),
                    extra=QUOTES_PROMPT,
                )
    return tokens


def _run(text_encoder: PreTrainedModel, batch: list[Tokens], device: torch.device | str) -> Tensor:
    """Encode token sequences of one length: [n, length, C]."""
    own = text_encoder.device
    ids = torch.tensor(batch, device=device if own.type == "meta" else own)  # [n, length]
    embeds: Tensor = text_encoder(ids, attention_mask=torch.ones_like(ids))[0]
    return embeds.to(text_encoder.dtype)


class _Kept(NamedTuple):
    state: tuple[object, ...]
    samples: Tensor
    embeds: Tensor


# Weak keys: an encoder without other references is freed, and its entry with it.
_empty_embeds: weakref.WeakKeyDictionary[nn.Module, _Kept] = weakref.WeakKeyDictionary()


def _encode_empty(text_encoder: PreTrainedModel, ids: Tokens, device: torch.device | str) -> Tensor:
    """The embedding [length, C] of the empty text, kept as long as the encoder stays the same.

    Changes are detected by its modules and their code, by the identities and version counters of the parameters, which
    in-place operations, optimizer steps and loading change, and by a few values of each tensor, which reveal writes
    through ``.data``, such as those of moving averages. Data pointers do not count: offloading changes them. Nothing is
    kept where code of others, which may compute anything, is around the calls of a module.
    """
    if not isinstance(text_encoder, nn.Module) or text_encoder.training or torch.is_grad_enabled():
        return _run(text_encoder, [ids], device)[0]
    modules, parameters = list(text_encoder.modules()), list(text_encoder.parameters())
    tensors = [*parameters, *text_encoder.buffers()]
    readable = all(is_plain_tensor(x) and not x.is_meta for x in tensors)
    if not readable or any(map(is_intercepted, modules)):
        return _run(text_encoder, [ids], device)[0]
    own: torch.device = text_encoder.device
    state = (
        ids,
        own,
        torch.is_autocast_enabled(own.type) and torch.get_autocast_dtype(own.type),
        precision_of(text_encoder),
        adapters_in_force(text_encoder),
        *((weakref.ref(module), class_of(module).forward) for module in modules),
        *((id(p), p.dtype, p.requires_grad, None if p.is_inference() else p._version) for p in parameters),
    )
    by_device: defaultdict[torch.device, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        by_device[tensor.device].append(samples_of(tensor).float())
    samples = torch.cat([torch.cat(some).cpu() for some in by_device.values()])
    kept = _empty_embeds.get(text_encoder)
    if kept is not None and kept.state == state and torch.equal(kept.samples, samples):
        return kept.embeds
    embeds = _run(text_encoder, [ids], device)[0]
    with torch.inference_mode(False):  # ordinary tensors, which outside of inference mode work too
        kept = _Kept(state, samples.clone(), embeds.detach().clone())
    _empty_embeds[text_encoder] = kept
    return kept.embeds


#: Values of a tensor that are read to recognize it.
_SAMPLES = 16


def samples_of(tensor: Tensor) -> Tensor:
    """A few values of a tensor from all over it, by which other weights are recognized without reading them all."""
    flat = tensor.detach()
    flat = flat.view(-1) if flat.is_contiguous() else flat.flatten()
    return flat[:: max(1, flat.numel() // _SAMPLES)][: _SAMPLES + 1]
