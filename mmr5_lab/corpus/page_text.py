"""Texts of pages as they are kept: words whole, accents composed, no control characters."""

import re
import unicodedata
from collections.abc import Iterable
from itertools import pairwise

HYPHEN = "\ufffe"
"""A hyphen at the end of a line, as PDFium writes it: exactly where FPDFText_IsHyphen says so."""

_WORD = re.compile(r"[^\W_]+")
_BROKEN = re.compile(rf"([\w'’-]*){HYPHEN}(?:[ \t]*\n\s*)?([\w'’-]*)")
_SOFT_HYPHEN = re.compile("\xad\\s*")  # it is seen only where it breaks a word, at a line's end
_UNREADABLE = {"Cc", "Cs", "Co", "Cn"}  # control, half of a character, private, not assigned
_MOST_UNREADABLE, _FEWEST_FREQUENT = 0.2, 0.35  # shares of characters, of letters
_CHINESE_OR_JAPANESE = re.compile("[\u3040-\u30ff\u3400-\u9fff]")


def clean_text(text: str) -> str:
    """Return a text without control characters, with composed accents; broken words stay so, marked by `HYPHEN`."""
    text = _SOFT_HYPHEN.sub("", unicodedata.normalize("NFC", text))
    return "".join(c if c in f"\n\t{HYPHEN}" or _is_text(c) else " " for c in text)


def _is_text(character: str) -> bool:
    return character.isprintable() or unicodedata.category(character) not in {"Cc", "Cs", "Cn"}


def is_garbage(text: str) -> bool:
    """Return whether a text layer's characters are not what the page shows, as where a font names no letters.

    Two signs: more than a fifth of the characters are no text at all, or of a hundred Latin letters or more fewer than
    35 % are among e, t, a, o, i, n, s, r. That is .59 at least on 203 real pages and .18 to .42 where an alphabet is
    shifted; in Polish .53, in Vietnamese .48, in Welsh .39.
    """
    characters = [c for c in text if not c.isspace() and c != HYPHEN]
    unreadable = sum(c == "\ufffd" or unicodedata.category(c) in _UNREADABLE for c in characters)
    if unreadable > _MOST_UNREADABLE * len(characters):
        return True
    letters = re.findall("[a-z]", text.lower())
    frequent = sum(letter in "etaoinsr" for letter in letters)
    return len(letters) >= 100 and frequent < _FEWEST_FREQUENT * len(letters)


def count_words(text: str) -> int:
    """Return the number of words, where each Chinese or Japanese character counts as one."""
    return sum(max(1, len(_CHINESE_OR_JAPANESE.findall(word))) for word in _WORD.findall(text))


def vocabulary(texts: Iterable[str]) -> set[str]:
    """Return the words of a document and its hyphenated pairs of words, those broken at line ends left out."""
    words: set[str] = set()
    for text in texts:
        for compound in re.findall(r"[^\W_]+(?:[-‐][^\W_]+)*", _BROKEN.sub(" ", text)):
            parts = re.split("[-‐]", compound)
            words.update(parts, map(str.lower, parts), (f"{a}-{b}".lower() for a, b in pairwise(parts)))
    return words


def join_hyphens(text: str, words: set[str]) -> str:
    """Return a text whose broken words are whole: photo-¶synthesis is photosynthesis, well-¶known keeps its hyphen.

    words: the document's `vocabulary`. The hyphen stays where the document writes the pair with one elsewhere; else,
    where it does not write the joined word, if the first part has a hyphen already, if a capital follows a small
    letter, or if both parts are words of the document with four letters or more.
    """

    def joined(match: re.Match[str]) -> str:
        left, right = match.groups()
        a, b = left.rpartition("-")[2], right.partition("-")[0]
        if f"{a}-{b}".lower() in words:
            return f"{left}-{right}"
        compound = (
            "-" in left or (a[-1:].islower() and b[:1].isupper()) or (min(len(a), len(b)) > 3 and {a, b} <= words)
        )
        return f"{left}-{right}" if compound and (a + b).lower() not in words else left + right

    while HYPHEN in text:  # again for a word broken twice
        text = _BROKEN.sub(joined, text)
    return text
