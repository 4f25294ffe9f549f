"""Model text to a ranking: `parse_ranking` reads any text, repairs the order and names what was wrong.

The form asked for (arXiv 2506.12364) is `<think>reasoning</think><answer>[3, 1, 2]</answer>`, ids 1-based.
Models write everything else too, so the parser never fails on text, keeps whatever order a person would read in
it, and reports each repair as a fault.
"""

import operator
import re
import unicodedata
from dataclasses import dataclass

from mmr5_lab.prompting.answer_ids import WORDS_OF_ANSWERS, read_ids

ID_FAULTS = frozenset({"duplicate", "out_of_range", "missing", "zero_based"})
STRUCTURAL_FAULTS = frozenset({
    "no_answer", "no_think", "extra_text", "truncated", "unopened_think", "unclosed_think", "tag_form", "untagged",
    "other_script", "other_numbers",
})  # fmt: skip
FAULTS = ID_FAULTS | STRUCTURAL_FAULTS

_TAG = re.compile(r"<\s*+(/?)\s*+(think|answer)\s*+>", re.IGNORECASE | re.ASCII)
# The quantifiers are possessive (`*+`), so a list that turns out malformed after a million ids is not tried again
# from each of them.
_LIST = re.compile(r"\s*+\[\s*+(?:[0-9]++\s*+(?:,\s*+[0-9]++\s*+)*+)?+\]\s*+")
_CUT_LIST = re.compile(r"\s*+(?:\[[0-9,\s]*+\]?+\s*+)?+")
# What other scripts write for ASCII: full-width forms, commas, brackets and spaces, and decimal digits.
_OTHER_SCRIPT = re.compile(r"[！-～、【】　]|(?![0-9])\d")
_PUNCTUATION = {"、": ",", "【": "[", "】": "]", "　": " "}
# Where an answer without tags stands. Each kind's last one counts.
_BOXED = re.compile(r"\\boxed\s*+\{([^{}]*+)\}")
_FENCED = re.compile(r"```[a-z]*+((?:[^`]|`(?!``))*+)```")
_BARE_LIST = re.compile(r"\[\s*+[0-9]++(?:\s*+,\s*+[0-9]++)++\s*+\]")
_WORD = re.compile(r"[^\W\d_]++")
_PARTIAL_TAG = re.compile("(?:" + "|".join("</answer"[:length] for length in range(8, 0, -1)) + r")\Z")


