"""Several corpora as one, and short documents filled up with pages of others."""

import itertools
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
    return extra | {
        key: [(prefix + name, page) for name, page in _pages(extra, key)] for key in OTHER_PAGES if key in extra
    }


def _pages(extra: dict[str, Any], key: str) -> list[tuple[str, int]]:
    try:
        return [(str(name), int(page)) for name, page in extra.get(key, ())]
    except (TypeError, ValueError):
        raise CorpusError(
            f"{key} of a question is no list of pairs (document, page from 0), but {extra[key]!r:.100}"
        ) from None


def pad(corpus: Corpus, pages: int) -> Corpus:
    """Return the corpus with its short documents filled up to `pages` pages by pages of other documents.

    A question about a document of one page then has candidates. First come the hard negatives that the corpus names
    for the document's questions, then pages of documents of the same domain and, where these are too few, of any, drawn
    for each document from a fixed seed. All are of its own split, and none is known to answer its questions. Evaluation
    (the split "eval") stays as it is: there candidates are the document's own pages.

    Raises CorpusError for a corpus that is padded already, and where a question's `hard_negatives` or `other_positives`
    are no pages of the corpus.
    """
    if corpus.padding:
        raise CorpusError(f"{corpus.folder} is padded already: open it again to pad it otherwise")
    documents = corpus.documents
    split_of = dict(zip(documents["doc_name"], documents["split"], strict=True))
    counts = dict(zip(documents["doc_name"], documents["num_pages"], strict=True))
    near = {key: names.tolist() for key, names in documents.groupby(["split", "domain"])["doc_name"]}
    of_split = {split: names.tolist() for split, names in documents.groupby("split")["doc_name"]}
    extra_of = dict(tuple(corpus.questions.groupby("doc_name")["extra"]))
    padding: dict[str, list[int]] = {}
    for name, domain, split in documents[["doc_name", "domain", "split"]].itertuples(index=False):
        missing = pages - counts[name]
        if missing <= 0 or split == "eval":
            continue
        asked = list(extra_of.get(name, ()))
        taken = {page for extra in asked for page in _pages(extra, "other_positives")}
        found = padding[name] = []
        named = (negative for extra in asked for negative in _pages(extra, "hard_negatives"))
        rng = random.Random(f"padding {name}")
        drawn = (page for names in (near[split, domain], of_split[split]) for page in _drawn(rng, names, counts))
        for other, page in itertools.chain(named, drawn):
            other = corpus.spelled(other)
            rows = corpus.rows(other)
            if not 0 <= page < len(rows):
                raise CorpusError(
                    f"a question about {name!r} names page {page} of {other!r}, which has {len(rows)} pages"
                )
            if other != name and split_of[other] == split and (other, page) not in taken:
                taken.add((other, page))
                found.append(rows[page])
            if len(found) == missing:
                break
    filled = documents["num_pages"] + documents["doc_name"].map(lambda name: len(padding.get(name, ())))
    if short := int((filled[documents["split"] != "eval"] < pages).sum()):
        logger.warning("%d documents have fewer than %d pages still: their splits have no others", short, pages)
    return replace(corpus, documents=documents.assign(num_pages=filled), padding=padding)


def _drawn(rng: random.Random, names: list[str], counts: Mapping[str, int]) -> Iterator[tuple[str, int]]:
    """Yield the pages of documents in an order drawn at random, a page of each before any comes again."""
    order, shift = rng.sample(names, len(names)), rng.random()
    for turn in range(max(counts[name] for name in names)):
        yield from ((o, (int(shift * counts[o]) + turn) % counts[o]) for o in order if turn < counts[o])
