"""Look at what rerankers did, beside the pages that they looked at.

    runs = {name: pd.read_parquet(f"{name}.generations.parquet") for name in ("SFT", "SFT + RL")}
    reasoning_browser(corpus, runs)                      # in JupyterLab
    reasoning_browser(corpus, runs).twin().save("look.html")   # the same in one file

Each function returns a `browser.Browser`: a list of questions (or groups of completions) with filters, and what there
is to see of the one selected. `twin()` is the same as a static page. All texts are escaped and control characters made
visible, whoever wrote them.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from mmr5_lab.corpus.documents import Corpus
from mmr5_lab.corpus.ids import page_id
from mmr5_lab.evaluation.comparison import compare, presented
from mmr5_lab.evaluation.errors import HIT, classify, records
from mmr5_lab.evaluation.gold_ranks import first_few
from mmr5_lab.html import GOLD_MARK, escape_html, html_table
from mmr5_lab.prompting.answers import parse_ranking
from mmr5_lab.prompting.prompts import asked_question, content_text
from mmr5_lab.prompting.reasons import reasons_in_order
from mmr5_lab.traces.quality import FAULTS
from mmr5_lab.views.browser import Browser, Row

NONE = "(none)"
# how an outcome is marked: nothing that a reranker does would help with the middle ones
_MARKS = {HIT: "good", "candidate miss": "even", "ambiguous gold": "even"}


def reasoning_browser(corpus: Corpus, runs: Mapping[str, pd.DataFrame]) -> Browser:
    """What one or more runs said of each question's pages, side by side.

    runs: name -> generations, as `rerank_run.rerank_run` writes them, all of the same questions

    Shown of a question: the candidates in the retriever's order; for each run its order, and beside each page what the
    reasoning says of it; gold pages with a star and their evidence framed; outcome (`analysis.classify`), faults,
    rewards, tokens, seconds; the text as it was written. Filters: domain, type, outcome and fault by run, and for a
    single run its gains and losses against the retriever.

    Raises ValueError for no runs, runs of different questions, and generations as `analysis.classify` does.
    """
    systems = _systems(corpus, runs)
    single = len(systems) == 1
    facets = ["Domain", "Type"]
    for name in systems:
        facets += ["Outcome", "Fault"] if single else [f"{name}: outcome", f"{name}: fault"]
    facets += ["Against the retriever"] if single else []

    def row(k: int, question: pd.Series) -> Row:
        values = _who(question)
        for system in systems.values():
            values += [[system.outcomes["outcome"][k]], list(system.outcomes["faults"][k]) or [NONE]]
        values += [[_change(system.outcomes["change"][k])]] if single else []
        outcomes = [system.outcomes["outcome"][k] for system in systems.values()]
        return _question_row(question, outcomes, systems, k, values)

    def render(k: int) -> str:
        question = corpus.by_id[questions[k]]
        return _side_by_side(question, systems, k, lambda name, row: _cards(question, row))

    questions = next(iter(systems.values())).outcomes["question_id"].tolist()
    rows = [row(k, corpus.by_id[question]) for k, question in enumerate(questions)]
    return Browser(f"Reasoning of {' and '.join(systems)}", facets, rows, render, corpus)


def run_comparison(
    corpus: Corpus, runs: Mapping[str, pd.DataFrame], baseline: str | None = None, samples: int = 10_000
) -> Browser:
    """Where runs differ at rank 1: `compare.compare`'s table above, then question by question each run's order.

    runs: two or more, as `reasoning_browser` takes them; baseline: what the others are held against (default: the
    first); samples: of the table's intervals and tests

    Filters: domain, type, and for each other run whether it is better or worse than the baseline. Raises like
    `reasoning_browser` and for fewer than two runs or an unknown baseline.
    """
    if len(runs) < 2:
        raise ValueError(f"a comparison needs at least two runs, not {len(runs)}")
    systems = _systems(corpus, runs)
    first = next(iter(runs)) if baseline is None else baseline
    if first not in systems:
        raise ValueError(f"the baseline {first!r} is not among the runs: {', '.join(map(repr, runs))}")
    others = [name for name in systems if name != first]
    questions = systems[first].outcomes["question_id"].tolist()
    scores = {name: system.outcomes["R@1"] for name, system in systems.items()}

    def row(k: int, question: pd.Series) -> Row:
        against = [_better(scores[name][k], scores[first][k]) for name in others]
        outcomes = [system.outcomes["outcome"][k] for system in systems.values()]
        return _question_row(question, outcomes, systems, k, [*_who(question), *([word] for word in against)])

    def render(k: int) -> str:
        question = corpus.by_id[questions[k]]
        return _side_by_side(question, systems, k, lambda name, row: _strip(question, row["pages"], f"Order of {name}"))

    rankings = {
        name: {question: row["pages"] for question, row in system.rows.items()} for name, system in systems.items()
    }
    part = corpus.with_questions(questions)
    heading = _matrices(scores, first, others)
    if len(set(part.questions["doc_name"])) > 1:
        table = compare(rankings, part, first, samples=samples)
        shown = presented(table).filter(regex="^micro|interval|difference|^p$")
        heading = html_table(shown, table.attrs["note"]) + heading
    else:
        heading += "<p>All questions are of one document: no intervals and tests, which resample documents.</p>"
    facets = ["Domain", "Type", *(f"{name} against {first}" for name in others)]
    rows = [row(k, corpus.by_id[question]) for k, question in enumerate(questions)]
    return Browser(f"{', '.join(others)} against {first}", facets, rows, render, corpus, heading)


def order_browser(corpus: Corpus, orders: pd.DataFrame, figure: str = "") -> Browser:
    """How a ranking changes with the order in which the candidates are shown.

    orders: what `audit.order_audit` returns; figure: HTML above the list, such as `plots.position_curve(…).to_html()`

    Shown of a question: for each order of the candidates, the pages as they were shown and each one's rank. Filters:
    domain, type, whether the top page changes, how often it is right.
    """
    by_question = dict(list(orders.groupby("question_id", sort=False)))
    questions = list(by_question)

    def row(question: pd.Series, turns: pd.DataFrame) -> Row:
        tops = [pages[0] for pages in turns["pages"]]
        right = sum(page in question["gold_pages"] for page in tops)
        often = "always right" if right == len(tops) else "never right" if not right else "sometimes right"
        changes = "the same in all orders" if len(set(tops)) == 1 else f"{len(set(tops))} different"
        mark = "good" if right == len(tops) else "bad" if not right else "even"
        note = f"{question['doc_name']} · top page: {changes}"
        values = [*_who(question), [changes], [often]]
        return Row(
            mark, f"right {right} of {len(tops)}", question["question"], note, _find(question, turns["text"]), values
        )

    def render(k: int) -> str:
        question = corpus.by_id[questions[k]]
        parts = []
        for number, turn in enumerate(records(by_question[questions[k]])):
            ranks = {page: rank for rank, page in enumerate(turn["pages"], 1)}
            notes = [f'<span class="rank">{ranks[page]}</span>' for page in turn["candidates"]]
            top = turn["pages"][0]
            told = f'<span class="place">first: page {top + 1}{_star(top in question["gold_pages"])}</span>'
            title = "The retriever's order" if number == 0 else f"Order {number + 1}"
            parts.append(f"<section>{_strip(question, turn['candidates'], title, notes, told)}</section>")
        hint = '<p class="facts">Pages from left to right as they were shown; below each, where it was ranked.</p>'
        return f"{_head(question)}{hint}{''.join(parts)}"

    rows = [row(corpus.by_id[question], turns) for question, turns in by_question.items()]
    return Browser(
        "Candidates in other orders", ["Domain", "Type", "Top page", "At rank 1"], rows, render, corpus, figure
    )


def completion_viewer(completions: pd.DataFrame, figure: str = "") -> Browser:
    """What a model wrote while it was trained: the groups of completions of every GRPO step, with what each was paid.

    completions: `training_log.completions` of a run: step, prompt, completion, a column a reward, advantage

    Raises ValueError where columns are missing or there are no rows.
    """
    lacking = [name for name in ("step", "prompt", "completion", "advantage") if name not in completions]
    if lacking:
        raise ValueError(
            f"the completions lack the columns {', '.join(lacking)}: give what training_log.completions reads"
        )
    if completions.empty:
        raise ValueError("there are no completions: train a step first")
    rewards = [name for name in completions if name.endswith("_reward")]
    frame = completions.assign(prompt=completions["prompt"].map(_text), text=completions["completion"].map(_text))
    new = (frame["step"] != frame["step"].shift()) | (frame["prompt"] != frame["prompt"].shift())
    groups = [group for _, group in frame.groupby(new.cumsum(), sort=False)]

    def row(group: pd.DataFrame) -> Row:
        total = group[rewards].sum(axis=1)
        spread = "all alike" if np.ptp(total.to_numpy()) < 1e-9 else "differ"
        best = ", ".join(f"{_name(name)} {group[name].mean():.2f}" for name in rewards)
        step = int(group["step"].iloc[0])
        return Row("even", f"step {step}", _question_in(group["prompt"].iloc[0]), best,
                   " ".join([group["prompt"].iloc[0], *group["text"]]), [[str(step)], [spread]])  # fmt: skip

    def render(k: int) -> str:
        group = groups[k].sort_values("advantage", ascending=False, kind="stable")
        cards = []
        for record in group.to_dict("records"):
            paid = " ".join(f"{escape_html(_name(name))} {record[name]:.2f} {_meter(record[name])}" for name in rewards)
            think = parse_ranking(record["text"], 1).think or ""
            rest = record["text"].replace(f"<think>{think}</think>", "", 1) if think else record["text"]
            cards.append(
                f'<li><div><h4><span class="rank">advantage {_signed(record["advantage"])}</span> {paid}</h4>'
                f"<p>{escape_html(think)}</p><pre>{escape_html(rest)}</pre></div></li>"
            )
        prompt = group["prompt"].iloc[0]
        return (
            f"<h3>{escape_html(_question_in(prompt))}</h3>"
            f'<p class="meta">step {int(group["step"].iloc[0])}, {len(group)} completions of one prompt, best first</p>'
            f'<ol class="cards">{"".join(cards)}</ol><details><summary>Prompt</summary><pre>{escape_html(prompt)}</pre>'
            "</details>"
        )

    return Browser("Completions while training", ["Step", "Rewards"], [row(g) for g in groups], render, None, figure)


def trace_browser(
    corpus: Corpus, accepted: Sequence[Mapping[str, Any]], rejected: Sequence[Mapping[str, Any]] = ()
) -> Browser:
    """Reasoning traces beside the pages that they are about, in the order that the student sees them.

    accepted, rejected: what `traces.read_traces` reads of a file and of its `rejected_path`, made from this corpus

    Filters: domain, type, what the checks said (a fault, or accepted), place of the first right page. Raises ValueError
    for no traces, and CorpusError where the corpus does not have a trace's question.
    """
    traces = [*accepted, *rejected]
    if not traces:
        raise ValueError("there are no traces to look at")
    corpus.with_questions({trace["query_id"] for trace in traces})  # raises for unknown ones

    def row(trace: Mapping[str, Any]) -> Row:
        question = corpus.by_id[trace["query_id"]]
        faults = list(trace.get("faults", ()))
        note = f"{question['doc_name']} · {trace['teacher']}"
        place = str(min(trace["positive_ids"], default=NONE))
        return Row("bad" if faults else "good", ", ".join(faults) or "accepted", question["question"], note,
                   _find(question, [trace["messages"][-1]["content"]]),
                   [*_who(question), faults or ["accepted"], [place]])  # fmt: skip

    def render(k: int) -> str:
        trace = traces[k]
        question, completion = corpus.by_id[trace["query_id"]], trace["messages"][-1]["content"]
        pages = trace["candidates"]
        reasons = reasons_in_order(parse_ranking(completion, len(pages)).think, range(len(pages)))
        faults = "".join(
            f'<li><span class="badge bad">{escape_html(fault)}</span> {escape_html(FAULTS.get(fault, ""))}</li>'
            for fault in trace.get("faults", ())
        )
        repeats = f'<p class="facts">repeats {escape_html(trace["repeats"])}</p>' if trace.get("repeats") else ""
        cards = "".join(
            f'<li>{_page(question, page)}<div><span class="place"><span class="rank">Image {i}</span> · page {page + 1}'
            f"{_star(i in trace['positive_ids'])}</span>{_said(reason)}</div></li>"
            for i, (page, reason) in enumerate(zip(pages, reasons, strict=True), 1)
        )
        written = _written({"text": completion})
        return f'{_head(question)}<ol>{faults}</ol>{repeats}<ol class="cards">{cards}</ol>{written}'

    facets = ["Domain", "Type", "Checks", "First right image"]
    title = f"Traces: {len(accepted)} accepted, {len(rejected)} rejected"
    return Browser(title, facets, [row(trace) for trace in traces], render, corpus)


@dataclass(frozen=True)
class _System:
    """A run: what `classify` says, and its rows by question, lists as lists."""

    outcomes: pd.DataFrame
    rows: dict[str, dict[str, Any]]


def _systems(corpus: Corpus, runs: Mapping[str, pd.DataFrame]) -> dict[str, _System]:
    if not runs:
        raise ValueError("there are no runs to look at: give {name: generations, …}")
    systems = {}
    for name, frame in runs.items():
        try:
            outcomes = classify(frame, corpus.with_questions(frame.get("question_id", ())))
        except ValueError as error:
            raise ValueError(f"run {name!r}: {error}") from None
        systems[name] = _System(outcomes, {row["question_id"]: row for row in records(frame)})
    (first, one), *others = systems.items()
    for name, other in others:
        if apart := [q for q in {**one.rows, **other.rows} if (q in one.rows) != (q in other.rows)]:
            raise ValueError(f"only one of {first!r} and {name!r} has the questions {first_few(apart)}: rank the same")
    return systems


def _side_by_side(
    question: pd.Series, systems: Mapping[str, _System], k: int, pages: Callable[[str, dict[str, Any]], str]
) -> str:
    """The k-th question and a section a run, in which `pages` (of its name and row) shows how it ranked."""
    rows = {name: system.rows[question["question_id"]] for name, system in systems.items()}
    shared, own = _candidates(question, rows)
    parts = [
        f"<section>{_told(name, row, systems[name].outcomes.loc[k])}{own[name]}{pages(name, row)}"
        f"{_written(row)}</section>"
        for name, row in rows.items()
    ]
    return f'{_head(question)}{shared}<div class="runs">{"".join(parts)}</div>'


def _question_row(
    question: pd.Series, outcomes: Sequence[str], systems: Mapping[str, _System], k: int, values: list[list[str]]
) -> Row:
    """The line of a question: what became of it in each run, marked by the last one."""
    texts = [system.rows[question["question_id"]]["text"] for system in systems.values()]
    note = f"{question['doc_name']} · {question['domain']}"
    return Row(_MARKS.get(outcomes[-1], "bad"), " → ".join(outcomes), question["question"], note,
               _find(question, texts), values)  # fmt: skip


def _find(question: pd.Series, texts: Iterable[str | None]) -> str:
    named = [question[name] for name in ("question", "answer", "doc_name", "domain")]
    return " ".join(str(text) for text in (*named, *texts) if text)


def _who(question: pd.Series) -> list[list[str]]:
    return [[question["domain"]], list(question["type"]) or [NONE]]


def _change(change: float) -> str:
    return "gain" if change > 0 else "loss" if change < 0 else "the same"


def _better(score: float, than: float) -> str:
    return "better" if score > than else "worse" if score < than else "the same"


def _head(question: pd.Series) -> str:
    pages = ", ".join(str(page + 1) for page in question["gold_pages"])
    told = [question["doc_name"], question["domain"], ", ".join(question["type"]),
            f"right: page {pages}", f"answer: {question['answer']}" if question["answer"] else ""]  # fmt: skip
    return (
        f"<h3>{escape_html(question['question'])}</h3>"
        f'<p class="meta">{escape_html(" · ".join(part for part in told if part))}</p>'
    )


def _told(name: str, row: Mapping[str, Any], outcome: pd.Series) -> str:
    """A run's name, what became of the question, and what the answer was paid and cost."""
    rewards = [name for name in row if name.endswith("_reward") and pd.notna(row[name])]
    facts = [f"{_name(name)} reward {row[name]:.2f} {_meter(row[name])}" for name in rewards]
    facts += [f"{row['tokens']} tokens"] if pd.notna(row.get("tokens")) else []
    facts += [f"{row['seconds']:.2f} s"] if pd.notna(row.get("seconds")) else []
    facts += [f"stability {row['stability']:.2f}"] if pd.notna(row.get("stability")) else []
    facts += [f"faults: {escape_html(', '.join(row['faults']))}"] if row["faults"] else []
    word = outcome["outcome"]
    against = "" if (change := _change(outcome["change"])) == "the same" else f"a {change} against the retriever"
    badge = f'<span class="badge {_MARKS.get(word, "bad")}">{escape_html(word)}</span>'
    return f'<h4>{escape_html(name)} {badge} {against}</h4><p class="facts">{" · ".join(facts)}</p>'


