"""Retrieval by vectors: a corpus encoded once, its pages ranked within each document.

encoder = load_encoder("colqwen")
vectors = encode_corpus(corpus, encoder)                  # resumable; beside the corpus's files
run = rank_documents(corpus, encoder, vectors, top_k=10)  # each question in its own document, as MMDocIR asks
"""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from huggingface_hub import constants
from tqdm.auto import tqdm

from mmr5_lab.corpus.documents import Corpus
from mmr5_lab.corpus.ids import CorpusError
from mmr5_lab.corpus.rankings import Rankings, rank_by_score
from mmr5_lab.retrieval.encoders import TEXT, Encoder, best_device
from mmr5_lab.retrieval.page_vectors import PageVectors

_QUERY_BATCH = 32


def encode_corpus(
    corpus: Corpus,
    encoder: Encoder,
    folder: str | Path | None = None,
    hub_vectors: str | Path = "runs/vectors",
    *,
    batch_size: int = 4,
    source: str = "ocr_text",
) -> PageVectors:
    """Return the vectors of a corpus's pages, after encoding those that the folder does not hold yet, with progress.

    Where another process is encoding them, its end is waited for.

    folder: None is `vectors/<method>_<model>_<digits>` in the corpus's folder; in the place of that `vectors` it is
        `hub_vectors` for a corpus in the hub's cache, which is not ours to write into, and for joined corpora
    source: the text that a text encoder reads, as for `Corpus.page_text`; a page without words is read as "."

    Raises CorpusError if the corpus has no page file, VectorsError if the folder holds vectors of something else.
    """
    if corpus.store is None:
        raise CorpusError(f"{corpus.folder} has no page file: its pages cannot be encoded")
    about = encoder.about | {"pages": corpus.store.fingerprint}
    if encoder.reads == TEXT:
        about |= {"source": source}
    of_hub = corpus.folder.resolve().is_relative_to(Path(constants.HF_HUB_CACHE).resolve())
    ours = corpus.folder.is_dir() and not of_hub
    folder = Path(folder or Path(corpus.folder / "vectors" if ours else hub_vectors) / _folder_name(about))
    pages = {row: (name, k) for name in corpus.documents["doc_name"] for k, row in enumerate(corpus.rows(name))}
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


def _folder_name(about: dict[str, Any]) -> str:
    """Return a name that a person can read, and that differs where the vectors do."""
    model = re.sub(r"[^\w.-]+", "-", str(about["model"])).strip("-.")[-60:]
    digits = hashlib.sha256(repr(sorted(about.items())).encode()).hexdigest()[:8]
    return f"{about['method']}_{model}_{digits}"


def rank_documents(corpus: Corpus, encoder: Encoder, vectors: PageVectors, top_k: int = 10) -> Rankings:
    """Rank the pages of each question's own document by MaxSim and keep the best `top_k`; ties in page order."""
    documents = tqdm(corpus.questions.groupby("doc_name", sort=False), "ranking", unit="document")

    def scores() -> Iterator[tuple[str, np.ndarray]]:
        for doc_name, questions in documents:
            texts = questions["question"].tolist()
            starts = range(0, len(texts), _QUERY_BATCH)
            queries = [v for start in starts for v in encoder.encode_queries(texts[start : start + _QUERY_BATCH])]
            by_query = vectors.maxsim(queries, corpus.rows(str(doc_name)), best_device())
            yield from zip(questions["question_id"], by_query, strict=True)

    return rank_by_score(scores(), top_k)
