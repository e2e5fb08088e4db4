"""Captions cleaned, and texts turned into embeddings by a T5 encoder that sees no padding."""

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

from ..checkpoints.foreign.errors import TOKENIZING
from ..checks import shown, whole_number
from ..errors import InputError
from ..nn.precision import precision_of
from . import limits

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger("impasto")

# --- caption cleaning ---------------------------------------------------------------------------------------
#
# PixArt's training captions were cleaned of what the web adds to them, and a prompt should look like them.
# The rules are those of DeepFloyd IF, which PixArt took over: expressions and order are the definition. Where theirs
# take quadratic time, these take linear time for the same result: an expression that begins with a run of characters
# is tried where the run begins, since where that fails, every later start in the run fails too.

_LABELS = r"[a-zA-Z0-9.\-]"
_DOMAIN = rf"{_LABELS}+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b\/?(?!@)"
_MOST_TAGS = 300  # a caption with more "<" is no markup; the parser takes quadratic time for tags without an end
_FILE_TYPE = r"(?:png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4)"

Rules = tuple[tuple[str, str, str], ...]  # why, expression, replacement


def _address(scheme: str) -> str:
    """An address, or in group 1 what holds none and is kept: the labels up to the next scheme or their end."""
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
    ("line break spelt out as backslash n", r"\\n", " "),
    ("#123", r"#\d{1,3}\b", ""),
    ("#12345 and longer", r"#\d{5,}\b", ""),
    ("123456 and longer", r"\b\d{6,}\b", ""),
    ("file name", rf"(?<!\S)[\S]+\.{_FILE_TYPE}", ""),
    ("run of quotes", r"[\"\']{2,}", '"'),
    ("run of full stops", r"[\.]{2,}", " "),
    ("decoration", r"[#®•©™&@·º½¾¿¡§~)(\]\[}{|\\/*]+", " "),
    ("lonely full stop", r"(?<!\s)\s+\.\s+", " "),
)

_JOINERS = r"[-_]"  # spaces of a this-is-a-cat caption; up to three are left alone

