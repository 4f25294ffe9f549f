"""Rankings to figures: recall and other measures by question, domain and type, and their ceilings.

Rankings are `{question_id: [page, …]}`: 0-based pages of the question's own document, best first. A corpus is
anything with two tables, `questions` (question_id, doc_name, domain, type, gold_pages, …) and `documents`
(doc_name, num_pages), as `mmr5_lab.corpus.documents.load_corpus` gives them.

    from mmr5_lab import evaluate
    print(evaluate(rankings, corpus))

Definitions are MMDocIR's (arXiv 2501.08828, page-level retrieval; the figures of arXiv 2506.12364 use them):
recall@k of a question is the share of its gold pages among the first k, micro is the mean over questions,
macro the mean over domains of each domain's mean. Nothing is averaged away: rankings that do not fit their
corpus are a ValueError that names the questions.

Ties. A ranking is a strict order, so the code that makes it breaks its ties. Here equal scores are in page order
(`retrieve`), in a TREC run in the order of the written ranks (`read_trec`), and `write_trec` lowers equal scores so
that trec_eval, which sorts by score alone and equal ones by name, sees the same order.
"""

import operator
from collections.abc import Iterable, Mapping, Sequence
from itertools import repeat
from typing import Any

import numpy as np
import pandas as pd

from mmr5_lab.evaluation.gold_ranks import CorpusTables, PagesByQuestion, gold_ranks, measure_columns, recall
from mmr5_lab.evaluation.significance import bootstrap_interval

# In MMDocIR this domain is one document with 137 questions, so one document is a tenth of every macro figure.
NEWS = "News"
AVERAGES = ("macro", "macro_ex_news", "micro")
CEILINGS = (" candidates", " all pages")  # what follows the name of a measure of the best order


def recall_at_k(ranking: Sequence[int], gold: Iterable[int], k: int) -> float:
    """|first k of ranking ∩ gold| ÷ |gold|, MMDocIR's page recall, in [0, 1].

    `gold` is read as a set. A ranking shorter than k is not padded. With |gold| > k no ranking reaches 1.
    Raises ValueError for empty gold, k < 1, and a ranking that repeats a page: a repeat is a fault of the
    ranker, and counting it once would quietly reward or punish it.

        >>> recall_at_k([4, 0, 2], gold=[2, 7], k=3)
        0.5
    """
    wanted = set(gold)
    pages = list(ranking)
    if not wanted:
        raise ValueError("gold is empty: recall is undefined for a question without gold pages")
    if operator.index(k) < 1:
        raise ValueError(f"k is {k}, expected at least 1")
    if len(set(pages)) < len(pages):
        raise ValueError(f"the ranking repeats pages {sorted({p for p in pages if pages.count(p) > 1})}")
    return recall([rank for rank, page in enumerate(pages, 1) if page in wanted], len(wanted), k)


def evaluate(
    rankings: PagesByQuestion, corpus: CorpusTables, ks: Sequence[int] = (1, 3, 5), measures: Sequence[str] = ("R",)
) -> pd.DataFrame:
    """Return the result table of one system: recall@k by domain, averaged in three ways, and what can be reached.

    measures: of `gold_ranks.MEASURES`, see `per_question`; the mean of RR is called MRR, that of AP is MAP

    Rows (index "domain"): the corpus's domains in its own order, then "macro", "macro_ex_news" (macro without
    the domain "News"; NaN if there is no other), "micro", and "ceiling_macro" and "ceiling_micro": the best
    order of all pages, min(k, |gold|) ÷ |gold| by question, averaged likewise. Columns: "R@k" for each k, as
    shares, other measures as asked, and last "questions", how many stand behind the row.

    Raises ValueError, naming the questions and what to do, for no rankings, questions without a ranking
    or unknown to the corpus, an empty ranking, pages that the document does not have, repeated pages and
    pages that are not whole numbers; likewise for a corpus whose gold pages are missing or do not exist.
    """
    columns = list(measure_columns(ks, measures))
    frame = per_question(rankings, corpus, ks, measures)
    ceiling = _averages(frame, columns, CEILINGS[1]).loc[["macro", "micro"]].add_prefix("ceiling_", axis="index")
    return pd.concat([_averages(frame, columns), ceiling]).rename_axis("domain")


def evaluate_runs(
    runs: Mapping[str, PagesByQuestion],
    corpus: CorpusTables,
    ks: Sequence[int] = (1, 3, 5),
    measures: Sequence[str] = ("R",),
) -> dict[str, pd.DataFrame]:
    """`evaluate` of many systems: name -> table. Raises ValueError as `evaluate`, naming the system."""
    tables = {}
    for name, rankings in runs.items():
        try:
            tables[name] = evaluate(rankings, corpus, ks, measures)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return tables


def averages(figures: pd.DataFrame, domains: pd.Series) -> pd.DataFrame:
    """Return the means of figures by domain, and of these: "macro", "macro_ex_news" and "micro" (of all questions).

    figures: one row a question; domains: each one's. Column "questions": how many stand behind a row.
    """
    if clash := sorted({*AVERAGES, "ceiling_macro", "ceiling_micro"}.intersection(domains)):
        raise ValueError(f"domains named like summary rows: {clash}; rename them in the corpus")
    groups = figures.groupby(domains.to_numpy(), sort=False)
    table = groups.mean()
    means = {"macro": table.mean(), "macro_ex_news": table.drop(index=NEWS, errors="ignore").mean()}
    summary = pd.DataFrame({**means, "micro": figures.mean()}).T
    counts = [*groups.size(), len(figures), (domains != NEWS).sum(), len(figures)]
    return pd.concat([table, summary]).assign(questions=counts)


