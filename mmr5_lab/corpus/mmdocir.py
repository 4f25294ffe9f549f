"""MMDocIR as it is published: fetched from the hub, and its training subsets opened in place.

    load_corpus(fetch())                                  # evaluation: 313 documents, 20,395 pages, 1.6 GB
    load_training_subset(fetch("DUDE"), "DUDE")           # one of the seven training subsets

Evaluation and training files differ. Those for training lie in two folders, for each subset:

    annotations_top1_negative/<subset>_train.jsonl    query, positive_passages, negative_passages: {doc_name, page_id}
    parquet/<subset>_filter.parquet                   file_name, page, image, page_size, layouts, domain

(https://huggingface.co/datasets/MMDocIR/MMDocIR_Train_Dataset, `train_dataset.py` there). They hold no text.
"""

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd

from mmr5_lab.corpus.annotations import read_annotations
from mmr5_lab.corpus.documents import ANNOTATIONS, DOCUMENT_COLUMNS, LAYOUTS, PAGES, QUESTION_COLUMNS, Corpus
from mmr5_lab.corpus.ids import CorpusError, question_id
from mmr5_lab.corpus.page_store import PageStore

logger = logging.getLogger(__name__)

EVALUATION = "MMDocIR/MMDocIR_Evaluation_Dataset"
TRAINING = "MMDocIR/MMDocIR_Train_Dataset"
SUBSETS: dict[str, tuple[str, ...]] = {
    "ArxivQA": ("ArxivQA",),
    "DUDE": ("DUDE", "DUDE_long"),
    "SciQAG": ("SciQAG",),
    "SlideVQA": ("SlideVQA",),
    "TAT-DQA": ("TAT-DQA",),
    "Wiki-SS": ("Wiki-ss",),
    "MP-DocVQA": ("MP-DocVQA",),
}
"""Training subsets by the paper's name -> how their files begin, in one release or another."""


def fetch(subset: str | None = None, folder: str | Path | None = None, layouts: bool = False) -> Path:
    """Return the folder with MMDocIR's evaluation files, or those of a training subset, by huggingface_hub.

    folder: where to put them; None: the hub's cache
    layouts: also the evaluation pages' parts, 170,338 of them with their images (`Corpus.layouts`)
    Raises ValueError for an unknown subset, RuntimeError where the files are neither there nor can be fetched.
    """
    from huggingface_hub import snapshot_download

    if subset is None:
        name, patterns = EVALUATION, [ANNOTATIONS, PAGES, *([LAYOUTS] if layouts else [])]
    else:
        name, patterns = TRAINING, [f"*/{stem}_*" for stem in _stems(subset)]
    try:
        return Path(snapshot_download(name, repo_type="dataset", allow_patterns=patterns, local_dir=folder))
    except (OSError, ValueError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise RuntimeError(
            f"{name} is not here and cannot be fetched ({reason}). Where there is a network: "
            f"hf download {name} --repo-type dataset --local-dir FOLDER, then open FOLDER"
        ) from error


def load_training_subset(folder: str | Path, subset: str) -> Corpus:
    """Open a training subset as a corpus: split "train", domain the subset's name, no texts, read by row group.

    Pages count from 0 in the order of the file's `page` numbers. A question belongs to the document of its first
    positive page; its `extra` keeps `query_id`, `negatives` (page ids as published) and positives in other documents.
    Lines that repeat are taken once; questions whose page is not in the parquet file are left out with a warning.

    Raises ValueError for an unknown subset, CorpusError if files are missing or malformed, or if no question is left.
    """
    annotations, pages = _files(Path(folder), subset)
    store = PageStore(
        pages,
        names={"image_binary": "image", "doc_name": "file_name"},
        needed=("doc_name", "image_binary", "page"),
        sort_by=("doc_name", "page"),  # a document's rows stand apart in the published files
    )
    table = pd.DataFrame({name: store.column(name) for name in ("doc_name", "page")})
    if table.duplicated().any():
        name, page = table[table.duplicated()].iloc[0]
        raise CorpusError(f"{pages} has page {page} of {name!r} twice")
    numbers = table.groupby("doc_name").cumcount().tolist()
    number_of = dict(
        zip(table.itertuples(index=False, name=None), numbers, strict=True)
    )  # (name, page) -> 0-based page
    documents = table.groupby("doc_name").size().reset_index(name="num_pages")
    documents["first_row"] = documents["num_pages"].cumsum() - documents["num_pages"]
    documents = documents.assign(domain=subset, split="train", extra=[{} for _ in range(len(documents))])

    rows: list[dict[str, Any]] = []
    counts: Counter[str] = Counter()
    seen: set[str] = set()
    unmatched: list[str] = []
    for where, record in read_annotations(annotations):
        line = json.dumps(record, sort_keys=True)
        if line in seen:
            continue
        seen.add(line)
        positives = _passages(record, where)
        if any(passage not in number_of for passage in positives):
            unmatched.append(where)
            continue
        doc_name = positives[0][0]
        extra = {"query_id": record.get("query_id"), "negatives": record.get("negative_passages") or []}
        if others := [passage for passage in positives if passage[0] != doc_name]:
            extra["other_positives"] = others
        rows.append(
            {
                "question_id": question_id(doc_name, counts[doc_name]), "doc_name": doc_name, "domain": subset,
                "split": "train", "type": (), "question": record["query"].strip(),
                "answer": str(record.get("answer", "")), "boxes": [], "extra": extra,
                "gold_pages": sorted({number_of[passage] for passage in positives if passage[0] == doc_name}),
            }
        )  # fmt: skip
        counts[doc_name] += 1
    if unmatched:
        logger.warning(
            "%d questions of %s name pages that %s lacks, the first is %s", len(unmatched), subset, pages, unmatched[0]
        )
    if not rows:
        raise CorpusError(f"{annotations} has no question about a page of {pages}")
    return Corpus(Path(folder), documents[DOCUMENT_COLUMNS], pd.DataFrame(rows, columns=QUESTION_COLUMNS), store)


def _stems(subset: str) -> tuple[str, ...]:
    if subset not in SUBSETS:
        raise ValueError(f"unknown training subset {subset!r}; there is: {', '.join(SUBSETS)}")
    return SUBSETS[subset]


def _files(folder: Path, subset: str) -> tuple[Path, Path]:
    for stem in _stems(subset):
        files = (
            folder / "annotations_top1_negative" / f"{stem}_train.jsonl",
            folder / "parquet" / f"{stem}_filter.parquet",
        )
        if all(file.is_file() for file in files):
            return files
    wanted = " and ".join(str(file.relative_to(folder)) for file in files)
    raise CorpusError(f"{folder} does not hold {wanted}: mmr5_lab.corpus.mmdocir.fetch({subset!r}) gets them")


def _passages(record: dict[str, Any], where: str) -> list[tuple[str, int]]:
    positives = record.get("positive_passages")
    if not isinstance(record.get("query"), str) or not isinstance(positives, list) or not positives:
        raise CorpusError(f"{where}: query is not a text, or positive_passages is not a list with at least one entry")
    try:
        return [(str(passage["doc_name"]), int(passage["page_id"])) for passage in positives]
    except (TypeError, KeyError, ValueError) as error:
        raise CorpusError(f"{where}: a positive passage lacks doc_name or page_id") from error
