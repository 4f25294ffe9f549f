"""Model text to a ranking: `parse_ranking` reads any text, repairs the order and names what was wrong.

The form asked for (arXiv 2506.12364) is `<think>reasoning</think><answer>[3, 1, 2]</answer>`, ids 1-based.
Models under training write everything else too, so the parser never fails on text, keeps whatever order can
be read, and reports the rest as faults. The rules are in the docstring of `parse_ranking`.
"""

import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass

FAULTS = frozenset({"no_answer", "no_think", "duplicate", "out_of_range", "missing", "extra_text", "truncated"})
STRUCTURAL_FAULTS = frozenset({"no_answer", "no_think", "extra_text", "truncated"})

# An id with more digits is recorded as 10**18. It is out of range whatever n, and Python refuses to convert
# decimal strings of more than 4,300 digits (and takes quadratic time for long ones).
_MOST_DIGITS = 18

_TAG = re.compile(r"</?(?:think|answer)>")
# Digits are [0-9], never \d: \d also matches the digits of other scripts. The quantifiers are possessive
# (`*+`), so a list that turns out malformed after a million ids is not tried again from each of them.
_LIST = re.compile(r"\s*+\[\s*+(?:[0-9]++\s*+(?:,\s*+[0-9]++\s*+)*+)?+\]\s*+")
_CUT_LIST = re.compile(r"\s*+(?:\[[0-9,\s]*+\]?+\s*+)?+")
# A number as written: its sign if it has one (a hyphen after a word or number joins, as in "page-3"), and a
# decimal part, which makes it no id.
_NUMBER = re.compile(r"(?<![0-9A-Za-z_])[-−](?=[0-9])|[0-9]++(?:\.[0-9]++)*+")


@dataclass(frozen=True)
class ParsedRanking:
    """What a completion says about n candidates.

    order: 0-based permutation of range(n): ids as written (first mention, in range), then the rest in
        candidate order.
    answer: 1-based ids as written, with repeats and ids out of range; () for an empty list; None if there is
        no answer to read. Ids beyond ±10**18 are recorded as ±10**18.
    think: text of the first think block, verbatim; None if there is none.
    faults: names from `FAULTS`; see `parse_ranking`.
    """

    order: tuple[int, ...]
    answer: tuple[int, ...] | None
    think: str | None
    faults: frozenset[str]

    @property
    def valid(self) -> bool:
        """No fault at all: one think block with text, then a permutation of 1..n, and nothing else."""
        return not self.faults

    @property
    def well_formed(self) -> bool:
        """The structure is right, whichever ids the list holds: what the format reward calls valid."""
        return not self.faults & STRUCTURAL_FAULTS


# What chat templates (and our own modes without reasoning) open of the answer, at the very end of a prompt.
_OPENING = re.compile(r"<think>\s*+(?:</think>\s*+(?:<answer>\s*+\[?+\s*+)?+)?+\Z")


def with_opening(text: str, prompt: str | None = None) -> str:
    """Return a completion with what its prompt had opened of the answer put before it, such as `<think>`.

    Many chat templates end a prompt with `<think>`, so the model goes on from there and its completion alone looks
    as if it had not thought. Apply this before `parse_ranking` and before any reward, in training and inference.

        >>> with_opening("Image 2 fits.</think><answer>[2, 1]</answer>", "…<|im_start|>assistant\\n<think>\\n")
        '<think>\\nImage 2 fits.</think><answer>[2, 1]</answer>'

    prompt: the text that the model went on from (`apply_chat_template(…, tokenize=False,
        add_generation_prompt=True)`). None where it is unknown, as with a server: then `<think>` is put before a
        text that closes a think block without opening one.
    """
    if prompt is None:
        closed, opened = text.find("</think>"), text.find("<think>")
        opening = "<think>" if closed >= 0 and not 0 <= opened < closed else ""
    else:
        found = _OPENING.search(prompt)
        opening = found[0] if found else ""
    # Some servers and models write the tag again that the template opened.
    return text if text.lstrip().startswith("<think>") else opening + text