def candidate_ceiling(
    rankings: PagesByQuestion, corpus: CorpusTables, ks: Sequence[int] = (1, 3, 5), measures: Sequence[str] = ("R",)
) -> pd.DataFrame:
    """Return what the best order of each question's own candidates would reach: the ceiling of a reranker.

    For recall, min(k, |gold ∩ candidates|) ÷ |gold| by question, in the rows of `evaluate` up to "micro". Raises
    like it.
    """
    frame = per_question(rankings, corpus, ks, measures)
    return _averages(frame, list(measure_columns(ks, measures)), CEILINGS[0]).rename_axis("domain")


def breakdown(
    rankings: PagesByQuestion,
    corpus: CorpusTables,
    by: str = "type",
    ks: Sequence[int] = (1, 3, 5),
    measures: Sequence[str] = ("R",),
    samples: int = 0,
) -> pd.DataFrame:
    """Return means over groups of questions, each measure beside both of its ceilings.

    by: "domain", "type", or "gold" (number of gold pages). A question with several types counts in each of them, one
        without a type in "(none)".
    samples: of the bootstrap over documents; 0: no intervals

    Rows: the groups (of "gold" rising, else in the corpus's order), then "all", every question once. Columns: for each
    measure its mean, "… candidates" (the best order of the question's own candidates) and "… all pages" (the best
    order of the document), and "questions"; with `samples` also "… low" and "… high", the mean's 95 % interval (NaN
    where a group is of one document). Raises like `evaluate`, and for another `by`.
    """
    columns = measure_columns(ks, measures)
    frame = per_question(rankings, corpus, ks, measures)
    figures = [name + suffix for name in columns for suffix in ("", *CEILINGS)]
    groups = grouped(frame, by)
    if "all" in groups.groups:
        raise ValueError(f"a {by} is named like the summary row 'all'; rename it in the corpus")
    table = pd.concat([groups[figures].mean(), frame[figures].mean().to_frame("all").T]).rename_axis(by)
    table["questions"] = [*groups.size(), len(frame)]
    if samples:
        table[[f"{name} {end}" for name in columns for end in ("low", "high")]] = np.nan
        for group, part in [*groups, ("all", frame)]:
            for name in columns:
                ends = bootstrap_interval(part[name], part["doc_name"], samples)
                table.loc[group, [f"{name} low", f"{name} high"]] = ends
    return table.rename(columns=_mean_name)


def grouped(frame: pd.DataFrame, by: str) -> Any:
    """Group a frame of questions by "domain", "type" (a row for each of a question's types) or "gold" (a number)."""
    if by not in ("domain", "type", "gold") or by not in frame.columns:
        raise ValueError(f"cannot group questions by {by!r}: choose domain, type or gold, and a corpus that has it")
    if by == "type":
        types = frame["type"].map(lambda of: of if isinstance(of, str) else of or None)  # () means no type, like None
        frame = frame.assign(type=types).explode("type").fillna({"type": "(none)"})
    return frame.groupby(by, sort=by == "gold")


def per_question(
    rankings: PagesByQuestion, corpus: CorpusTables, ks: Sequence[int] = (1, 3, 5), measures: Sequence[str] = ("R",)
) -> pd.DataFrame:
    """Return one row a question, in the corpus's order; raises like `evaluate`.

    Columns: question_id, doc_name, domain, type (if the corpus has it), gold (number of gold pages),
    candidates (length of the ranking), gold_in_candidates, then "R@k" for each k, and other measures:

    - "nDCG@k": normalised discounted cumulative gain of the first k;
    - "RR": 1 ÷ rank of the first gold page; its mean is MRR;
    - "AP": precision at the gold pages' ranks, averaged over all of them; its mean is MAP. (MMDocIR's code divides by
      the gold pages found instead, which rewards leaving the others out.)

    Each measure again as "… candidates" and "… all pages": of the best order of the candidates, and of all pages.
    RR and AP see the whole ranking. All are trec_eval's definitions; the formulas are in `gold_ranks`.
    """
    columns = measure_columns(ks, measures)
    hits, gold, candidates = gold_ranks(rankings, corpus)
    known = [c for c in ("question_id", "doc_name", "domain", "type") if c in corpus.questions.columns]
    counts = {"gold": gold, "candidates": candidates, "gold_in_candidates": list(map(len, hits))}
    orders: list[Sequence[Sequence[int]]] = [hits, *([range(1, n + 1) for n in ns] for ns in (map(len, hits), gold))]
    figures = {
        name + suffix: list(map(measure, ranks, gold, repeat(k)))
        for suffix, ranks in zip(("", *CEILINGS), orders, strict=True)
        for name, (measure, k) in columns.items()
    }
    return corpus.questions[known].reset_index(drop=True).assign(**counts, **figures)


def _averages(frame: pd.DataFrame, columns: list[str], suffix: str = "") -> pd.DataFrame:
    """Averages of a frame of questions: of measures, or of their ceilings under the measures' names."""
    figures = frame[[name + suffix for name in columns]].set_axis(list(map(_mean_name, columns)), axis=1)
    return averages(figures, frame["domain"])


def _mean_name(column: str) -> str:
    """The mean of RR is called MRR, that of AP is called MAP."""
    return f"M{column}" if column.split()[0] in ("RR", "AP") else column
