"""Tell the ids in an answer from its other numbers: ranks, scores and list numbers.

Models write lists (`[3, 1, 2]`, `[3] > [1] > [2]`), numbered lines (`1. Image 3`), JSON (`{"1": 3, "2": 1}`,
`[{"id": 3, "score": 2}]`), tables and words. `read_ids` reads them all by two clues: the word in front of a number,
and whether numbers come in pairs (`1: 3, 2: 1`). Every step is linear in the text.
"""

import operator
import re
from bisect import bisect_left
from itertools import pairwise, zip_longest
from typing import NamedTuple

# An id with more digits is recorded as 10**18. It is out of range whatever n, and Python refuses to convert
# decimal strings of more than 4,300 digits (and takes quadratic time for long ones).
_MOST_DIGITS = 18

# What a number is, by the word in front of it.
_IMAGE = {"image", "images", "img", "picture", "pictures", "photo", "id", "ids", "index", "图", "图片", "图像", "画像"}
_PAGE = {"page", "pages", "doc", "document", "documents", "candidate", "candidates", "passage", "passages", "figure"}
_RANK = {"rank", "ranks", "place", "position", "top"}
_SCORE = {"score", "scores", "relevance", "rating", "confidence", "similarity", "probability", "points"}
_OTHER = {
    "and", "then", "is", "the", "answer", "final", "ranking", "ranked", "order", "result", "list", "json", "boxed",
    "text", "st", "nd", "rd", "th",
}  # fmt: skip
WORDS_OF_ANSWERS = _IMAGE | _PAGE | _RANK | _SCORE | _OTHER

# A word; a sign (a hyphen after a word or number joins, as in "page-3"); or a number with what makes it no id: a
# decimal part, a percent sign, "/10". The quantifiers are possessive (`*+`): no text is tried again from inside.
_TOKEN = re.compile(r"[^\W\d_]++|(?<!\w)[-−](?=[0-9])|(?P<id>[0-9]++)(?P<no>(?:\.[0-9]++)++|[ ]?%|/100?\b)?+")
_AFTER_WORD = re.compile(r"[ \t\"'`*_#:=\[({\\.-]*+")  # between a word and the number that it describes
# between ids of one list
_JOIN = re.compile(r"[ \t\"'`*\[\]]*+(?:(?:[,;>&]|(?:and|then|followed)\b)[\s\"'`*\[\]]*+)*+")
# between a list number and its id
_LEAD = re.compile(r"(?:st|nd|rd|th)?+[\s\"'`*]*+(?:[-=]>|[.):|=→–-])*+[\s\"'`*\[({|]*+")
_CLEAN_LIST = re.compile(r"\[\s*+[0-9]++(?:\s*+,\s*+[0-9]++)*+\s*+\]")
_BRACKETS = re.compile(r"\[[^\[\]]*+(?:\]|\Z)")
_PAIR_MARK = re.compile(r"[.):|→]|[-=]>")
_NO_MARK = re.compile(r"[\w\s\"'`*]++")


class Number(NamedTuple):
    """A whole number in a text. word: the one that describes it, in lower case, or ""; start: with that word."""

    value: int
    word: str
    start: int
    digits: int
    end: int


def read_ids(text: str, n: int, cut: bool = False) -> tuple[list[Number], bool]:
    """Return the numbers that are ids, best first, and whether others (ranks, scores, list numbers) were left out.

    n: number of candidates; cut: the text ends early, so its last number may be unfinished

        >>> [x.value for x in read_ids("1. Image 3, 2. Image 1", 3)[0]]
        [3, 1]
    """
    numbers = _numbers(text)
    if cut and numbers and numbers[-1].end == len(text) and numbers[-1].value * 10 <= n:
        numbers = numbers[:-1]  # of 12 candidates, a 1 at the end may have been about to become 10, 11 or 12
    if listed := _one_list(text, numbers):
        return listed, False
    words = next((w for w in (_IMAGE, _PAGE) if any(x.word in w for x in numbers)), None)
    if words:
        ids = _described(text, numbers, words)
    else:
        numbers, ids = _bare(text, numbers, n, cut)
    return ids, len(ids) < len(numbers)


def _numbers(text: str) -> list[Number]:
    """The whole numbers of a text, in order."""
    numbers = []
    word, sign = None, 1
    for token in _TOKEN.finditer(text):
        written = token["id"]
        if written is None:
            sign, word = (-1, word) if token[0] in "-−" else (1, token)
            continue
        if token["no"] is None:
            if word is not None and not _AFTER_WORD.fullmatch(text, word.end(), token.start() - (sign < 0)):
                word = None
            digits = written.lstrip("0") or "0"
            value = int(digits) if len(digits) <= _MOST_DIGITS else 10**_MOST_DIGITS
            ordinal = text[token.end() : token.end() + 2].lower() in ("st", "nd", "rd", "th")
            name = "rank" if ordinal else word[0].lower() if word else ""
            start = word.start() if word else token.start()
            numbers.append(Number(sign * value, name, start, token.start(), token.end()))
        word, sign = None, 1
    return numbers


def _one_list(text: str, numbers: list[Number]) -> list[Number]:
    """Return the numbers of the only bracketed list of two or more, score lists aside; [] unless it is the only one."""
    parts = [part for part in _inside(_CLEAN_LIST, text, numbers) if len(part) > 1 and part[0].word not in _SCORE]
    return parts[0] if len(parts) == 1 else []


