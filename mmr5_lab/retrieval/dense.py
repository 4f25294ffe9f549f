"""Retrieval by vectors: a corpus encoded once, its pages ranked within a document or across the whole corpus.

encoder = load_encoder("colqwen")
store = encode_corpus(corpus, encoder)                    # resumable; beside the corpus's files
run = rank_documents(corpus, encoder, store, top_k=10)    # each question in its own document, as MMDocIR asks
hits = search(corpus, encoder, store, ["How high was the revenue in 2015?"])[0]    # anywhere
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from tqdm.auto import tqdm

from mmr5_lab.corpus.documents import Corpus
from mmr5_lab.corpus.ids import CorpusError
from mmr5_lab.corpus.rankings import Rankings, best
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
    """The vectors of a corpus's pages; those that the folder does not hold yet are encoded, with progress.

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
    folder = Path(folder or corpus.folder / "vectors" / _name(about))
    rows = [row for name in corpus.documents["doc_name"] for row in corpus.rows(name)]
    store = PageVectors(folder, about)
    if store.missing(rows):
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):  # who comes second waits, and finds them
            store = PageVectors(folder, about)
            _fill(store, corpus, encoder, rows, batch_size, source)
    return store


def _fill(store: PageVectors, corpus: Corpus, encoder: Encoder, rows: list[int], batch_size: int, source: str) -> None:
    """Encode the pages of these rows that are missing."""
    pages = [(name, page) for name in corpus.documents["doc_name"] for page in range(corpus.num_pages(name))]
    missing = set(store.missing(rows))
    todo = [(row, *page) for row, page in zip(rows, pages, strict=True) if row in missing]
    done = len(rows) - len(todo)
    with tqdm(total=len(rows), initial=done, desc="encoding", unit="page", disable=not todo) as progress:
        for start in range(0, len(todo), batch_size):
            batch = todo[start : start + batch_size]
            if encoder.reads == TEXT:
                read: list[Any] = [corpus.page_text(name, page, source).strip() or "." for _, name, page in batch]
            else:
                read = [corpus.page_image(name, page) for _, name, page in batch]
            store.append([row for row, _, _ in batch], encoder.encode_pages(read))
            progress.update(len(batch))


def _name(about: dict[str, Any]) -> str:
    """A folder's name that a person can read, and that differs where the vectors do."""
    model = re.sub(r"[^\w.-]+", "-", str(about["model"])).strip("-.")[-60:]
    digits = hashlib.sha256(repr(sorted(about.items())).encode()).hexdigest()[:8]
    return f"{about['method']}_{model}_{digits}"


def _encode(encoder: Encoder, queries: Sequence[str]) -> list[np.ndarray]:
    starts = range(0, len(queries), _QUERY_BATCH)
    return [v for start in starts for v in encoder.encode_queries(queries[start : start + _QUERY_BATCH])]


def rank_documents(corpus: Corpus, encoder: Encoder, store: PageVectors, top_k: int = 10) -> Rankings:
    """Rank the pages of each question's own document by MaxSim and keep the best `top_k`; ties in page order."""
    pages_of: dict[str, list[int]] = {}
    scores_of: dict[str, list[float]] = {}
    device = best_device()
    with tqdm(total=len(corpus.questions), desc="ranking", unit="question") as progress:
        for doc_name, questions in corpus.questions.groupby("doc_name", sort=False):
            vectors = _encode(encoder, questions["question"].tolist())
            scores = store.maxsim(vectors, corpus.rows(str(doc_name)), device)
            for question, row in zip(questions["question_id"], scores, strict=True):
                pages_of[question], scores_of[question] = best(row, top_k)
            progress.update(len(questions))
    return Rankings(pages_of, scores_of)


def search(
    corpus: Corpus,
    encoder: Encoder,
    store: PageVectors,
    queries: Sequence[str],
    top_k: int = 10,
    *,
    index: Any = None,
    nearest: int = 64,
) -> list[list[Hit]]:
    """The best pages of the whole corpus for each question, falling.

    index: None compares every page. With one of `build_index`, only pages that hold one of the `nearest` vectors of a
      vector of the question are scored, exactly.

    Raises VectorsError if pages of the corpus have no vectors.
    """
    place = {row: (name, page) for name in corpus.documents["doc_name"] for page, row in enumerate(corpus.rows(name))}
    rows = np.array(sorted(place), dtype=np.int64)
    vectors = _encode(encoder, queries)
    device = best_device()
    if index is None:
        scored = [(rows, scores) for scores in store.maxsim(vectors, rows.tolist(), device)]
    else:
        scored = []
        for query in vectors:
            _, found = index.search(np.ascontiguousarray(query, dtype=np.float32), nearest)
            places = np.searchsorted(store.starts, np.unique(found[found >= 0]), side="right") - 1
            candidates = np.intersect1d(store.rows[np.unique(places)], rows)
            scored.append((candidates, store.maxsim([query], candidates.tolist(), device)[0]))
    return [
        [Hit(*place[int(candidates[i])], score) for i, score in zip(*best(scores, top_k), strict=True)]
        for candidates, scores in scored
    ]


def build_index(store: PageVectors, factory: str = "IVF1024,PQ32", sample: int = 262_144, probes: int = 16) -> Any:
    """A faiss index over all vectors of a store, for `search`; `pip install "mmr5-lab[retrieval]"`.

    factory: faiss's index description (https://github.com/facebookresearch/faiss/wiki/The-index-factory): "Flat" is
      exact and keeps all vectors in memory in single precision, "HNSW32,Flat" and "IVF…,PQ…" are approximate
    sample: vectors that quantisers are trained on, drawn with a fixed seed; probes: lists that IVF looks into

    The file's vectors are added 65,536 at a time. Raises RuntimeError without faiss.
    """
    try:
        import faiss
    except ImportError:
        raise RuntimeError('an index needs faiss: pip install "mmr5-lab[retrieval]"') from None
    vectors = store.all()
    index = faiss.index_factory(vectors.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
    if not index.is_trained:
        chosen = np.random.default_rng(0).permutation(len(vectors))[:sample]
        index.train(vectors[np.sort(chosen)].astype(np.float32))
    for start in tqdm(range(0, len(vectors), 65_536), desc="index", unit="block"):
        index.add(vectors[start : start + 65_536].astype(np.float32))
    if hasattr(index, "nprobe"):
        index.nprobe = probes
    return index