def _candidates(question: pd.Series, rows: Mapping[str, Mapping[str, Any]]) -> tuple[str, dict[str, str]]:
    """The retriever's order: once, where all runs had the same candidates, else one for each run."""
    title = "Candidates in the retriever's order"
    strips = {name: _strip(question, row["candidates"], title) for name, row in rows.items()}
    if len({tuple(row["candidates"]) for row in rows.values()}) == 1:
        return next(iter(strips.values())), dict.fromkeys(rows, "")
    return "", strips


def _strip(
    question: pd.Series, pages: Sequence[int], title: str, notes: Sequence[str] | None = None, told: str = ""
) -> str:
    """Pages side by side; below each its place, or a note (HTML)."""
    notes = [str(place) for place in range(1, len(pages) + 1)] if notes is None else notes
    items = "".join(
        f"<li>{_page(question, page)}{note}{_star(page in question['gold_pages'])}</li>"
        for page, note in zip(pages, notes, strict=True)
    )
    return f'<h4>{escape_html(title)} {told}</h4><ol class="strip">{items}</ol>'


def _cards(question: pd.Series, row: Mapping[str, Any]) -> str:
    """Pages in the run's order, beside each what the reasoning says of it."""
    candidates, pages = row["candidates"], row["pages"]
    order = [candidates.index(page) for page in pages]
    items = []
    reasons = reasons_in_order(row.get("think"), order, row.get("shown"))
    for rank, (page, k, reason) in enumerate(zip(pages, order, reasons, strict=True), 1):
        moved = "▲" if rank < k + 1 else "▼" if rank > k + 1 else "="
        items.append(
            f'<li>{_page(question, page)}<div><span class="place"><span class="rank">{rank}</span> '
            f"{moved} from {k + 1} · page {page + 1}{_star(page in question['gold_pages'])}</span>"
            f"{_said(reason)}</div></li>"
        )
    return f'<ol class="cards">{"".join(items)}</ol>'


