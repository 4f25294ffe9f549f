"""Check whether traces are fit to learn from: faults of each, near-duplicates, a report, statistics, a dataset card.

The checks read words, not meaning: a rejected trace is kept with its faults, so that a wrong verdict costs nothing.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pandas as pd

from mmr5_lab.prompting.answers import parse_ranking
from mmr5_lab.prompting.verdicts import REFUSAL, verdict

FAULTS = {
    "empty": "nothing is said about a page",
    "refusal": "the teacher declines, or has not seen the page",
    "label_leaked": "the label is named as such; the student will not be given one",
    "contradicts_label": 'the verdict is the opposite of the label, such as "cannot" for a positive',
    "wrong_image": "another image's number, or a line that is missing or out of order",
    "too_long": "more words than allowed about a page",
    "near_duplicate": "nearly the words of an earlier trace on another question",
}
MAX_WORDS = 60  # about a page. The prompt asks for 40; models count badly, so half as many again pass

_LINE = re.compile(r"Image (\d+): ?(.*)")
_IMAGE = re.compile(r"\bimages? (?:no\. ?|number |#)?(\d+)", re.IGNORECASE)
_QUOTE = re.compile(r'["“]([^"”]*)["”]')
_LEAK = re.compile(
    r"\bground[- ]truth\b|\bgold(?:en)? (?:page|label|image|answer|standard)\b|\bhard negative\b"
    r"|\b(?:positive|negative) (?:image|page|sample|example|candidate|label|instance)\b"
    r"|\b(?:label(?:l?ed)?|marked|annotated|classified|tagged) (?:it |this |them )?as (?:a |an |the |being )?"
    r"(?:positive|negative|relevant|irrelevant|correct|incorrect|right|wrong)\b"
    r"|\b(?:the|its|this|given|provided) label (?:says|is|indicates|states|shows|tells)\b"
    r"|\b(?:I was|I am|as I was|as) told (?:that|to)\b|\baccording to the (?:label|prompt|instructions?)\b",
    re.IGNORECASE,
)


def faults_of(trace: dict[str, Any], page_texts: Sequence[str] = (), max_words: int = MAX_WORDS) -> list[str]:
    """Return the faults that a trace has by itself, names from `FAULTS` ("near_duplicate" needs the other traces).

    page_texts: the words of each page; what stands there, or in the question, may be quoted without being a fault
    max_words: words about a page; a refined trace may have as many for the gold pages, and for the others
    """
    texts = [*page_texts, *[""] * (len(trace["images"]) - len(page_texts))]
    faults = set((_refined_faults if trace.get("refined") else _line_faults)(trace, texts, max_words))
    return [fault for fault in FAULTS if fault in faults]


def think_of(trace: dict[str, Any]) -> str:
    """Return the reasoning of a trace."""
    return parse_ranking(trace["messages"][-1]["content"], len(trace["images"])).think or ""


def near_duplicates(traces: Sequence[dict[str, Any]], threshold: float = 0.9) -> dict[int, int]:
    """Return the places of traces whose reasoning nearly repeats an earlier one on another question, with its place.

    Nearly: the sets of three words in a row have a Jaccard similarity of at least `threshold`. Traces on the same
    question, or one of the same words, do not count: orders of its pages repeat each other on purpose. In time about
    linear in the traces (MinHash with locality-sensitive hashing, datasketch).
    """
    from datasketch import MinHash, MinHashLSH  # with scipy, 60 MB that nobody needs who looks at traces

    index = MinHashLSH(threshold=threshold - 0.05, num_perm=64)
    sets: list[frozenset[str]] = []
    repeats: dict[int, int] = {}
    for place, trace in enumerate(traces):
        words = re.findall(r"\w+", think_of(trace).lower())
        shingles = frozenset(" ".join(words[k : k + 3]) for k in range(max(1, len(words) - 2)))
        sketch = MinHash(num_perm=64)
        sketch.update_batch([shingle.encode() for shingle in shingles])
        sets.append(shingles)
        for other in sorted(index.query(sketch)):
            same = trace["query_id"] == traces[other]["query_id"] or trace["query"] == traces[other]["query"]
            if not same and len(shingles & sets[other]) >= threshold * len(shingles | sets[other]):
                repeats[place] = other
                break
        else:
            index.insert(place, sketch)
    return repeats


def report(accepted: Sequence[dict[str, Any]], rejected: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Return a row a fault that occurs: traces that have it, their share of all, what it means, and an example.

    The first row counts the accepted. A trace with two faults counts twice.
    """
    total = max(1, len(accepted) + len(rejected))
    groups = {fault: [trace for trace in rejected if fault in trace["faults"]] for fault in FAULTS}
    rows = [
        (fault, len(traces), len(traces) / total, FAULTS.get(fault, ""), _example(traces))
        for fault, traces in {"accepted": accepted, **groups}.items()
        if traces or fault == "accepted"
    ]
    return pd.DataFrame(rows, columns=["fault", "traces", "share", "meaning", "example"]).set_index("fault")