def parse_ranking(text: str, n: int) -> ParsedRanking:
    """Read a completion that ranks n candidates. Any string gives a permutation, in linear time.

        >>> p = parse_ranking("<think>Image 3 fits.</think><answer>[3, 1, 1]</answer>", 4)
        >>> p.order, p.answer, sorted(p.faults)
        ((2, 0, 1, 3), (3, 1, 1), ['duplicate', 'missing'])

    Blocks. A think block runs from `<think>` to the next `</think>`; what stands between is free text, tags
    included, so an answer there does not count. An answer block runs from an `<answer>` outside think to the
    next tag. The last answer block that holds a list or an id counts; an answer without the tags does not.

    Ids. In the asked form the block is one list `[3, 1, 2]`, white space and newlines free. Otherwise ids are
    still read, in order, from between the first `[` and the last `]` (or all of the block, when it has no
    brackets): `[Image 3, image 1]` and `3 > 1` both give (3, 1), with the fault "extra_text". Only ASCII
    digits count, `-3` is the id -3, and decimals such as 3.5 are no ids.

    Faults:
    - "no_answer": no answer block outside think with a list or an id in it (answer is None; the id faults
      below are then not reported).
    - "no_think": no think block, or a blank one.
    - "extra_text": anything but white space outside the two blocks, a second block of a kind, a tag without
      its partner, an answer before its think block, or an answer block that is not one bracketed list.
    - "truncated": the text ends inside a block. Of a list cut off there, a last id that touches the end of
      the text is kept only if no longer id up to n could start like it: `[3, 1` gives (3, 1) for n = 5, but
      (3,) for n = 12, where the model may have been writing 10, 11 or 12.
    - "duplicate", "out_of_range", "missing": an id written twice, an id outside 1..n, not all of 1..n.

    Raises TypeError when text is not a string, ValueError when n < 1.
    """
    if not isinstance(text, str):
        raise TypeError(f"text is a {type(text).__name__}, expected the model's text as a string")
    n = operator.index(n)
    if n < 1:
        raise ValueError(f"n is {n}: a ranking needs at least one candidate")

    thinks, answers, faults = _blocks(text)
    think = text[slice(*thinks[0])] if thinks else None
    if think is None or not think.strip():
        faults.add("no_think")
    if len(thinks) > 1 or len(answers) > 1:
        faults.add("extra_text")
    if thinks and answers and answers[0][0] < thinks[0][0]:
        faults.add("extra_text")

    answer = None
    for start, end in reversed(answers):
        cut = end == len(text) and "truncated" in faults
        answer, clean = _read_answer(text[start:end], cut, n)
        if not clean:
            faults.add("extra_text")
        if answer is not None:
            break
    if answer is None:
        faults.add("no_answer")
        return ParsedRanking(tuple(range(n)), None, think, frozenset(faults))

    seen: set[int] = set()
    order = []
    for i in answer:
        if i in seen:
            faults.add("duplicate")
            continue
        seen.add(i)
        if 1 <= i <= n:
            order.append(i - 1)
        else:
            faults.add("out_of_range")
    if len(order) < n:
        faults.add("missing")
        order += [i for i in range(n) if i + 1 not in seen]
    return ParsedRanking(tuple(order), answer, think, frozenset(faults))


def _blocks(text: str) -> tuple[list[tuple[int, int]], list[tuple[int, int]], set[str]]:
    """Spans of the think and the answer blocks' contents, and the faults of what stands around them."""
    thinks: list[tuple[int, int]] = []
    answers: list[tuple[int, int]] = []
    faults: set[str] = set()
    inside = ""  # "", "think" or "answer"
    start = 0  # where the open block, or the gap between blocks, begins
    for tag in _TAG.finditer(text):
        name = tag[0]
        if inside == "think":
            if name != "</think>":
                continue
            thinks.append((start, tag.start()))
            inside = ""
        elif inside == "answer":
            answers.append((start, tag.start()))
            if name != "</answer>":
                faults.add("extra_text")
            inside = name[1:-1] if name[1] != "/" else ""
        else:
            # A stray closing tag is text that belongs to no block, as is anything visible before this tag.
            if name[1] == "/" or text[start : tag.start()].strip():
                faults.add("extra_text")
            inside = name[1:-1] if name[1] != "/" else ""
        start = tag.end()
    if inside:
        faults.add("truncated")
        (thinks if inside == "think" else answers).append((start, len(text)))
    elif text[start:].strip():
        faults.add("extra_text")
    return thinks, answers, faults


