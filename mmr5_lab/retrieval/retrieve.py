"""First-stage retrieval: for each question, the pages of its own document, best first.

    run = retrieve(corpus, method="bm25", top_k=10)
    run = retrieve(corpus, method="colqwen", model="vidore/colqwen2-v1.0-hf")
    write_trec(run, corpus, "colqwen.trec")
    evaluate(run.pages, corpus)

Runs and labels are TREC files: `question Q0 page rank score tag` and `question 0 page 1`.
"""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mmr5_lab.corpus.documents import Corpus, load_corpus
from mmr5_lab.corpus.ids import CorpusError
from mmr5_lab.corpus.rankings import Rankings, rank_by_score, write_trec
from mmr5_lab.retrieval.bm25 import bm25_scores

logger = logging.getLogger(__name__)
logging.getLogger("bm25s").setLevel(logging.WARNING)  # it asks for DEBUG

METHODS = ("bm25", "clip", "e5-v", "dse", "gme", "colqwen", "dense")


def retrieve(
    corpus: Corpus,
    method: str = "bm25",
    top_k: int = 10,
    *,
    source: str = "ocr_text",
    model: str | Path | None = None,
    vectors: str | Path | None = None,
    hub_vectors: str | Path = "runs/vectors",
    batch_size: int = 4,
    **options: Any,
) -> Rankings:
    """Rank the pages of each question's own document and keep the best `top_k`.

    method: one of `METHODS`; bm25 reads the text `source`. The others encode pages with a `model`
      (folder or hub name; None: `encoders.ENCODERS`' choice), `batch_size` at a time, and keep the `vectors` in a
      folder, by default one a model beside the corpus's files, or in `hub_vectors` where those lie in the hub's cache;
      pages that are there are not encoded again. `options` go to `encoders.load_encoder`.

    Equal scores are in page order, so a document without words is ranked by page order, and so is a question without a
    word that its document holds (`Rankings.unmatched`); logged warnings name both.

    Raises ValueError for an unknown method, top_k < 1 or options that the method does not have, CorpusError if pages
    are missing, VectorsError for a folder with other vectors, RuntimeError for a model that cannot be fetched.
    """
    if method not in METHODS:
        raise ValueError(f"unknown retrieval method {method!r}; there is: {', '.join(METHODS)}")
    if top_k < 1:
        raise ValueError(f"top_k is {top_k}; it must be at least 1")
    if method == "bm25" and (model or vectors or options):
        raise ValueError("bm25 reads the pages' text: it takes no model, vectors, max_pixels or device")
    if method in ("bm25", "dense") and not corpus.has_texts(source):
        raise CorpusError(
            f"the pages of {corpus.folder} have no text ({source}), which {method} reads: choose a retriever that looks"
            " at pages, such as colqwen"
        )
    if method in ("clip", "dense") and options.get("max_pixels"):
        raise ValueError(f"{method} has no pixel budget: leave out max_pixels")
    if method != "bm25":
        from mmr5_lab.retrieval.dense import encode_corpus, rank_documents  # loads torch
        from mmr5_lab.retrieval.encoders import load_encoder

        encoder = load_encoder(method, model, **options)
        page_vectors = encode_corpus(corpus, encoder, vectors, hub_vectors, batch_size=batch_size, source=source)
        return rank_documents(corpus, encoder, page_vectors, top_k)
    return _bm25(corpus, top_k, source)


def _bm25(corpus: Corpus, top_k: int, source: str) -> Rankings:
    wordless: list[str] = []

    def scores() -> Iterator[tuple[str, np.ndarray]]:
        for doc_name, questions in corpus.questions.groupby("doc_name", sort=False):
            texts = [corpus.page_text(doc_name, page, source) for page in range(corpus.num_pages(doc_name))]
            by_query = bm25_scores(texts, questions["question"].tolist())
            if by_query is None:
                wordless.append(doc_name)
                by_query = np.zeros((len(questions), len(texts)))
            yield from zip(questions["question_id"], by_query, strict=True)

    run = rank_by_score(scores(), top_k)
    unmatched = [question for question in run.unmatched if corpus.by_id[question]["doc_name"] not in wordless]
    for names, what in (
        (wordless, f"documents have no words in {source}, their pages are ranked by page order"),
        (unmatched, "questions have no match: no word of theirs is in their document, whose pages are in page order"),
    ):
        if names:
            logger.warning("%d %s: %s", len(names), what, ", ".join(names[:5]) + (", …" if len(names) > 5 else ""))
    return run


def retrieve_to_file(
    corpus: str | Path, out: str | Path, *, split: str | None, method: str, top_k: int, **options: Any
) -> str:
    """Write the TREC file `out` for the questions of a corpus folder, and return what it holds as a line of text.

    options: of `retrieve`; None stands for its default
    """
    part = load_corpus(corpus, split)
    if part.questions.empty:
        raise CorpusError(
            f"{corpus} has no questions to retrieve for: mark some (mmr5_lab.Annotator), give mmr5 ingest"
            " --annotations, or ask one with mmr5 ask"
        )
    run = retrieve(part, method, top_k, **{name: value for name, value in options.items() if value is not None})
    write_trec(run, part, out, tag=method)
    unmatched = f"; {len(run.unmatched)} without a match, in page order" if run.unmatched else ""
    return f"{out}: {len(run.pages)} questions, up to {top_k} pages each{unmatched}"
