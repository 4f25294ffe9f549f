"""The figures of ranking files, as text. Apart from `metrics`, whose users need not load what reads corpora."""

import shutil
from collections.abc import Sequence

from mmr5_lab.corpus.documents import load_corpus
from mmr5_lab.corpus.rankings import read_trec
from mmr5_lab.evaluation.metrics import breakdown, evaluate_runs


def evaluation_text(
    corpus: str, split: str | None, runs: Sequence[str], ks: Sequence[int], measures: Sequence[str], by: str | None
) -> str:
    """Return the tables of TREC files, as `mmr5 evaluate` prints them: as wide as the terminal.

    by: "type" or "gold", as in `breakdown`; None: by domain
    """
    part = load_corpus(corpus, split)
    rankings = {path: read_trec(path, part).pages for path in runs}
    tables = evaluate_runs(rankings, part, ks, measures)
    width = shutil.get_terminal_size((0, 0)).columns or None  # a file gets whole lines
    texts = []
    for path, pages in rankings.items():
        table = breakdown(pages, part, by, ks, measures) if by else tables[path]
        lines = table.to_string(float_format="{:.4f}".format, line_width=width)
        texts.append(f"{path}: {len(pages)} of {len(part.questions)} questions\n{lines}\n")
    return "\n".join(texts)