def _read_answer(block: str, cut: bool, n: int) -> tuple[tuple[int, ...] | None, bool]:
    """The ids in an answer block (None if it has neither list nor id), and whether it has the asked form."""
    whole = _without_partial_tag(block) if cut else block
    clean = (_CUT_LIST if cut else _LIST).fullmatch(whole) is not None
    opened, closed = whole.find("["), whole.rfind("]")
    bracketed = 0 <= opened < closed
    inner = whole[opened + 1 : closed] if bracketed else whole[opened + 1 :]
    ids = []
    sign, end = 1, -1
    for number in _NUMBER.finditer(inner):
        written = number[0]
        if written in "-−":
            sign = -1
            continue
        if "." not in written:
            digits = written.lstrip("0") or "0"
            value = int(digits) if len(digits) <= _MOST_DIGITS else 10**_MOST_DIGITS
            ids.append(sign * value)
            end = number.end()
        sign = 1
    at_the_cut = cut and whole == block and not bracketed and end == len(inner)
    if at_the_cut and ids[-1] * 10 <= n:
        ids.pop()
    if not ids and not bracketed:
        return None, clean or not whole.strip()
    return tuple(ids), clean


def _without_partial_tag(block: str) -> str:
    closing = "</answer>"
    for length in range(len(closing) - 1, 0, -1):
        if block.endswith(closing[:length]):
            return block[:-length]
    return block


# "Image 3" where a sentence or line begins, or wherever a colon follows.
_IMAGE = re.compile(r"(?:(?<=\n)|(?<=^)|(?<=[.!?] ))[ \t]*+Image[ #]?([0-9]{1,4})\b(?:[ \t]*+:)?|\bImage ([0-9]{1,4}):")


def reasoning_by_image(think: str, n: int) -> dict[int, str]:
    """What reasoning says of each image: 1-based id -> its text, the ids 1..n that it speaks of only.

    A part begins with "Image i" at the start of a line or sentence, or with "Image i:", and ends where the next
    begins; an image that is spoken of twice gets both parts, joined by a line break.

        >>> reasoning_by_image("Image 1: a chart.\\nImage 2 shows the year. Image 1 does not.", 2)
        {1: 'a chart.\\nImage 1 does not.', 2: 'Image 2 shows the year.'}
    """
    parts: dict[int, str] = {}
    found = list(_IMAGE.finditer(think))
    for k, match in enumerate(found, 1):
        number = int(match[1] or match[2])
        end = found[k].start() if k < len(found) else len(think)
        text = think[match.end() if match[0].endswith(":") else match.start() : end].strip()
        if 1 <= number <= n and text:
            parts[number] = f"{parts[number]}\n{text}" if number in parts else text
    return parts


def reasons_in_order(think: str | None, order: Sequence[int], shown: Sequence[int] | None = None) -> list[str]:
    """What reasoning says of each candidate of `order` (0-based); "" where it says nothing of it.

    shown: the candidates that "Image 1", "Image 2", … are; None: all, in their order (as in `rerank.Ranking`)

        >>> reasons_in_order("Image 1: a chart. Image 2: a table.", [1, 0])
        ['a table.', 'a chart.']
    """
    images = list(range(len(order)) if shown is None else shown)
    by_image = reasoning_by_image(think or "", len(images))
    return [by_image.get(images.index(k) + 1, "") if k in images else "" for k in order]