@dataclass(frozen=True)
class ParsedRanking:
    """What a completion says about n candidates.

    order: 0-based permutation of range(n): ids as written (first mention, in range), then the rest in candidate order.
    answer: 1-based ids as written, with repeats and ids out of range (beyond ±10**18 as ±10**18); () for an empty list;
        None if there is no answer to read.
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
        """The structure is the asked one, whichever ids the list holds: what the format reward calls valid."""
        return not self.faults & STRUCTURAL_FAULTS


# The start of an answer that a chat template (or a mode without reasoning) has written at the end of the prompt.
_OPENING = re.compile(r"<think>\s*+(?:</think>\s*+(?:<answer>\s*+\[?+\s*+)?+)?+\Z")


def with_opening(text: str, prompt: str | None = None) -> str:
    """Return a completion with what its prompt had opened of the answer put before it, such as `<think>`.

    Where a chat template ends a prompt with `<think>`, the completion alone looks as if the model had not thought.
    Apply this before `parse_ranking` and before any reward, in training and inference.

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
    next tag. The last answer block that holds a list or an id counts.

    Ids. In the asked form the block is one list `[3, 1, 2]`, white space and newlines free. Every other form that a
    person would read is read, with a fault: `3 > 1`, `1. Image 3`, `Rank 1: Image 3`, `{"1": 3}`, `[{"id": 3,
    "score": 2}]`, tables and more (`answer_ids.read_ids`). `-3` is the id -3; decimals such as 3.5 are no ids.

    Faults of the structure; none of them is in the asked form:
    - "no_answer": there is nothing to read (answer is None; the id faults below are then not reported).
    - "no_think": no think block, or a blank one.
    - "extra_text": anything but white space outside the two blocks, a second block of a kind, a tag without
      its partner, an answer before its think block, or an answer block that is not one list in square brackets.
    - "truncated": the text ends inside a block. Of an answer cut off there, a last id that touches the end of
      the text is kept only if no longer id up to n could start like it: `[3, 1` gives (3, 1) for n = 5, but
      (3,) for n = 12, where the model may have been writing 10, 11 or 12.
    - "unopened_think": the text closes a think block that it never opened. If the prompt did, see `with_opening`.
    - "unclosed_think": the think block never ends, but the text ends with a whole answer block, which is read. Where
      other text follows, that answer was part of reasoning that was cut off: "truncated".
    - "tag_form": tags written as `<Answer>` or `< answer>`. They count only where the exact tag is not in the text,
      since quoted tags are made harmless by a space (`prompts.neutralise`).
    - "untagged": no answer block, but an answer after the reasoning: in `\\boxed{…}`, in a code fence, a list in
      square brackets, or a text of nothing but ids. Without a think block only if it holds all of the ids.
    - "other_script": digits, commas, brackets or tags of another script, such as `［３，１，２］`.
    - "other_numbers": the answer also holds list numbers, ranks or scores, which were told from the ids.

    Faults of the ids:
    - "duplicate", "out_of_range", "missing": an id written twice, an id outside 1..n, not all of 1..n.
    - "zero_based": the ids are a permutation of 0..n-1; `answer` has them 1-based.

    Raises TypeError when text is not a string, ValueError when n < 1.
    """
    if not isinstance(text, str):
        raise TypeError(f"text is a {type(text).__name__}, expected the model's text as a string")
    n = operator.index(n)
    if n < 1:
        raise ValueError(f"n is {n}: a ranking needs at least one candidate")

    plain = text if text.isascii() else _OTHER_SCRIPT.sub(_in_ascii, text)  # one for one, so places stay the same
    thinks, answers, rest, faults = _blocks(text, plain)
    think = text[slice(*thinks[0])] if thinks else None
    if think is None or not think.strip():
        faults.add("no_think")
    if len(thinks) > 1 or len(answers) > 1 or (thinks and answers and answers[0][0] < thinks[0][0]):
        faults.add("extra_text")

    answer = None
    start, end = rest, len(text)
    for start, end in reversed(answers):
        answer = _read_answer(plain[start:end], end == len(text) and "truncated" in faults, n, faults)
        if answer is not None:
            break
    if not answers and "truncated" not in faults:
        answer = _read_untagged(plain[rest:], n, rest > 0, faults)
    if answer is None:
        faults.add("no_answer")
        return ParsedRanking(tuple(range(n)), None, think, frozenset(faults))
    if text[start:end] != plain[start:end]:
        faults.add("other_script")
    if len(answer) == n and set(answer) == set(range(n)):
        faults.add("zero_based")
        answer = tuple(i + 1 for i in answer)
    return ParsedRanking(_order(answer, n, faults), answer, think, frozenset(faults))


def _order(answer: tuple[int, ...], n: int, faults: set[str]) -> tuple[int, ...]:
    """The permutation that an answer gives; adds the faults of its ids."""
    ids = list(dict.fromkeys(answer))
    if len(ids) < len(answer):
        faults.add("duplicate")
    order = [i - 1 for i in ids if 1 <= i <= n]
    if len(order) < len(ids):
        faults.add("out_of_range")
    if len(order) < n:
        faults.add("missing")
        written = set(order)
        order += [i for i in range(n) if i not in written]
    return tuple(order)


def _in_ascii(match: re.Match[str]) -> str:
    character = match[0]
    if character.isdecimal():
        return str(unicodedata.decimal(character))
    return _PUNCTUATION.get(character) or chr(ord(character) - 0xFEE0)  # full-width forms stand in ASCII's order


def _blocks(text: str, plain: str) -> tuple[list[tuple[int, int]], list[tuple[int, int]], int, set[str]]:
    """Spans of the think and the answer blocks' contents, the end of the last think block, and faults around them."""
    tags = [(tag[1] + tag[2].lower(), *tag.span()) for tag in _TAG.finditer(plain)]
    exact = {name for name, a, b in tags if text[a:b] == f"<{name}>"}
    tags = [(name, a, b) for name, a, b in tags if name not in exact or text[a:b] == f"<{name}>"]
    faults = set() if exact.issuperset(name for name, _, _ in tags) else {"tag_form"}
    thinks: list[tuple[int, int]] = []
    answers: list[tuple[int, int]] = []
    inside = ""  # "", "think" or "answer"
    start = rest = 0  # start: where the open block, or the gap between blocks, begins
    if tags and tags[0][0] == "/think":
        inside = "think"
        faults.add("unopened_think")
    for name, tag_start, tag_end in tags:
        closing = name[0] == "/"
        if inside == "think":
            if name != "/think":
                continue
            thinks.append((start, tag_start))
            rest = tag_end
        elif inside == "answer":
            answers.append((start, tag_start))
            if name != "/answer":
                faults.add("extra_text")
        elif closing or text[start:tag_start].strip():
            # A stray closing tag is text that belongs to no block, as is anything visible before this tag.
            faults.add("extra_text")
        inside = "" if closing else name
        start = tag_end
    if inside == "think" and [tag[0] for tag in tags[-2:]] == ["answer", "/answer"] and not text[tags[-1][2] :].strip():
        thinks.append((start, tags[-2][1]))
        answers.append((tags[-2][2], tags[-1][1]))
        faults.add("unclosed_think")
    elif inside:
        faults.add("truncated")
        (thinks if inside == "think" else answers).append((start, len(text)))
    elif text[start:].strip():
        faults.add("extra_text")
    return thinks, answers, rest, faults


def _read_answer(block: str, cut: bool, n: int, faults: set[str]) -> tuple[int, ...] | None:
    """The ids in an answer block, None if it has neither list nor id; adds the faults of its form."""
    whole = _PARTIAL_TAG.sub("", block) if cut else block
    if whole.strip() and not (_CUT_LIST if cut else _LIST).fullmatch(whole):
        faults.add("extra_text")
    ids, others = read_ids(whole, n, cut and whole == block)
    if others:
        faults.add("other_numbers")
    return tuple(x.value for x in ids) if ids or 0 <= whole.find("[") < whole.rfind("]") else None


def _read_untagged(region: str, n: int, after_think: bool, faults: set[str]) -> tuple[int, ...] | None:
    """The ids of an answer that stands in a text without tags; adds faults."""
    contained = [found[-1] for pattern in (_BOXED, _FENCED, _BARE_LIST) if (found := pattern.findall(region))]
    cut = not contained and region.rfind("[") > region.rfind("]")
    ids, others = read_ids(contained[0] if contained else region, n, cut)
    values = tuple(x.value for x in ids)
    complete = len(set(values)) == n == len(values) and {min(values), max(values)} in ({1, n}, {0, n - 1})
    only_ids = WORDS_OF_ANSWERS.issuperset(word.lower() for word in _WORD.findall(region))
    numbered = after_think and complete and others and "\n" in region
    if not values or not (only_ids or numbered or (contained and (after_think or complete))):
        return None
    faults |= {"untagged"} | ({"other_numbers"} if others else set()) | ({"truncated"} if cut else set())
    return values
