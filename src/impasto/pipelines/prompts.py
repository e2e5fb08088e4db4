"""Prompts -> embeddings: caption cleaning, and a T5 encoder that is run without padding."""

from __future__ import annotations

import functools
import html
import logging
import re
import urllib.parse
import weakref
from collections import defaultdict
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import MAX_TOKENS, shown, whole_number
from ..errors import InputError
from ..nn.precision import precision_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger("impasto")

# --- caption cleaning ---------------------------------------------------------------------------------------
#
# PixArt's training captions were cleaned of the clutter of web pages, and prompts should resemble them. The rules are
# those of DeepFloyd IF, which PixArt adopted: expressions and order are the definition. Where the originals take
# quadratic time, these take linear time for the same result: an expression that begins with a run of characters is
# tried only at the start of the run, since if that fails, every later start in the run fails too.

_LABELS = r"[a-zA-Z0-9.\-]"
_DOMAIN = rf"{_LABELS}+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b\/?(?!@)"
_MOST_TAGS = 300  # a caption with more "<" is not markup; the parser takes quadratic time for unclosed tags
_FILE_TYPE = r"(?:png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4)"

Rules = tuple[tuple[str, str, str], ...]  # what it matches, expression, replacement


def _address(scheme: str) -> str:
    """Matches an address, or as group 1, which is kept, labels without one, up to the next scheme."""
    begin = rf"{scheme}:(?:\/{{1,3}}|[a-zA-Z0-9%])"
    return rf"\b(?:{begin}|{_DOMAIN}|((?:(?!\b{begin}){_LABELS})++))"


_BEFORE_MARKUP: Rules = (
    ("placeholder of anonymised captions", r"<person>", "person"),
    ("web address", _address("https?"), r"\1"),
    ("web address", _address("www"), r"\1"),
)

_AFTER_MARKUP: Rules = (
    ("@nickname", r"@[\w\d]+\b", ""),
    ("CJK strokes to unified ideographs, seven blocks in a row", r"[\u31c0-\u9fff]+", ""),
    (
        "every kind of dash",
        r"[\u002D\u058A\u05BE\u1400\u1806\u2010-\u2015\u2E17\u2E1A\u2E3A\u2E3B\u2E40\u301C\u3030\u30A0\uFE31\uFE32"
        r"\uFE58\uFE63\uFF0D]+",
        "-",
    ),
    ("every kind of double quote", r"[`´«»“”¨]", '"'),
    ("every kind of single quote", r"[‘’]", "'"),
    ("left-over entity", r"&quot;?", ""),
    ("left-over entity", r"&amp", ""),
    ("IP address", r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),
    ("article number at the end, 3:27", r"\d:\d\d\s+$", ""),
    ("line break written as backslash n", r"\\n", " "),
    ("#123", r"#\d{1,3}\b", ""),
    ("#12345 and longer", r"#\d{5,}\b", ""),
    ("123456 and longer", r"\b\d{6,}\b", ""),
    ("file name", rf"(?<!\S)[\S]+\.{_FILE_TYPE}", ""),
    ("run of quotes", r"[\"\']{2,}", '"'),
    ("run of full stops", r"[\.]{2,}", " "),
    ("decoration", r"[#®•©™&@·º½¾¿¡§~)(\]\[}{|\\/*]+", " "),
    ("isolated full stop", r"(?<!\s)\s+\.\s+", " "),
)

_JOINERS = r"[-_]"  # spaces of a this-is-a-cat caption; up to three are kept

