from __future__ import annotations

import random
import warnings

import pytest
from diffusers import PixArtAlphaPipeline

from impasto.pipelines.cleaning import clean_caption
from impasto.pipelines.prompts import prepare

CAPTIONS = [
    "",
    "   ",
    "A small cactus with a happy face in the Sahara desert.",
    "<person> and a <b>bold</b> <i>cat</i><br/>on a mat <!-- no comment -->",
    "a < b & c > d &amp; e &lt;f&gt; &quot;g&quot; &#39;h&#39; &amp;amp; &nbsp",
    "see http://example.com/a/b?c=d#e or https:/x.org, www.foo.co.uk/path and www://odd",
    "mail me@example.com or @nickname, foo.com@bar stays",
    "a%20cat%2C+with+plus %C3%A9t%C3%A9 100% wool",
    "漢字 cat かな カタカナ ㇰ ㈱ ㌀ ䷀ 㐀 龥 ㇀",
    "dash – dash — dash ‐ dash 〜 dash 〰 dash ﹣ dash － end",
    "`q´ «q» “q” ¨q¨ ‘s’ don’t",
    '"""AUSVERKAUFT""" ***AUSVERKAUFT*** #AUSVERKAUFT \'\'x\'\' \'"y"\'',
    "ip 192.168.0.1 and 10.0.0.255!",
    "article 3:27 ",
    "lines\\nspelt out\nand real\r\nones\ttabbed",
    "#1 #123 #1234 #12345 #1234567 123456 1234567890 12345",
    "photo.jpg IMG_1234.PNG dir/file.webp clip.mp4x .jpg",
    "a.. b... c . d .e f. g",
    "this-is-my-cute-cat this_is_a_snake a-b_c",
    "this-is-my cat_dog",
    "a____b __c__ -_-_-",
    "broken âœ” caf\u00c3\u00a9 â€œquotesâ€\u009d schÃ¶n",
    "JC6640 jc6640vc 6640vc231 abc12 abcd1234 a1b2c3d4 j2d1a2a 4k 3d 8K-HDR",
    "free shipping worldwide free shipping  worldwide shipping shipping",
    "free download download free Download free wallpapers",
    "click for more click on this click",
    "png image jpg images webp pdf apkx",
    "page 12 of page  3 pages 4",
    "10x20 10.5x3 3×4 5х6 (Cyrillic) 1920x1080px x10",
    "title : subtitle :x a,b c.d e/f 1,2 1.5",
    "'quoted whole' ",
    '"quoted whole"',
    "-leading and trailing-",
    ":a:",
    ";x_",
    ".gitignore",
    "emoji 😀👍🏽 ❤️ ™ ® © • · ½ ¿qué? ¡hola! § ~",
    "brackets (a) [b] {c} |d| \\e\\ /f/ *g*",
    "\u200bzero\u200bwidth\xa0nbsp\u2028separator\x00nul\x1cfs",
    "İstanbul ß ﬁ Ⅷ Å Å",
]

FRAGMENTS = [fragment for caption in CAPTIONS for fragment in caption.split()] + ["\\n", "\n", "&", "<", " . "]


def reference(caption: str) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the parser of markup wonders about file names
        return str(PixArtAlphaPipeline._clean_caption(PixArtAlphaPipeline, caption))


@pytest.mark.parametrize("caption", CAPTIONS)
def test_once_and_twice(caption: str) -> None:
    once = clean_caption(caption)
    assert once == reference(caption)
    assert clean_caption(once) == reference(once)


@pytest.mark.parametrize("joint", ["", " ", "_"])
def test_random_mixtures(joint: str) -> None:
    rng = random.Random(joint)
    for _ in range(500):
        caption = joint.join(rng.choices(FRAGMENTS, k=rng.randint(1, 9)))
        assert clean_caption(caption) == reference(caption), caption


@pytest.mark.parametrize("caption", CAPTIONS)
def test_without_cleaning(caption: str) -> None:
    assert [prepare(caption, clean=False)] == PixArtAlphaPipeline._text_preprocessing(None, caption)


ALPHABETS = [
    *("a.-", "a1.", "1x×х.", "a1_ ", " .\n", "a.com ", "a./@_é", "www:/.co ", "http:s/%. "),
    "aB1é漢-.:'\" #&<>@;",
]
#: What the expressions are about that are not written as in the reference, for linear time.
PIECES = [
    *(".com", ".org/", "http://", "https:", "www:", "a.ru", "@", ".png", ".jpg", "1.5x3", "j2d1", "é", "/", "_", "-"),
    " . ",
]


@pytest.mark.parametrize("alphabet", ALPHABETS)
def test_random_characters(alphabet: str) -> None:
    rng = random.Random(alphabet)
    for _ in range(700):
        pieces = [*alphabet, *rng.sample(PIECES, 4)]
        caption = "".join(rng.choices(pieces, k=rng.randint(1, 24)))
        assert clean_caption(caption) == reference(caption), caption
