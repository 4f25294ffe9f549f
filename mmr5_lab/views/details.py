"""HTML of what a browser shows of one question: pages with their evidence, reasons, outcomes and rewards."""

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from mmr5_lab.corpus.ids import page_id
from mmr5_lab.evaluation.errors import HIT
from mmr5_lab.html import GOLD_MARK, data_url, escape_html
from mmr5_lab.prompting.reasons import reasons_in_order

# how an outcome is marked: no order of the candidates would help with the "even" ones
OUTCOME_MARKS = {HIT: "good", "candidate miss": "even", "ambiguous gold": "even"}


def question_head(question: pd.Series) -> str:
    """Return a question with its document, domain, types, gold pages and answer."""
    pages = ", ".join(str(page + 1) for page in question["gold_pages"])
    facts = [question["doc_name"], question["domain"], ", ".join(question["type"]), f"gold: page {pages}"]
    facts += [f"answer: {question['answer']}"] if question["answer"] else []
    return f"<h3>{escape_html(question['question'])}</h3>{facts_line(filter(None, facts), 'meta')}"


def facts_line(facts: Iterable[str], kind: str = "facts") -> str:
    """Return plain texts in a line of small print."""
    return f'<p class="{kind}">{escape_html(" · ".join(facts))}</p>'


def run_head(name: str, row: Mapping[str, Any], outcome: pd.Series) -> str:
    """Return a run's name, its outcome for a question, and the rewards and cost of its answer."""
    word, change = outcome["outcome"], outcome["change"]
    against = f"a {'gain' if change > 0 else 'loss'} against the retriever" if change else ""
    rewards = [key for key in row if key.endswith("_reward")]
    shapes = {key: f"{reward_name(key)} reward {{}}" for key in rewards}
    shapes |= {"tokens": "{} tokens", "seconds": "{:.2f} s", "stability": "stability {:.2f}"}
    known = {key: row[key] for key in shapes if pd.notna(row.get(key))}
    facts = [shapes[key].format(meter(value) if key in rewards else value) for key, value in known.items()]
    facts += [f"faults: {escape_html(', '.join(row['faults']))}"] if row["faults"] else []
    return (
        f"<h4>{escape_html(name)} {badge(OUTCOME_MARKS.get(word, 'bad'), word)} {against}</h4>"
        f'<p class="facts">{" · ".join(facts)}</p>'
    )


def run_cards(question: pd.Series, row: Mapping[str, Any]) -> str:
    """Return the pages in a run's order, and beside each what the reasoning says of it."""
    order = [row["candidates"].index(page) for page in row["pages"]]
    reasons = reasons_in_order(row.get("think"), order, row.get("shown"))
    places = [
        (f"{rank + 1}", f"{'▲' if rank < k else '▼' if rank > k else '='} from {k + 1}") for rank, k in enumerate(order)
    ]
    return cards(question, row["pages"], places, reasons)


def cards(question: pd.Series, pages: Sequence[int], places: Sequence[tuple[str, str]], reasons: Sequence[str]) -> str:
    """Return pages below each other; beside each its place (in bold, and more about it) and a reason."""
    said = [
        f"<p>{escape_html(text)}</p>" if text else '<p class="silent">nothing said of this page</p>' for text in reasons
    ]
    items = "".join(
        f'<li>{page_button(question, page)}<div><span class="place"><span class="rank">{place}</span> '
        f"{more} · page {page + 1}{star(question, page)}</span>{reason}</div></li>"
        for page, (place, more), reason in zip(pages, places, said, strict=True)
    )
    return f'<ol class="cards">{items}</ol>'


def strip(
    question: pd.Series,
    pages: Sequence[int],
    title: str,
    notes: Sequence[str] | None = None,
    more: str = "",
    over: Sequence[str] | None = None,
) -> str:
    """Return pages side by side; below each its place, or a note (HTML); more: HTML beside the title.

    over: HTML laid over each page
    """
    shown = zip(pages, over or [""] * len(pages), notes or map(str, range(1, len(pages) + 1)), strict=True)
    items = "".join(
        f"<li>{page_button(question, page, above)}{note}{star(question, page)}</li>" for page, above, note in shown
    )
    return f'<h4>{escape_html(title)} {more}</h4><ol class="strip">{items}</ol>'


def heat(maps: Sequence[np.ndarray]) -> list[str]:
    """Return images to lay over a question's pages, darker where a patch is more like one of its words than most are.

    maps: (words, rows, columns) of each page, as of `ColQwenEncoder.heat_map`; all are drawn to the same scale
    """
    strengths = [(words - np.median(words, axis=(1, 2), keepdims=True)).max(0).clip(0) for words in maps]
    scale = max(1e-9, *(strength.max() for strength in strengths))
    images = []
    for strength in strengths:
        pixels = np.zeros((*strength.shape, 4), np.uint8)
        pixels[..., :3], pixels[..., 3] = (213, 94, 0), 200 * strength / scale  # Wong's vermilion
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        images.append(f'<img class="heat" alt="" src="{data_url(file.getvalue(), "png")}">')
    return images


def page_button(question: pd.Series, page: int, over: str = "") -> str:
    """Return a thumbnail that can be enlarged, with the evidence on it framed; over: HTML laid over it."""
    gold = page in question["gold_pages"]
    title = escape_html(f"{question['doc_name']}, page {page + 1}{' (gold)' if gold else ''}")
    return (
        f'<button type="button" class="page{" gold" if gold else ""}" data-title="{title}"'
        f' aria-label="Enlarge {title}"><img data-page="{page_id(question["doc_name"], page)}" alt="{title}">'
        f"{over}{''.join(_boxes(question['boxes'], page))}</button>"
    )


def _boxes(boxes: Iterable[Any], page: int) -> Iterator[str]:
    """Frames of the evidence on a page, in per cent of its size; annotations that are not boxes are left out."""
    for box in boxes:
        try:
            (width, height), (left, top, right, bottom) = box["page_size"], box["bbox"]
            edges = {"left": left / width, "top": top / height,
                     "width": (right - left) / width, "height": (bottom - top) / height}  # fmt: skip
            if box["page"] == page:
                style = "; ".join(f"{name}: {100 * share:.2f}%" for name, share in edges.items())
                yield f'<span class="box" style="{style}"></span>'
        except (KeyError, TypeError, ValueError, ZeroDivisionError):
            continue


def as_written(text: str | None) -> str:
    """Return a model's text as it wrote it, to be unfolded."""
    return folded("As written", text) if text else '<p class="silent">ranked by scores, without text</p>'


def folded(title: str, text: str) -> str:
    """Return a text that is unfolded by a click on its title."""
    return f"<details><summary>{title}</summary><pre>{escape_html(text)}</pre></details>"


def badge(mark: str, word: str) -> str:
    """Return a word with its mark, ✓, ✗ or •."""
    return f'<span class="badge {mark}">{escape_html(word)}</span>'


def star(question: pd.Series, page: int) -> str:
    """Return the mark of a gold page, "" for another."""
    return f' <span class="star">{GOLD_MARK} gold</span>' if page in question["gold_pages"] else ""


def meter(value: float) -> str:
    """Return a number, and beside it a bar that is full at 1."""
    width = 100 * min(1.0, max(0.0, float(value)))
    return f'{value:.2f} <span class="meter"><i style="width: {width:.0f}%"></i></span>'


def reward_name(column: str) -> str:
    """Return what a column of rewards is called: "rank" for "rank_reward"."""
    return escape_html(column.removesuffix("_reward").replace("_", " "))
