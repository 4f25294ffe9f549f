"""Retrieval by vectors: a corpus encoded once, its pages ranked within a document or across the whole corpus.

encoder = load_encoder("colqwen")
vectors = encode_corpus(corpus, encoder)                  # resumable; beside the corpus's files
run = rank_documents(corpus, encoder, vectors, top_k=10)  # each question in its own document, as MMDocIR asks
hits = search(corpus, encoder, vectors, ["How high was the revenue in 2015?"])[0]    # anywhere
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from tqdm.auto import tqdm

from mmr5_lab.corpus.documents import Corpus
from mmr5_lab.corpus.ids import CorpusError
from mmr5_lab.corpus.rankings import Rankings, best, rank_by_score
from mmr5_lab.retrieval.encoders import TEXT, Encoder, best_device
from mmr5_lab.retrieval.page_vectors import PageVectors

_QUERY_BATCH = 32


@dataclass(frozen=True)
class Hit:
    """A page found for a question: document, 0-based page, score."""

    doc_name: str
    page: int
    score: float


def encode_corpus(
    corpus: Corpus,
    encoder: Encoder,
    folder: str | Path | None = None,
    *,
    batch_size: int = 4,
    source: str = "ocr_text",
) -> PageVectors:
    """Return the vectors of a corpus's pages, after encoding those that the folder does not hold yet, with progress.

    Where another process is encoding them, its end is waited for.

    folder: None is `vectors/<method>_<model>_<digits>` in the corpus's folder
    source: the text that a text encoder reads, as for `Corpus.page_text`; a page without words is read as "."

    Raises CorpusError if the corpus has no page file, VectorsError if the folder holds vectors of something else.
    """
    if corpus.store is None:
        raise CorpusError(f"{corpus.folder} has no page file: its pages cannot be encoded")
    about = encoder.about | {"pages": corpus.store.fingerprint}
    if encoder.reads == TEXT:
        about |= {"source": source}
    folder = Path(folder or corpus.folder / "vectors" / _folder_name(about))
    pages = _pages(corpus)
    vectors = PageVectors(folder, about)
    if vectors.missing(list(pages)):
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            vectors = PageVectors(folder, about)  # another process may have encoded them meanwhile
            missing = vectors.missing(list(pages))
            with tqdm(total=len(pages), initial=len(pages) - len(missing), desc="encoding", unit="page") as progress:
                for start in range(0, len(missing), batch_size):
                    rows = missing[start : start + batch_size]
                    if encoder.reads == TEXT:
                        batch: list[Any] = [corpus.page_text(*pages[row], source).strip() or "." for row in rows]
                    else:
                        batch = [corpus.page_image(*pages[row]) for row in rows]
                    vectors.append(rows, encoder.encode_pages(batch))
                    progress.update(len(rows))
    return vectors


def _pages(corpus: Corpus) -> dict[int, tuple[str, int]]:
    """Return document and page of each row of the page file, as far as the corpus holds them."""
    return {row: (name, page) for name in corpus.documents["doc_name"] for page, row in enumerate(corpus.rows(name))}


def _folder_name(about: dict[str, Any]) -> str:
    """Return a name that a person can read, and that differs where the vectors do."""
    model = re.sub(r"[^\w.-]+", "-", str(about["model"])).strip("-.")[-60:]
    digits = hashlib.sha256(repr(sorted(about.items())).encode()).hexdigest()[:8]
    return f"{about['method']}_{model}_{digits}"


def _encode(encoder: Encoder, queries: Sequence[str]) -> list[np.ndarray]:
    starts = range(0, len(queries), _QUERY_BATCH)
    return [v for start in starts for v in encoder.encode_queries(queries[start : start + _QUERY_BATCH])]


def rank_documents(corpus: Corpus, encoder: Encoder, vectors: PageVectors, top_k: int = 10) -> Rankings:
    """Rank the pages of each question's own document by MaxSim and keep the best `top_k`; ties in page order."""
    documents = tqdm(corpus.questions.groupby("doc_name", sort=False), "ranking", unit="document")

    def scores() -> Iterator[tuple[str, np.ndarray]]:
        for doc_name, questions in documents:
            queries = _encode(encoder, questions["question"].tolist())
            by_query = vectors.maxsim(queries, corpus.rows(str(doc_name)), best_device())
            yield from zip(questions["question_id"], by_query, strict=True)

    return rank_by_score(scores(), top_k)


def search(
    corpus: Corpus,
    encoder: Encoder,
    vectors: PageVectors,
    queries: Sequence[str],
    top_k: int = 10,
    *,
    index: Any = None,
    nearest: int = 64,
) -> list[list[Hit]]:
    """Return the best pages of the whole corpus for each question, falling.

    index: None compares every page. With one of `build_index`, only pages that hold one of the `nearest` vectors of a
      vector of the question are scored, exactly.

    Raises VectorsError if pages of the corpus have no vectors.
    """
    pages = _pages(corpus)
    rows = np.array(sorted(pages), dtype=np.int64)
    encoded = _encode(encoder, queries)
    if index is None:
        scored = [(rows, scores) for scores in vectors.maxsim(encoded, rows.tolist(), best_device())]
    else:
        scored = []
        for query in encoded:
            _, neighbours = index.search(np.ascontiguousarray(query, dtype=np.float32), nearest)
            positions = np.searchsorted(vectors.starts, np.unique(neighbours[neighbours >= 0]), side="right") - 1
            candidates = np.intersect1d(vectors.rows[np.unique(positions)], rows)
            scored.append((candidates, vectors.maxsim([query], candidates.tolist(), best_device())[0]))
    return [
        [Hit(*pages[int(candidates[i])], score) for i, score in zip(*best(scores, top_k), strict=True)]
        for candidates, scores in scored
    ]


def build_index(vectors: PageVectors, factory: str = "IVF1024,PQ32", sample: int = 262_144, probes: int = 16) -> Any:
    """Make a faiss index over all vectors, for `search`; `pip install "mmr5-lab[retrieval]"`.

    factory: faiss's index description (https://github.com/facebookresearch/faiss/wiki/The-index-factory): "Flat" is
      exact and keeps all vectors in memory in single precision, "HNSW32,Flat" and "IVF…,PQ…" are approximate
    sample: vectors that quantisers are trained on, drawn with a fixed seed; probes: lists that IVF looks into

    The file's vectors are added 65,536 at a time. Raises RuntimeError without faiss.
    """
    try:
        import faiss
    except ImportError:
        raise RuntimeError('an index needs faiss: pip install "mmr5-lab[retrieval]"') from None
    halves = vectors.all()
    index = faiss.index_factory(halves.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
    if not index.is_trained:
        chosen = np.random.default_rng(0).permutation(len(halves))[:sample]
        index.train(halves[np.sort(chosen)].astype(np.float32))
    for start in tqdm(range(0, len(halves), 65_536), desc="index", unit="block"):
        index.add(halves[start : start + 65_536].astype(np.float32))
    if hasattr(index, "nprobe"):
        index.nprobe = probes
    return index
