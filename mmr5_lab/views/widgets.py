"""Look at what rerankers did, beside the pages that they looked at.

    runs = {name: pd.read_parquet(f"{name}.generations.parquet") for name in ("SFT", "SFT + RL")}
    reasoning_browser(corpus, runs)                                     # in JupyterLab
    reasoning_browser(corpus, runs).static_export().save("look.html")   # the same in one file

Each function returns a `browser.Browser`: a list of questions (or groups of completions) with filters, and the details
of the one selected. All texts are escaped and control characters made visible, whoever wrote them.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from mmr5_lab.corpus.documents import Corpus
from mmr5_lab.evaluation.comparison import compare, presented
from mmr5_lab.evaluation.errors import classify, records
from mmr5_lab.evaluation.gold_ranks import first_few
from mmr5_lab.html import escape_html, html_table
from mmr5_lab.prompting.answers import parse_ranking
from mmr5_lab.prompting.prompts import asked_question, content_text
from mmr5_lab.prompting.reasons import reasons_in_order
from mmr5_lab.traces.quality import FAULTS
from mmr5_lab.views.browser import Browser, Row
from mmr5_lab.views.details import (
    OUTCOME_MARKS,
    as_written,
    badge,
    cards,
    facts_line,
    folded,
    heat,
    meter,
    question_head,
    reward_name,
    run_cards,
    run_head,
    star,
    strip,
)

NONE = "(none)"


def reasoning_browser(corpus: Corpus, runs: Mapping[str, pd.DataFrame], encoder: Any = None) -> Browser:
    """Browse what one or more runs said of each question's pages, side by side.

    runs: name -> generations, as `rerank_run` writes them, all of the same questions
    encoder: a `ColQwenEncoder`; then a fold shows where on each page it finds the question's words

    Shown of a question: the candidates in the retriever's order; for each run its order, and beside each page what the
    reasoning says of it; gold pages with a star and their evidence framed; outcome (`errors.classify`), faults,
    rewards, tokens, seconds; the text as it was written. Filters: domain, type, outcome and fault by run, and for a
    single run its gains and losses against the retriever.

    Raises ValueError for no runs, runs of different questions, and generations as `errors.classify` does.
    """
    systems = _systems(corpus, runs)
    filters: dict[str, list[list[str]]] = {}
    for name, outcomes in systems.items():
        outcome, fault = ("Outcome", "Fault") if len(systems) == 1 else (f"{name}: outcome", f"{name}: fault")
        filters[outcome] = [[word] for word in outcomes["outcome"]]
        filters[fault] = [list(faults) or [NONE] for faults in outcomes["faults"]]
        if len(systems) == 1:
            filters["Against the retriever"] = [[_sign(change, "gain", "loss")] for change in outcomes["change"]]
    return _run_browser(
        f"Reasoning of {' and '.join(systems)}",
        corpus,
        systems,
        filters,
        lambda _, *of: run_cards(*of),
        encoder=encoder,
    )


def run_comparison(
    corpus: Corpus, runs: Mapping[str, pd.DataFrame], baseline: str | None = None, samples: int = 10_000
) -> Browser:
    """Browse where runs differ at rank 1: `compare`'s table above, then question by question each run's order.

    runs: two or more, as `reasoning_browser` takes them; baseline: what the others are compared with (default: the
    first); samples: of the table's intervals and tests

    Filters: domain, type, and for each other run whether it is better or worse than the baseline. Raises like
    `reasoning_browser` and for fewer than two runs or an unknown baseline.
    """
    systems = _systems(corpus, runs)
    first = next(iter(runs)) if baseline is None else baseline
    if len(runs) < 2 or first not in systems:
        raise ValueError(
            f"a comparison needs two runs or more, and a baseline among them: {', '.join(map(repr, runs))}"
        )
    recall = {name: outcomes["R@1"] for name, outcomes in systems.items()}
    others = [name for name in systems if name != first]
    filters = {
        f"{name} against {first}": [[_sign(change, "better", "worse")] for change in recall[name] - recall[first]]
        for name in others
    }
    rankings = {
        name: {row["question_id"]: row["pages"] for row in outcomes["row"]} for name, outcomes in systems.items()
    }
    table = compare(rankings, corpus.with_questions(systems[first]["question_id"]), first, samples=samples)
    shown = presented(table).filter(regex="^micro|interval|difference|^p$")
    heading = html_table(shown, table.attrs["note"]) + "".join(_crossed(recall, first, name) for name in others)
    title = f"{', '.join(others)} against {first}"
    return _run_browser(
        title, corpus, systems, filters, lambda name, q, row: strip(q, row["pages"], f"Order of {name}"), heading
    )


def order_browser(corpus: Corpus, orders: pd.DataFrame, figure: str = "") -> Browser:
    """Browse how a ranking changes with the order in which the candidates are shown.

    orders: what `robustness.order_audit` returns; figure: HTML above the list, such as
    `plots.position_curve(…).to_html()`

    Shown of a question: for each order of the candidates, the pages as they were shown and each one's rank. Filters:
    domain, type, whether the top page changes, how often it is gold.
    """
    by_question = {name: records(turns) for name, turns in orders.groupby("question_id", sort=False)}

    def row(question: pd.Series, turns: Sequence[dict[str, Any]]) -> Row:
        tops = [turn["pages"][0] for turn in turns]
        gold = sum(page in question["gold_pages"] for page in tops)
        often, mark = ("always", "good") if gold == len(tops) else ("sometimes", "even") if gold else ("never", "bad")
        changes = "the same in all orders" if len(set(tops)) == 1 else f"{len(set(tops))} different"
        return _question_row(
            question, mark, f"gold in {gold} of {len(tops)}", [turn["text"] for turn in turns],
            [[changes], [f"{often} gold"]], f"top page: {changes}",
        )  # fmt: skip

    def section(question: pd.Series, number: int, turn: Mapping[str, Any]) -> str:
        ranks = [f'<span class="rank">{turn["pages"].index(page) + 1}</span>' for page in turn["candidates"]]
        top = turn["pages"][0]
        first = f'<span class="place">first: page {top + 1}{star(question, top)}</span>'
        title = f"Order {number + 1}" if number else "The retriever's order"
        return f"<section>{strip(question, turn['candidates'], title, ranks, first)}</section>"

    def render(k: int) -> str:
        name = list(by_question)[k]
        question = corpus.by_id[name]
        hint = facts_line(["Pages from left to right in the order of the prompt; below each, its rank."])
        turns = "".join(section(question, number, turn) for number, turn in enumerate(by_question[name]))
        return f"{question_head(question)}{hint}{turns}"

    rows = [row(corpus.by_id[question], turns) for question, turns in by_question.items()]
    facets = ["Domain", "Type", "Top page", "At rank 1"]
    return Browser("Candidates in other orders", facets, rows, render, corpus, figure)


def completion_viewer(completions: pd.DataFrame, figure: str = "") -> Browser:
    """Browse the completions of every GRPO step, in the groups of one prompt, with their rewards and advantages.

    completions: `monitoring.completions` of a run: step, prompt, completion, a column for each reward, advantage

    Raises ValueError where there are no rows.
    """
    if completions.empty:
        raise ValueError("there are no completions: train a step first")
    rewards = [name for name in completions if name.endswith("_reward")]
    frame = completions.assign(prompt=completions["prompt"].map(_text), text=completions["completion"].map(_text))
    new = (frame["step"] != frame["step"].shift()) | (frame["prompt"] != frame["prompt"].shift())
    groups = [group for _, group in frame.groupby(new.cumsum(), sort=False)]

    def row(group: pd.DataFrame) -> Row:
        prompt, step = group["prompt"].iloc[0], str(group["step"].iloc[0])
        spread = "all equal" if np.ptp(group[rewards].sum(axis=1).to_numpy()) < 1e-9 else "differ"
        means = ", ".join(f"{reward_name(name)} {group[name].mean():.2f}" for name in rewards)
        question = asked_question(prompt) or prompt  # all of it where the template is another
        return Row("even", f"step {step}", question, means, " ".join([prompt, *group["text"]]), [[step], [spread]])

    def card(record: Mapping[str, Any]) -> str:
        values = " ".join(f"{reward_name(name)} {meter(record[name])}" for name in rewards)
        think = parse_ranking(record["text"], 1).think or ""
        rest = record["text"].replace(f"<think>{think}</think>", "", 1) if think else record["text"]
        advantage = f"{record['advantage']:+.2f}".replace("-", "−")
        return (
            f'<li><div><h4><span class="rank">advantage {advantage}</span> {values}</h4>'
            f"<p>{escape_html(think)}</p><pre>{escape_html(rest)}</pre></div></li>"
        )

    def render(k: int) -> str:
        group = groups[k].sort_values("advantage", ascending=False, kind="stable")
        about = f"step {group['step'].iloc[0]}, {len(group)} completions of one prompt, best first"
        listed = "".join(map(card, group.to_dict("records")))
        prompt = folded("Prompt", group["prompt"].iloc[0])
        return (
            f'<h3>{escape_html(rows[k].label)}</h3>{facts_line([about], "meta")}<ol class="cards">{listed}</ol>{prompt}'
        )

    rows = list(map(row, groups))
    return Browser("Completions while training", ["Step", "Rewards"], rows, render, None, figure)


def trace_browser(
    corpus: Corpus, accepted: Sequence[Mapping[str, Any]], rejected: Sequence[Mapping[str, Any]] = ()
) -> Browser:
    """Browse reasoning traces beside the pages that they are about, in the order that the student sees them.

    accepted, rejected: what `read_traces` reads of a file and of its `rejected_path`, made from this corpus

    Filters: domain, type, what the checks said (a fault, or accepted), place of the first gold page. Raises ValueError
    for no traces, and CorpusError where the corpus does not have a trace's question.
    """
    traces = [*accepted, *rejected]
    if not traces:
        raise ValueError("there are no traces to look at")
    corpus.with_questions({trace["query_id"] for trace in traces})  # raises for unknown ones

    def row(trace: Mapping[str, Any]) -> Row:
        faults, place = list(trace.get("faults", ())), str(min(trace["positive_ids"], default=NONE))
        return _question_row(
            corpus.by_id[trace["query_id"]], "bad" if faults else "good", ", ".join(faults) or "accepted",
            [_text(trace["messages"])], [faults or ["accepted"], [place]], trace["teacher"],
        )  # fmt: skip

    def render(k: int) -> str:
        trace = traces[k]
        question, pages, completion = corpus.by_id[trace["query_id"]], trace["candidates"], _text(trace["messages"])
        faults = "".join(
            f"<li>{badge('bad', fault)} {escape_html(FAULTS.get(fault, ''))}</li>" for fault in trace.get("faults", ())
        )
        repeats = facts_line([f"repeats {trace['repeats']}"]) if trace.get("repeats") else ""
        reasons = reasons_in_order(parse_ranking(completion, len(pages)).think, range(len(pages)))
        shown = cards(question, pages, [(f"Image {i}", "") for i in range(1, len(pages) + 1)], reasons)
        return f"{question_head(question)}<ol>{faults}</ol>{repeats}{shown}{as_written(completion)}"

    facets = ["Domain", "Type", "Checks", "First gold image"]
    title = f"Traces: {len(accepted)} accepted, {len(rejected)} rejected"
    return Browser(title, facets, list(map(row, traces)), render, corpus)


def _systems(corpus: Corpus, runs: Mapping[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """The outcomes of each run (`classify`), of the same questions, with its rows of generations as column "row"."""
    if not runs:
        raise ValueError("there are no runs to look at: pass {name: generations, …}")
    systems: dict[str, pd.DataFrame] = {}
    for name, frame in runs.items():
        try:
            outcomes = classify(frame, corpus.with_questions(frame.get("question_id", ())))
        except ValueError as error:
            raise ValueError(f"run {name!r}: {error}") from None
        rows = {row["question_id"]: row for row in records(frame)}
        systems[name] = outcomes.assign(row=[rows[question] for question in outcomes["question_id"]])
        first = next(iter(systems))
        if apart := sorted(set(systems[first]["question_id"]) ^ set(outcomes["question_id"])):
            raise ValueError(f"only one of {first!r} and {name!r} has the questions {first_few(apart)}: rank the same")
    return systems


def _run_browser(
    title: str,
    corpus: Corpus,
    systems: Mapping[str, pd.DataFrame],
    filters: Mapping[str, Sequence[list[str]]],
    pages: Callable[[str, pd.Series, dict[str, Any]], str],
    heading: str = "",
    encoder: Any = None,
) -> Browser:
    """A browser of questions, with a section for each run in which `pages` (of name, question, row) shows its order."""
    questions = [corpus.by_id[name] for name in next(iter(systems.values()))["question_id"]]

    def row(k: int, question: pd.Series) -> Row:
        words = [outcomes["outcome"][k] for outcomes in systems.values()]
        texts = [outcomes["row"][k]["text"] for outcomes in systems.values()]
        mark = OUTCOME_MARKS.get(words[-1], "bad")  # the last run is the one that is looked at
        return _question_row(question, mark, " → ".join(words), texts, [values[k] for values in filters.values()])

    def render(k: int) -> str:
        question, rows = questions[k], {name: outcomes["row"][k] for name, outcomes in systems.items()}
        title = "Candidates in the retriever's order"
        strips = {name: strip(question, row["candidates"], title) for name, row in rows.items()}
        shared = next(iter(strips.values())) if len(set(strips.values())) == 1 else ""  # shown once if all had the same
        sections = "".join(
            f"<section>{run_head(name, row, systems[name].loc[k])}{'' if shared else strips[name]}"
            f"{pages(name, question, row)}{as_written(row['text'])}</section>"
            for name, row in rows.items()
        )
        return f'{question_head(question)}{shared}{maps(question, rows)}<div class="runs">{sections}</div>'

    def maps(question: pd.Series, rows: Mapping[str, Mapping[str, Any]]) -> str:
        """A fold of the pages with the encoder's heat maps on them."""
        if encoder is None:
            return ""
        pages = next(iter(rows.values()))["candidates"]
        images = (corpus.page_image(question["doc_name"], page) for page in pages)
        over = heat([encoder.heat_map(question["question"], image)[1] for image in images])
        title = "Where a late-interaction retriever finds the question's words"
        shown = strip(question, pages, "Darker: more alike", over=over)
        return f"<details><summary>{title}</summary>{shown}</details>"

    rows = [row(k, question) for k, question in enumerate(questions)]
    return Browser(title, ["Domain", "Type", *filters], rows, render, corpus, heading)