def _said(reason: str) -> str:
    return f"<p>{escape_html(reason)}</p>" if reason else '<p class="silent">nothing said of this page</p>'


def _written(row: Mapping[str, Any]) -> str:
    if not row["text"]:
        return '<p class="silent">ranked by scores, without text</p>'
    return f"<details><summary>As written</summary><pre>{escape_html(row['text'])}</pre></details>"


def _page(question: pd.Series, page: int) -> str:
    """A thumbnail that can be enlarged, with the evidence on it framed."""
    gold = page in question["gold_pages"]
    title = escape_html(f"{question['doc_name']}, page {page + 1}{' (right)' if gold else ''}")
    key = page_id(question["doc_name"], page)
    return (
        f'<button type="button" class="page{" gold" if gold else ""}" data-title="{title}"'
        f' aria-label="Enlarge {title}"><img data-page="{key}" alt="{title}">'
        f"{''.join(_boxes(question['boxes'], page))}</button>"
    )


def _boxes(boxes: Iterable[Any], page: int) -> Iterator[str]:
    """Frames of the evidence on a page, in per cent of its size; annotations that are not boxes are left out."""
    for box in boxes:
        try:
            here, (width, height), (left, top, right, bottom) = box["page"], box["page_size"], box["bbox"]
            edges = [100 * float(v) / float(size) for v, size in zip((left, top, right - left, bottom - top),
                     (width, height, width, height), strict=True)]  # fmt: skip
        except (KeyError, TypeError, ValueError, ZeroDivisionError):
            continue
        if here == page:
            style = "; ".join(
                f"{name}: {v:.2f}%" for name, v in zip(("left", "top", "width", "height"), edges, strict=True)
            )
            yield f'<span class="box" style="{style}"></span>'


