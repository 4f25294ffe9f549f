"""One question to a corpus: retrieve pages, rerank them, show them with the reasoning."""

from dataclasses import dataclass
from pathlib import Path

from mmr5_lab.corpus.documents import Corpus
from mmr5_lab.corpus.ids import CorpusError
from mmr5_lab.files import replacing
from mmr5_lab.html import escape_html, html_page, visible
from mmr5_lab.prompting.reasons import reasons_in_order
from mmr5_lab.reranking.ranking import Ranker, Ranking
from mmr5_lab.retrieval.bm25 import bm25_scores
from mmr5_lab.views.thumbnails import thumbnail_url

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 0 auto; padding: 1rem; color: #222; }
ol { list-style: none; padding: 0; } li { display: flex; gap: 1.2rem; margin: 1.2rem 0; flex-wrap: wrap; }
li > div { flex: 1 1 20rem; } img { border: 1px solid #999; max-width: 100%; height: auto; }
h2 { font-size: 1.1rem; margin: 0; } p { margin: .4rem 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.note { color: #595959; } pre { white-space: pre-wrap; background: #f6f6f6; padding: .6rem; font-size: .85rem; }
"""


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
    """One HTML file that needs no network: ranked thumbnails, reasoning, and the model's text as it was written."""
    items = []
    for rank, ((name, page), reason) in enumerate(zip(answer.pages, answer.reasons, strict=True), 1):
        before = answer.candidates.index((name, page)) + 1
        place = f"{name}, page {page + 1}"
        items.append(
            f'<li><img src="{thumbnail_url(corpus, name, page)}" alt="{escape_html(place)}">'
            f"<div><h2>{rank}. {escape_html(place)}</h2>"
            f'<p class="note">BM25: rank {before}</p><p>{escape_html(reason)}</p></div></li>'
        )
    faults = ", ".join(sorted(answer.ranking.faults))
    notes = f'<p class="note">Faults: {faults}; the order is repaired.</p>' if faults else ""
    written = f"<h2>As written</h2><pre>{escape_html(answer.ranking.text)}</pre>" if answer.ranking.text else ""
    body = f"<h1>{escape_html(answer.question)}</h1>{notes}<ol>{''.join(items)}</ol>{written}"
    path = Path(path)
    with replacing(path) as new:
        new.write_text(html_page("Ranked pages", STYLE, body), encoding="utf-8")
    return path