_AFTER_REPAIR: Rules = (
    ("product number, jc6640", r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),
    ("product number, jc6640vc", r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),
    ("product number, 6640vc231", r"\b\d+[a-zA-Z]+\d+\b", ""),
    ("shop talk", r"(worldwide\s+)?(free\s+)?shipping", ""),
    ("shop talk", r"(free\s)?download(\sfree)?", ""),
    ("shop talk", r"\bclick\b\s(?:for|on)\s\w+", ""),
    ("file type", rf"\b{_FILE_TYPE}(\simage[s]?)?", ""),
    ("page number", r"\bpage\s+\d+\b", ""),
    ("random identifier, j2d1a2a", r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d[a-zA-Z\d]*\b", " "),
    ("dimensions, 10x20 (the second letter is Cyrillic)", r"\b\d+(?:\.\d*)?[xх×]\d+(?:\.\d*)?\b", ""),
    ("space before a colon", r"\b\s+\:\s+", ": "),
    ("no space after punctuation", r"(\D[,\./])\b", r"\1 "),
    ("run of white space", r"\s+", " "),
    ("quotes around everything", r"^[\"\']([\w\W]+)[\"\']$", r"\1"),
    ("punctuation in front", r"^[\'\_,\-\:;]", ""),
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
    if "<" not in caption and "&" not in caption:  # spares the import, and a warning about "cat.jpg"
        return caption
    if caption.count("<") > _MOST_TAGS:
        return caption
    from bs4 import BeautifulSoup
    from bs4.exceptions import ParserRejectedMarkup

    try:
        return str(BeautifulSoup(caption, features="html.parser").text)
    except ParserRejectedMarkup:  # such as "<![": no markup then, but a text
        return caption


def clean_caption(text: str) -> str:
    """Lower-case a caption and remove addresses, markup, numbers of products, shop talk and decoration.

    The pipelines clean twice, as in the training, since what one pass removes may bring together what the next removes.
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
    """A caption cleaned as often as in the training, with a warning where nothing is left of it."""
    cleaned = clean_caption(clean_caption(text))
    if not cleaned and text.strip():
        logger.warning(
            "cleaning removes all of the prompt %s, as it does with most that are not in Latin script: the image will "
            "be that of no prompt. Give clean_caption=False to keep the prompt, or write it in English",
            shown(text),
        )
    return cleaned


def normalize_caption(text: str) -> str:
    """What is done to a prompt that is not cleaned: lower case, no white space around it."""
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
    """Tokenise and encode texts.

    The encoder runs on the tokens alone, once for each distinct length, and never twice on the same text: T5
    has relative positions, so a token's embedding does not depend on padding that a mask hides. The embedding
    of the empty text is kept between calls, unless gradients are recorded.

    Args:
        texts: As they should be encoded: cleaning is the caller's part.
        max_sequence_length: Tokens of a text, its end token included; a warning quotes what is cut off.
        device: Of the result. The encoder runs where its weights are.

    Returns:
        embeds [B, max_sequence_length, C] in the encoder's dtype; mask [B, max_sequence_length], int64.

    Raises:
        InputError: ``texts`` is empty or holds something else than text, or there is no room for any token.
    """
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise InputError(f"expected a list of one or more texts to encode, not {shown(texts)}")
    max_sequence_length = whole_number("max_sequence_length", max_sequence_length, most=limits.TOKENS)

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
    def tokenize(texts: list[str], **options: Any) -> list[Tokens]:
        with TOKENIZING:
            return [tuple(ids) for ids in tokenizer(texts, add_special_tokens=True, **options)["input_ids"]]

    tokens = tokenize(texts, truncation=True, max_length=max_length)
    full = list(dict.fromkeys(text for text, ids in zip(texts, tokens) if len(ids) >= max_length))
    if full:
        # verbose=False: the tokenizer's own warning would say the same with another limit.
        for ids in tokenize(full, truncation=False, verbose=False):
            if len(ids) > max_length:
                logger.warning(
                    "the prompt is %d tokens long and the text encoder is given %d (max_sequence_length); "
                    "this part of it has no effect: %s",
                    len(ids),
                    max_length,
                    shown(tokenizer.decode(list(ids[max_length - 1 : -1])), 400),
                )
    return tokens


def _run(text_encoder: PreTrainedModel, batch: list[Tokens], device: torch.device | str) -> Tensor:
    """Encode token sequences of one length: [n, length, C]."""
    home = text_encoder.device
    ids = torch.tensor(batch, device=device if home.type == "meta" else home)  # [n, length]
    embeds: Tensor = text_encoder(ids, attention_mask=torch.ones_like(ids))[0]
    return embeds.to(text_encoder.dtype)


class _Kept(NamedTuple):
    state: tuple[object, ...]
    last_parameter: Tensor
    embeds: Tensor


# Weak keys: an encoder that nobody else holds is freed, and its entry with it.
_empty_embeds: weakref.WeakKeyDictionary[torch.nn.Module, _Kept] = weakref.WeakKeyDictionary()


def _encode_empty(text_encoder: PreTrainedModel, ids: Tokens, device: torch.device | str) -> Tensor:
    """The embedding [length, C] of the empty text, kept as long as the encoder lives and its weights last.

    Whether they do is read from the identities and version counters of its parameters, which any in-place
    operation, optimizer step or loading changes, and from the values of the last one (in T5 the final norm),
    which catch what writes through ``.data``, as moving averages do. Data pointers are left out: offloading
    changes them every time.
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
    with torch.inference_mode(False):  # ordinary tensors, of use outside of inference mode as well
        kept = _Kept(state, last.detach().clone(), embeds.detach().clone())
    _empty_embeds[text_encoder] = kept
    return kept.embeds