def _inside(brackets: re.Pattern[str], text: str, numbers: list[Number]) -> list[list[Number]]:
    """The numbers in each match of a pattern."""
    places = [x.digits for x in numbers]
    spans = (match.span() for match in brackets.finditer(text))
    return [numbers[bisect_left(places, start) : bisect_left(places, end)] for start, end in spans]


def _described(text: str, numbers: list[Number], words: set[str]) -> list[Number]:
    """The ids where some numbers follow a word such as "Image": these, and those in one list with them.

    Of several list items or JSON objects only the first ids of each count: the rest of "1. Image 3: it has the table
    that Image 1 lacks" is a remark. So it is with lines, unless that would lose an id.
    """
    by_object = "{" in text
    ids: list[tuple[Number, int, int]] = []  # number, item, run: ids with nothing but separators between them
    ranks: list[Number] = []
    item = run = end = 0
    is_id = leads = False
    for x, after in zip_longest(numbers, numbers[1:]):
        gap = text[end : x.start]
        lead = x.word not in words and after and after.word in words and _LEAD.fullmatch(text, x.end, after.start)
        joined = is_id and not lead and _JOIN.fullmatch(gap) is not None
        item += bool(lead) or ("{" in gap if by_object else "\n" in gap and not joined)
        leads |= bool(lead)
        is_id = x.word in words or (joined and not by_object and x.word not in _RANK | _SCORE)
        if is_id:
            run += not joined
            ids.append((x, item, run))
        elif lead or x.word in _RANK:
            ranks.append(x)
        end = x.end
    first_run = {item: run for _, item, run in reversed(ids)}
    firsts = [x for x, item, run in ids if run == first_run[item]]
    if leads or (by_object and len(first_run) > 1) or {x.value for x in firsts} == {x.value for x, _, _ in ids}:
        return _by_rank(firsts, ranks)
    return _by_rank([x for x, _, _ in ids], ranks)


def _bare(text: str, numbers: list[Number], n: int, cut: bool) -> tuple[list[Number], list[Number]]:
    """The numbers that count where no word says which are ids, and the ids among them."""
    parts = _inside(_BRACKETS, text, numbers)
    bracketed = [x for part in parts for x in part]
    if bracketed and len(bracketed) < len(numbers):
        if all(len(part) < 2 for part in parts):  # 1. [3] 2. [1]
            return numbers, bracketed
        start, end = text.find("["), text.rfind("]")
        numbers = [x for x in numbers if start < x.digits and (x.digits < end or end < start)]
    if cut and len(numbers) == 1 and not bracketed:
        return numbers, []  # it may have been about to become a list number
    ranks = [x for x in numbers if x.word in _RANK]
    others = [x for x in numbers if x.word in _RANK | _SCORE]
    if len(others) == 1 and others[0] is numbers[0] and len(numbers) > 1:
        heading = _JOIN.fullmatch(text, numbers[0].end, numbers[1].start)  # relevance: 3, 1, 2
        others = [] if heading else others
    if others and (cut or len(others) < len(numbers)):
        return numbers, _by_rank([x for x in numbers if x.word not in _RANK | _SCORE], ranks)
    return numbers, _of_pairs(text, numbers, n, cut)


def _of_pairs(text: str, numbers: list[Number], n: int, cut: bool) -> list[Number]:
    """The ids among numbers that come in pairs, as in `1. 3` or `{"1": 3, "2": 1}`; all numbers where they do not."""
    paired = numbers[:-1] if cut and len(numbers) % 2 else numbers  # the last may be the first of a pair
    gaps = [text[a.end : b.digits] for a, b in pairwise(paired)]
    inner, outer = gaps[::2], gaps[1::2]
    if not paired or len(paired) % 2 or len({_NO_MARK.sub("", gap) for gap in inner}) > 1:
        return numbers
    tuples = all(")" in gap and "(" in gap for gap in outer) and not _are_ids(numbers, n)  # (3, 9), (1, 8)
    marked = all(_PAIR_MARK.search(gap) and not re.search(r"[,;\n]", gap) for gap in inner)
    if not (tuples or marked) or any(gap.strip() == inner[0].strip() for gap in outer):  # 3. 1. 2. 4
        return numbers
    firsts, seconds = paired[::2], paired[1::2]
    if _counts_up(firsts) and _are_ids(seconds, n):
        return seconds  # rank: id
    if len(numbers) < 4 or not _are_ids(firsts, n):
        return numbers
    ranked = _by_rank(seconds, firsts)
    if _are_ids(seconds, n) and not _counts_up(seconds) and ranked != seconds:
        return ranked  # ranks in another order than theirs
    return firsts  # id: rank, or id: score


def _counts_up(numbers: list[Number]) -> bool:
    first = numbers[0].value if numbers else 1
    return first in (0, 1) and all(x.value == k for k, x in enumerate(numbers, first))


def _are_ids(numbers: list[Number], n: int) -> bool:
    return len({x.value for x in numbers}) == len(numbers) and all(0 <= x.value <= n for x in numbers)


def _by_rank(ids: list[Number], ranks: list[Number]) -> list[Number]:
    """The ids in the order of their ranks, where each has one: "Rank 2: Image 1, Rank 1: Image 3"."""
    if len(ids) != len(ranks) or sorted(x.value for x in ranks) != list(range(1, len(ids) + 1)):
        return ids
    return [x for _, x in sorted(zip((rank.value for rank in ranks), ids, strict=True), key=operator.itemgetter(0))]
