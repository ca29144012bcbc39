"""Caption cleaning: from a typed prompt to text like the training captions.

Open-Sora 1.2 cleans captions with the rules of DeepFloyd IF, twice; a prompt that is not cleaned
has other tokens. Follows `IFPipeline._clean_caption` of diffusers (Apache-2.0), with the rules as
data, in their order.
"""

from __future__ import annotations

import html
import re
import warnings
from typing import NamedTuple
from urllib.parse import unquote_plus

from mlx_sora.errors import UsageError


class CleaningRule(NamedTuple):
    """A regular expression and its replacement; `why` says what it removes from captions."""

    pattern: str
    replacement: str
    why: str


_FILE = "(?:png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4)"
_HOST = r"[a-zA-Z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)"
_DASHES = (
    "-\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40"
    "\u301c\u3030\u30a0\ufe31\ufe32\ufe58\ufe63\uff0d"
)

_AFTER_SCHEME = ":(?:/{1,3}|[a-zA-Z0-9%])"


def _link_rule(scheme: str, why: str) -> CleaningRule:
    """Make a rule that removes schemes of links and bare hosts.

    Where no host begins, none begins in the letters, dots and dashes that follow. The rule skips
    them at once, up to the next scheme, because trying each of them takes quadratic time.
    """
    start = rf"\b{scheme}{_AFTER_SCHEME}"
    return CleaningRule(rf"{start}|\b{_HOST}|(\b(?:(?!{start})[a-zA-Z0-9.\-])+)", r"\1", why)


LINK_RULES = (
    CleaningRule("<person>", "person", "a placeholder for names, not markup"),
    _link_rule("https?", "scheme of a link, bare hosts"),
    _link_rule("www", "hosts the first pass laid bare"),
)

# The look-behinds of two rules prevent quadratic time for a million equal characters.
SYMBOL_RULES = (
    CleaningRule(r"@\w+\b", "", "nicknames"),
    CleaningRule(
        "[\u31c0-\u9fff]+", "", "CJK strokes, enclosed and compatibility forms, ideographs"
    ),
    CleaningRule(f"[{_DASHES}]+", "-", "one dash for all dashes"),
    CleaningRule("[`´«»“”¨]", '"', "one double quote"),
    CleaningRule("[‘’]", "'", "one single quote"),
    CleaningRule("&quot;?", "", "entity left over"),
    CleaningRule("&amp", "", "entity left over"),
    CleaningRule(r"(?:\d{1,3}\.){3}\d{1,3}", " ", "IP addresses"),
    CleaningRule(r"\d:\d\d\s+$", "", "article time stamp at the end"),
    CleaningRule(r"\\n", " ", "line break spelt out"),
    CleaningRule(r"#\d{1,3}\b", "", "ranks (#1); four digits stay"),
    CleaningRule(r"#\d{5,}\b", "", "item numbers (#12345)"),
    CleaningRule(r"\b\d{6,}\b", "", "long numbers"),
    CleaningRule(rf"(?<!\S)\S+\.{_FILE}", "", "file names"),
    CleaningRule("[\"']{2,}", '"', "repeated quotes"),
    CleaningRule(r"\.{2,}", " ", "ellipses"),
    CleaningRule(r"[#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*]+", " ", "decoration and brackets"),
    CleaningRule(r"(?<!\s)\s+\.\s+", " ", "lonely full stops"),
)

WORD_RULES = (
    CleaningRule(r"\b[a-zA-Z]{1,3}\d{3,15}\b", "", "ids like jc6640"),
    CleaningRule(r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", "", "ids like jc6640vc"),
    CleaningRule(r"\b\d+[a-zA-Z]+\d+\b", "", "ids like 6640vc231"),
    CleaningRule(r"(worldwide\s+)?(free\s+)?shipping", "", "shop talk"),
    CleaningRule(r"(free\s)?download(\sfree)?", "", "shop talk"),
    CleaningRule(r"\bclick\b\s(?:for|on)\s\w+", "", "calls to click"),
    CleaningRule(rf"\b{_FILE}(\simages?)?", "", "file types"),
    CleaningRule(r"\bpage\s+\d+\b", "", "page numbers"),
    CleaningRule(r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " ", "ids like j2d1a2a"),
    CleaningRule(r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", "", "sizes (x Latin, Cyrillic or ×)"),
    CleaningRule(r"\b\s+:\s+", ": ", "space before a colon"),
    CleaningRule(r"(\D[,./])\b", r"\1 ", "space after punctuation"),
    CleaningRule(r"\s+", " ", "one space"),
    CleaningRule("^[\"']([\\w\\W]+)[\"']$", r"\1", "quotes around everything"),
    CleaningRule(r"^['_,\-:;]", "", "punctuation in front"),
    CleaningRule(r"['_,\-:+]$", "", "punctuation at the end"),
    CleaningRule(r"^\.\S+$", "", "a lone dotted word"),
)

#: Characters of a prompt (T5 reads 300 tokens of it), and "<" in it: the time of Python's markup
#: parser grows with the square of these.
MAX_CHARACTERS, MAX_MARKS = 20_000, 500

#: With more hyphens and underscores than this, they become spaces: this-is-my-cute-cat.
MAX_JOINERS = 3


def preprocess(text: str) -> str:
    """Return the text that Open-Sora tokenizes: the caption cleaned twice.

    Raises UsageError for text that is too long or holds markup that cannot be parsed.
    """
    if len(text) > MAX_CHARACTERS:
        raise UsageError(f"The prompt has {len(text)} characters.", f"Give up to {MAX_CHARACTERS}.")
    return clean(clean(text))


def clean(text: str) -> str:
    """Clean a caption once."""
    text = unquote_plus(text).strip().lower()
    text = _apply_rules(LINK_RULES, text)
    text = _strip_markup(text)
    text = _apply_rules(SYMBOL_RULES, text)
    if len(re.findall("[-_]", text)) > MAX_JOINERS:
        text = re.sub("[-_]", " ", text)
    text = _fix_text(text)
    return _apply_rules(WORD_RULES, text).strip()


def _apply_rules(rules: tuple[CleaningRule, ...], text: str) -> str:
    for rule in rules:
        text = re.sub(rule.pattern, rule.replacement, text)
    return text


def _strip_markup(text: str) -> str:
    from bs4 import BeautifulSoup
    from bs4.builder import ParserRejectedMarkup  # its place in 4.12 and 4.13

    if text.strip() and not re.search("[<&\r]", text):  # the parser changes these, and blanks
        return text
    marks = text.count("<")
    if marks > MAX_MARKS:
        raise UsageError(f"The prompt holds '<' {marks} times.", "Remove them.")
    # Newer Pythons drop a tag that never ends (gh-135462), which the reference kept as text.
    text = re.sub(r"<(?=/?[a-z][^<>]*$)", "&lt;", text)
    try:
        with warnings.catch_warnings():
            # BeautifulSoup warns about text that looks like a file name or XML.
            warnings.simplefilter("ignore")
            return BeautifulSoup(text, features="html.parser").text
    except (ParserRejectedMarkup, RecursionError) as error:
        raise UsageError(
            "The prompt holds markup that cannot be parsed.", "Remove '<' from it."
        ) from error


def _fix_text(text: str) -> str:
    import ftfy

    return html.unescape(html.unescape(ftfy.fix_text(text))).strip()