_AFTER_REPAIR: Rules = (
    ("product number, jc6640", r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),
    ("product number, jc6640vc", r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),
    ("product number, 6640vc231", r"\b\d+[a-zA-Z]+\d+\b", ""),
    ("advertising", r"(worldwide\s+)?(free\s+)?shipping", ""),
    ("advertising", r"(free\s)?download(\sfree)?", ""),
    ("advertising", r"\bclick\b\s(?:for|on)\s\w+", ""),
    ("file type", rf"\b{_FILE_TYPE}(\simage[s]?)?", ""),
    ("page number", r"\bpage\s+\d+\b", ""),
    ("random identifier, j2d1a2a", r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d[a-zA-Z\d]*\b", " "),
    ("dimensions, 10x20 (the second letter is Cyrillic)", r"\b\d+(?:\.\d*)?[xх×]\d+(?:\.\d*)?\b", ""),
    ("space before a colon", r"\b\s+\:\s+", ": "),
    ("no space after punctuation", r"(\D[,\./])\b", r"\1 "),
    ("run of white space", r"\s+", " "),
    ("quotes around everything", r"^[\"\']([\w\W]+)[\"\']$", r"\1"),
    ("punctuation at the start", r"^[\'\_,\-\:;]", ""),
    ("punctuation at the end", r"[\'\_,\-\:\-\+]$", ""),
    ("nothing but an extension", r"^\.\S+$", ""),
)


@functools.cache
def _compiled(rules: Rules) -> tuple[tuple[re.Pattern[str], str], ...]:
    return tuple((re.compile(expression), replacement) for _, expression, replacement in rules)


def _apply(rules: Rules, caption: str) -> str:
    for expression, replacement in _compiled(rules):
        caption = expression.sub(replacement, caption)
    return caption


def _without_markup(caption: str) -> str:
    if "<" not in caption and "&" not in caption:  # avoids the import, and a warning about "cat.jpg"
        return caption
    if caption.count("<") > _MOST_TAGS:
        return caption
    from bs4 import BeautifulSoup
    from bs4.exceptions import ParserRejectedMarkup

    try:
        return str(BeautifulSoup(caption, features="html.parser").text)
    except ParserRejectedMarkup:  # such as "<![": it is not markup
        return caption


def clean_caption(text: str) -> str:
    """Convert a caption to lower case and remove addresses, markup, product numbers, advertising and decoration.

    The pipelines clean twice, as in training: what one pass removes may join what the next pass then removes.
    """
    import ftfy

    caption = urllib.parse.unquote_plus(str(text)).strip().lower()
    caption = _apply(_BEFORE_MARKUP, caption)
    caption = _without_markup(caption)
    caption = _apply(_AFTER_MARKUP, caption)
    if len(re.findall(_JOINERS, caption)) > 3:
        caption = re.sub(_JOINERS, " ", caption)
    caption = ftfy.fix_text(caption)
    caption = html.unescape(html.unescape(caption))
    return _apply(_AFTER_REPAIR, caption).strip()


def clean_prompt(text: str) -> str:
    """Clean a caption twice, as in training, and warn if nothing is left of it."""
    cleaned = clean_caption(clean_caption(text))
    if not cleaned and text.strip():
        logger.warning(
            "cleaning removes all of the prompt %s, as with most that are not in Latin script: the image will be "
            "that of an empty prompt. Use clean_caption=False to keep the prompt, or write it in English",
            shown(text),
        )
    return cleaned


def normalize_caption(text: str) -> str:
    """What is done to a prompt that is not cleaned: lower case, no white space at its ends."""
    return text.lower().strip()


# --- texts to embeddings ------------------------------------------------------------------------------------


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
    last_parameter: Tensor
    embeds: Tensor


# Weak keys: an encoder without other references is freed, and its entry with it.
_empty_embeds: weakref.WeakKeyDictionary[torch.nn.Module, _Kept] = weakref.WeakKeyDictionary()


def _encode_empty(text_encoder: PreTrainedModel, ids: Tokens, device: torch.device | str) -> Tensor:
    """The embedding [length, C] of the empty text, kept as long as the encoder and its weights stay the same.

    Changes are detected by the identities and version counters of the parameters, which in-place operations,
    optimizer steps and loading change, and by the values of the last one (in T5 the final norm), which reveal writes
    through ``.data``, such as those of moving averages. Data pointers do not count: offloading changes them.
    """
    parameters = list(text_encoder.parameters())
    last = parameters[-1]
    if torch.is_grad_enabled() or text_encoder.training or last.is_meta:
        return _run(text_encoder, [ids], device)[0]
    kind = last.device.type
    state = (
        ids,
        last.device,
        torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind),
        precision_of(text_encoder),
        *((id(p), p.dtype, p.requires_grad, None if p.is_inference() else p._version) for p in parameters),
    )
    kept = _empty_embeds.get(text_encoder)
    if kept is not None and kept.state == state and torch.equal(kept.last_parameter, last):
        return kept.embeds
    embeds = _run(text_encoder, [ids], device)[0]
    with torch.inference_mode(False):  # ordinary tensors, which outside of inference mode work too
        kept = _Kept(state, last.detach().clone(), embeds.detach().clone())
    _empty_embeds[text_encoder] = kept
    return kept.embeds