def _matrices(scores: Mapping[str, pd.Series], first: str, others: Sequence[str]) -> str:
    """How often each of two systems has a right page first: a small table a pair."""
    tables = []
    for name in others:
        a, b = scores[first] > 0, scores[name] > 0
        counts = pd.DataFrame(
            {f"{name} right": [int((b & a).sum()), int((b & ~a).sum())],
             f"{name} wrong": [int((~b & a).sum()), int((~b & ~a).sum())]},
            index=[f"{first} right", f"{first} wrong"],
        )  # fmt: skip
        tables.append(html_table(counts))
    return "".join(tables)


def _star(gold: bool) -> str:
    return f' <span class="star">{GOLD_MARK} right</span>' if gold else ""


def _meter(share: float) -> str:
    """A number from 0 to 1 as a bar; the number stands beside it."""
    return f'<span class="meter"><i style="width: {100 * min(1.0, max(0.0, float(share))):.0f}%"></i></span>'


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def _name(reward: str) -> str:
    return reward.removesuffix("_reward").replace("_", " ")


def _text(message: Any) -> str:
    """What was written, of a text or of chat messages (their last)."""
    if isinstance(message, str):
        return message
    return content_text(message[-1]["content"])


def _question_in(prompt: str) -> str:
    """The question in a prompt's text; all of it where the template is another."""
    return asked_question(prompt) or prompt
