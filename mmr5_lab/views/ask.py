"""One question to a corpus: retrieve pages, rerank them, show them with the reasoning."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmr5_lab.corpus.documents import Corpus, load_corpus
from mmr5_lab.corpus.ids import CorpusError
from mmr5_lab.experiments.runs import latest
from mmr5_lab.files import results, write_text
from mmr5_lab.html import escape_html, html_page, visible
from mmr5_lab.prompting.reasons import reasons_in_order
from mmr5_lab.reranking.opening import open_ranker
from mmr5_lab.reranking.ranking import Ranker, Ranking
from mmr5_lab.retrieval.bm25 import bm25_scores
from mmr5_lab.views.thumbnails import thumbnail_url


@dataclass(frozen=True)
class Answer:
    """Pages for a question, best first: (doc_name, 0-based page), and what the ranker said of its candidates.

    candidates: the same pages in the retriever's order, which `ranking.order` permutes
    """

    question: str
    candidates: list[tuple[str, int]]
    ranking: Ranking

    @property
    def pages(self) -> list[tuple[str, int]]:
        return [self.candidates[k] for k in self.ranking.order]

    @property
    def reasons(self) -> list[str]:
        """What the reasoning says of each of `pages`; "" where it says nothing of it."""
        return reasons_in_order(self.ranking.reasoning, self.ranking.order, self.ranking.shown)


def ask(
    corpus: Corpus,
    question: str,
    ranker: Ranker,
    *,
    document: str | None = None,
    candidates: int = 5,
    mode: str = "reason",
) -> Answer:
    """Take the `candidates` best pages of BM25, of one document or of all, and rerank them.

    Raises CorpusError for an unknown document and for a corpus without words (BM25 then has nothing to go by, and
    one page is as good as another), ValueError for a question that is empty.
    """
    if not question.strip():
        raise ValueError("the question is empty")
    part = corpus if document is None else corpus.subset([document])
    pages = [
        (name, page)
        for name, count in zip(part.documents["doc_name"], part.documents["num_pages"], strict=True)
        for page in range(count)
    ]
    if not pages:
        raise CorpusError(f"{corpus.folder} has no pages")
    scores = bm25_scores([part.page_text(*page) for page in pages], [question])
    if scores is None and len(pages) > candidates:
        where = f"document {document!r}" if document else str(corpus.folder)
        raise CorpusError(f"{where} has {len(pages)} pages and no words: BM25 cannot choose {candidates} of them")
    best = sorted(range(len(pages)), key=lambda k: (0 if scores is None else -scores[0][k], k))[:candidates]
    shown = [pages[k] for k in best]
    ranking = ranker.rank(question, [part.page_bytes(*page) for page in shown], mode)
    return Answer(question, shown, ranking)


def as_text(answer: Answer) -> str:
    """The ranked pages with their reasoning, for a terminal; control characters are shown as escapes."""
    lines = []
    for rank, ((name, page), reason) in enumerate(zip(answer.pages, answer.reasons, strict=True), 1):
        before = answer.candidates.index((name, page)) + 1
        lines.append(f"{rank}. {name}, page {page + 1} (BM25: {before})")
        if reason:
            lines.append(f"   {reason}")
    if answer.ranking.faults:
        lines.append(f"faults: {', '.join(sorted(answer.ranking.faults))}; the order is repaired")
    return "\n".join(visible(line) for line in lines)


def write_page(answer: Answer, corpus: Corpus, path: str | Path) -> Path:
    """Write an HTML file that needs no network: ranked thumbnails, reasoning, and the model's text."""
    items = []
    for rank, ((name, page), reason) in enumerate(zip(answer.pages, answer.reasons, strict=True), 1):
        before = answer.candidates.index((name, page)) + 1
        place = escape_html(f"{name}, page {page + 1}")
        items.append(
            f'<li><img src="{thumbnail_url(corpus, name, page)}" alt="{place}"><div><h2>{rank}. {place}</h2>'
            f'<p class="note">BM25: rank {before}</p><p>{escape_html(reason)}</p></div></li>'
        )
    faults = ", ".join(sorted(answer.ranking.faults))
    note = f'<p class="note">Faults: {escape_html(faults)}; the order is repaired.</p>' if faults else ""
    written = f"<h2>As written</h2><pre>{escape_html(answer.ranking.text)}</pre>" if answer.ranking.text else ""
    heading = f"<h1>{escape_html(answer.question)}</h1>"
    body = f'{heading}{note}<ol class="cards">{"".join(items)}</ol>{written}'
    return write_text(path, html_page("Ranked pages", body))


def ask_to_file(
    corpus: str, question: str, out: str, document: str | None, candidates: int, mode: str, **ranker: Any
) -> str:
    """Ask, write the page to `out` and return the text, as `mmr5 ask` does.

    ranker: options of `open_ranker`; without a model, that of the newest run of notebook 03
    """
    whole = load_corpus(corpus)
    try:
        ranker["model"] = ranker["model"] or results(latest("03_grpo"))["model"]
    except FileNotFoundError:
        raise FileNotFoundError(
            "no model: name one with --model (a folder such as data/mini/base, or a hub name) or train one: mmr5 demo"
        ) from None
    answer = ask(whole, question, open_ranker(**ranker), document=document, candidates=candidates, mode=mode)
    return f"{as_text(answer)}\n\n{write_page(answer, whole, out)}"
