"""Captions, and prompts like them, cleaned.

PixArt's training captions were cleaned of the clutter of web pages, and prompts should resemble them. The rules are
those of DeepFloyd IF, which PixArt adopted: expressions and order are the definition. Where the originals take
quadratic time, these take linear time for the same result: an expression that begins with a run of characters is
tried only at the start of the run, since if that fails, every later start in the run fails too.
"""

from __future__ import annotations

import functools
import html
import logging
import re
import urllib.parse

from ..checks import QUOTES_PROMPT, shown

logger = logging.getLogger("impasto")

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
            extra=QUOTES_PROMPT,
        )
    return cleaned