def _question_row(
    question: pd.Series, mark: str, word: str, texts: Iterable[str | None], values: Iterable[list[str]], note: str = ""
) -> Row:
    """The line of a question; texts: what the search finds it by, beside its own."""
    own = [question[name] for name in ("question", "answer", "doc_name", "domain")]
    find = " ".join(str(text) for text in (*own, *texts) if text)
    note = f"{question['doc_name']} · {note or question['domain']}"
    values = [[question["domain"]], list(question["type"]) or [NONE], *values]
    return Row(mark, word, question["question"], note, find, values)


def _sign(change: float, more: str, less: str) -> str:
    return more if change > 0 else less if change < 0 else "the same"


def _crossed(recall: Mapping[str, pd.Series], first: str, other: str) -> str:
    """A table of how often each of two systems has a gold page first."""
    counts = pd.crosstab(recall[first] > 0, recall[other] > 0)
    counts = counts.reindex(index=[True, False], columns=[True, False], fill_value=0)
    counts.index, counts.columns = ([f"{name} right", f"{name} wrong"] for name in (first, other))
    return html_table(counts)


def _text(message: str | Sequence[Mapping[str, Any]]) -> str:
    """A text, or that of the last of some chat messages."""
    return message if isinstance(message, str) else content_text(message[-1]["content"])