def statistics(traces: Sequence[dict[str, Any]]) -> pd.Series:
    """Return what a set of traces holds: counts, means, and words of reasoning (median, 95th percentile, most)."""
    words = pd.Series([len(think_of(trace).split()) for trace in traces], dtype=float)
    first = pd.Series([trace["positive_ids"][0] for trace in traces if trace["positive_ids"]], dtype=float)
    return pd.Series({
        "traces": len(traces),
        "questions": len({trace["query_id"] for trace in traces}),
        "documents": len({trace["doc_name"] for trace in traces}),
        "pages a trace": pd.Series([len(trace["images"]) for trace in traces], dtype=float).mean(),
        "right pages a trace": pd.Series([len(trace["positive_ids"]) for trace in traces], dtype=float).mean(),
        "first right page is image 1": (first == 1).mean(),
        "words of reasoning, median": words.median(),
        "words of reasoning, 95 %": words.quantile(0.95),
        "words of reasoning, most": words.max(),
    }, name="value").astype(float)  # fmt: skip


def dataset_card(accepted: Sequence[dict[str, Any]], rejected: Sequence[dict[str, Any]], name: str = "Traces") -> str:
    """Return a dataset card in Markdown with the hub's YAML header; licence and languages are left to be filled in."""
    teachers, prompts = (
        ", ".join(sorted({str(trace[key]) for trace in accepted})) or "none" for key in ("teacher", "prompt_version")
    )
    facts = "\n".join(f"| {key} | {value:g} |" for key, value in statistics(accepted).round(3).items())
    faults = "\n".join(
        f"| {fault} | {row['traces']} | {row['share']:.1%} | {row['meaning']} |"
        for fault, row in report(accepted, rejected).iterrows()
    )
    return f"""---
pretty_name: {name}
task_categories: [visual-document-retrieval, text-ranking]
tags: [mm-r5, reasoning, reranking]
license: other  # that of the documents; fill in
---

# {name}

Reasoning traces that teach a vision-language model to rank document pages, in the way of MM-R5 (arXiv 2506.12364): a
question, its candidate pages as images, a teacher's reasoning, and the ranking with the right pages first.

- Teacher: {teachers}. Prompt texts: version {prompts}. It knew the label: it explains and does not judge.
- Questions whose candidates hold no right page were left out; traces with a fault are kept apart, with the fault.
- Languages, source and licence of the documents: to be filled in by whoever publishes this.

| What | Value |
|---|---|
{facts}

## Checks, which read words, not meaning

| | Traces | Share | Meaning |
|---|---|---|---|
{faults}
"""


def _line_faults(trace: dict[str, Any], texts: Sequence[str], max_words: int) -> Iterator[str]:
    """Faults of one line `Image i: …` a page."""
    matches = [_LINE.fullmatch(line) for line in think_of(trace).split("\n")]
    if [match and int(match[1]) for match in matches] != list(range(1, len(texts) + 1)):
        yield "wrong_image"
    for place, match in enumerate(matches[: len(texts)], 1):
        text = match[2] if match else ""
        sources = [trace["query"], texts[place - 1]]
        yield from _text_faults(text, max_words, sources)
        quotable = _comparable(sources)  # pages have figures of their own called images
        own = text
        for quote in _QUOTE.findall(text):
            own = own.replace(quote, "") if _comparable([quote]) in quotable else own
        if any(int(number) != place for number in _IMAGE.findall(own)):
            yield "wrong_image"
        if verdict(text) is (place not in trace["positive_ids"]):
            yield "contradicts_label"


def _refined_faults(trace: dict[str, Any], texts: Sequence[str], max_words: int) -> Iterator[str]:
    """Faults of the two sentences: each gold image is named, none that is not there, each with its own verdict."""
    think, positives = think_of(trace), set(trace["positive_ids"])
    yield from _text_faults(think, 2 * max_words, [trace["query"], *texts])
    named: set[int] = set()
    for sentence in re.split(r"(?<=[.!?])\s+", think):
        lists = re.findall(r"\bimages?\b[ \d,and]*", sentence, re.IGNORECASE)
        ids = {int(number) for number in re.findall(r"\d+", " ".join(lists))}
        named |= ids
        helps = verdict(sentence)
        if ids and ((ids <= positives and helps is False) or (not ids & positives and helps is True)):
            yield "contradicts_label"
    if named - set(range(1, len(texts) + 1)) or positives - named:
        yield "wrong_image"


def _text_faults(text: str, max_words: int, sources: Iterable[str]) -> Iterator[str]:
    """Faults of a text whatever page it is about; `sources` may be quoted."""
    if not re.search(r"\w", text):
        yield "empty"
    if len(text.split()) > max_words:
        yield "too_long"
    if REFUSAL.search(text):
        yield "refusal"
    quotable = _comparable(sources)
    if any(_comparable([leak[0]]) not in quotable for leak in _LEAK.finditer(text)):
        yield "label_leaked"


def _comparable(texts: Iterable[str]) -> str:
    """Texts as quotes are compared with them: lower case, single spaces, one kind of quotation mark."""
    return " ".join(" ".join(texts).lower().replace('"', "'").split())


def _example(traces: Sequence[dict[str, Any]]) -> str:
    return f"{traces[0]['query_id']}: {think_of(traces[0])[:120]}" if traces else ""
