"""Several corpora as one, and short documents filled up with pages of others."""

import logging
import random
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd

from mmr5_lab.corpus.documents import PAGES, Corpus
from mmr5_lab.corpus.ids import CorpusError
from mmr5_lab.corpus.page_store import JoinedStores

logger = logging.getLogger(__name__)

OTHER_PAGES = ("hard_negatives", "other_positives")  # keys of a question's `extra`: pairs (document, 0-based page)


def join(parts: Mapping[str, Corpus], folder: Path) -> Corpus:
    """Return corpora as one; a document is named `<name of its corpus>/<its own name>` and keeps its split.

    folder: what stands for the folder of the whole, in messages and where page vectors are kept
    Raises CorpusError for a corpus without its page file.
    """
    documents, questions, stores, rows = [], [], [], 0
    for name, part in parts.items():
        if part.store is None:
            raise CorpusError(f"{part.folder / PAGES} is missing: corpora are joined by their pages")
        prefix, own = f"{name}/", part.questions
        extra = [_renamed(extra, prefix) for extra in own["extra"]]
        ids = quote(prefix, safe="") + own["question_id"]  # as `question_id` writes the document's new name
        questions.append(own.assign(question_id=ids, doc_name=prefix + own["doc_name"], extra=extra))
        names, firsts = prefix + part.documents["doc_name"], part.documents["first_row"] + rows
        documents.append(part.documents.assign(doc_name=names, first_row=firsts))
        stores.append(part.store)
        rows += part.store.num_rows
    return Corpus(
        folder, pd.concat(documents, ignore_index=True), pd.concat(questions, ignore_index=True), JoinedStores(stores)
    )


def _renamed(extra: dict[str, Any], prefix: str) -> dict[str, Any]:
    pages = {key: [(prefix + name, page) for name, page in extra[key]] for key in OTHER_PAGES if key in extra}
    return extra | pages


def pad(corpus: Corpus, pages: int) -> Corpus:
    """Return the corpus with its short documents filled up to `pages` pages by pages of other documents.

    So that a question about a document of one page has candidates. First come the hard negatives that the corpus names
    for the document's questions, then pages of documents of the same domain and, where these are too few, of any, drawn
    anew for each document but the same each time. All are of its own split, and none is known to answer its questions.
    Evaluation (the split "eval") stays as it is: there candidates are the document's own pages.
    """
    documents = corpus.documents
    split_of = dict(zip(documents["doc_name"], documents["split"], strict=True))
    by_document = dict(tuple(corpus.questions.groupby("doc_name")))
    rows, still_short = [], 0
    for row in documents.to_dict("records"):
        name, missing = row["doc_name"], pages - row["num_pages"]
        if missing > 0 and row["split"] != "eval":
            asked = by_document[name]["extra"] if name in by_document else []
            taken = {page for extra in asked for page in map(tuple, extra.get("other_positives", ()))}
            found: list[int] = []
            for other, page in _negatives(documents, row, asked):
                if other != name and split_of.get(other) == row["split"] and (other, page) not in taken:
                    taken.add((other, page))
                    found.append(corpus.rows(other)[page])
                if len(found) == missing:
                    break
            still_short += len(found) < missing
            row |= {"num_pages": row["num_pages"] + len(found), "extra": row["extra"] | {"padding": found}}
        rows.append(row)
    if still_short:
        logger.warning("%d documents have fewer than %d pages still: their splits have no others", still_short, pages)
    return replace(corpus, documents=pd.DataFrame(rows, columns=documents.columns))


def _negatives(documents: pd.DataFrame, row: dict[str, Any], asked: Any) -> Iterator[tuple[str, int]]:
    """Yield pages that a document can be filled up with, the best first; some are of no use (`pad` looks)."""
    for extra in asked:
        yield from map(tuple, extra.get("hard_negatives", ()))
    rng = random.Random(f"padding {row['doc_name']}")
    near = (documents["split"] == row["split"]) & (documents["domain"] == row["domain"])
    for others in (documents[near], documents[(documents["split"] == row["split"]) & ~near]):
        counts = dict(zip(others["doc_name"], others["num_pages"], strict=True))
        order = rng.sample(list(counts), len(counts))
        shift = rng.random()
        for turn in range(max(counts.values(), default=0)):  # a page of each, before any comes again
            yield from ((o, (int(shift * counts[o]) + turn) % counts[o]) for o in order if turn < counts[o])
