"""MMDocIR as it is published: fetched from the hub, and its training subsets opened in place.

    load_corpus("mmdocir")                                # evaluation: 313 documents, 20,395 pages, 1.6 GB
    load_corpus("mmdocir-train")                          # the seven training subsets as one, splits "sft" and "rl"
    load_training_subset(fetch("DUDE"), "DUDE")           # one of them

Evaluation and training files differ. Those for training lie in two folders, for each subset:

    annotations_top1_negative/<subset>_train.jsonl    query, positive_passages, negative_passages: {doc_name, page_id}
    parquet/<subset>_filter.parquet                   file_name, page, image, page_size, layouts, domain

(https://huggingface.co/datasets/MMDocIR/MMDocIR_Train_Dataset, `train_dataset.py` there). They hold no text.
"""

import hashlib
import json
import logging
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from mmr5_lab.corpus.annotations import read_annotations
from mmr5_lab.corpus.documents import ANNOTATIONS, DOCUMENT_COLUMNS, LAYOUTS, PAGES, QUESTION_COLUMNS, Corpus
from mmr5_lab.corpus.ids import CorpusError, name_key, question_id
from mmr5_lab.corpus.joined import join
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
ALL = "all"  # all training subsets, for `fetch`
NAMES = {"mmdocir": None, "mmdocir-train": ALL}
"""Corpora that `load_corpus` opens by name -> what `fetch` gets."""
REPOSITORIES = {"mmdocir": EVALUATION, "mmdocir-train": TRAINING}
TRAINING_ANNOTATIONS = "annotations_top1_negative"
RL_SHARE = 0.3  # of the documents, for RL's prompts: 3,000 of them beside 7,200 traces


def fetch(
    subset: str | None = None, folder: str | Path | None = None, layouts: bool = False, revision: str | None = None
) -> Path:
    """Return the folder with MMDocIR's evaluation files, or those of a training subset, by huggingface_hub.

    subset: None for the evaluation files, a name of `SUBSETS`, or "all" for all seven
    folder: where to put them; None: the hub's cache
    layouts: also the evaluation pages' parts, 170,338 of them with their images (`Corpus.layouts`)
    revision: a commit of the repository; None: its newest
    Raises ValueError for an unknown subset, RuntimeError where the files are neither there nor can be fetched.
    """
    from huggingface_hub import snapshot_download

    if subset is None:
        name, patterns = EVALUATION, [ANNOTATIONS, PAGES, *([LAYOUTS] if layouts else [])]
    else:
        stems = [stem for name in SUBSETS for stem in _stems(name)] if subset == ALL else _stems(subset)
        name, patterns = TRAINING, [f"*/{stem}_*" for stem in stems]
    try:
        options: dict[str, Any] = {"allow_patterns": patterns, "local_dir": folder, "revision": revision}
        return Path(snapshot_download(name, repo_type="dataset", **options))
    except (OSError, ValueError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise RuntimeError(
            f"{name} is not here and cannot be fetched ({reason}). Where there is a network: "
            f"hf download {name} --repo-type dataset --local-dir FOLDER, then open FOLDER"
        ) from error


def load_training_subset(folder: str | Path, subset: str) -> Corpus:
    """Open a training subset as a corpus: split "train", domain the subset's name, no texts, read by row group.

    Pages count from 0 in the order of the file's `page` numbers. A question belongs to the document of its first
    positive page; its `extra` keeps `query_id` and, as pairs (document, 0-based page), `hard_negatives` and
    `other_positives`, those in other documents.
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
    lost = 0  # hard negatives
    for where, record in read_annotations(annotations):
        line = json.dumps(record, sort_keys=True)
        if line in seen:
            continue
        seen.add(line)
        positives, negatives = (_passages(record, where, key) for key in ("positive_passages", "negative_passages"))
        if any(passage not in number_of for passage in positives):
            unmatched.append(where)
            continue
        doc_name = positives[0][0]
        hard = [(name, number_of[name, page]) for name, page in negatives if (name, page) in number_of]
        lost += len(negatives) - len(hard)
        extra = {"query_id": record.get("query_id"), "hard_negatives": hard}
        if others := [(name, number_of[name, page]) for name, page in positives if name != doc_name]:
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
    if lost:
        logger.warning("%d hard negatives of %s are pages that %s lacks: they are left out", lost, subset, pages)
    if not rows:
        raise CorpusError(f"{annotations} has no question about a page of {pages}")
    return Corpus(Path(folder), documents[DOCUMENT_COLUMNS], pd.DataFrame(rows, columns=QUESTION_COLUMNS), store)


def load_training(folder: str | Path) -> Corpus:
    """Open all training subsets that a folder holds as one corpus, with the splits "sft" and "rl".

    A document is named `<subset>/<its name>`; its domain is the subset. Its split follows from a hash of its own name,
    so a document that several subsets hold is in the same split in all of them. Subsets whose files are not there are
    left out with a warning.

    Raises CorpusError as `load_training_subset` does, and where no subset is there.
    """
    folder = Path(folder)
    parts: dict[str, Corpus] = {}
    for subset, stems in SUBSETS.items():
        if any(all(file.is_file() for file in _pair(folder, stem)) for stem in stems):
            parts[subset] = load_training_subset(folder, subset)
        else:
            logger.warning("%s does not hold the training subset %s: it is left out", folder, subset)
    if not parts:
        raise CorpusError(f"{folder} holds no training subset: mmr5_lab.corpus.mmdocir.fetch('all') gets them")
    for subset, part in parts.items():
        documents, questions = (
            frame.assign(split=frame["doc_name"].map(_training_split)) for frame in (part.documents, part.questions)
        )
        parts[subset] = replace(part, documents=documents, questions=questions)
    return join(parts, folder)


def _training_split(doc_name: str) -> str:
    digest = hashlib.sha256(name_key(doc_name).encode()).digest()
    return "rl" if int.from_bytes(digest[:8]) < RL_SHARE * 2**64 else "sft"


def _stems(subset: str) -> tuple[str, ...]:
    if subset not in SUBSETS:
        raise ValueError(f"unknown training subset {subset!r}; there is: {', '.join(SUBSETS)}")
    return SUBSETS[subset]


def _files(folder: Path, subset: str) -> tuple[Path, Path]:
    for stem in _stems(subset):
        files = _pair(folder, stem)
        if all(file.is_file() for file in files):
            return files
    wanted = " and ".join(str(file.relative_to(folder)) for file in files)
    raise CorpusError(f"{folder} does not hold {wanted}: mmr5_lab.corpus.mmdocir.fetch({subset!r}) gets them")


def _pair(folder: Path, stem: str) -> tuple[Path, Path]:
    return folder / TRAINING_ANNOTATIONS / f"{stem}_train.jsonl", folder / "parquet" / f"{stem}_filter.parquet"


def _passages(record: dict[str, Any], where: str, key: str) -> list[tuple[str, int]]:
    passages = record.get(key) or ([] if key == "negative_passages" else None)
    if not isinstance(record.get("query"), str) or not isinstance(passages, list):
        entries = " with at least one entry" * (key == "positive_passages")
        raise CorpusError(f"{where}: query is not a text, or {key} is not a list{entries}")
    try:
        return [(str(passage["doc_name"]), int(passage["page_id"])) for passage in passages]
    except (TypeError, KeyError, ValueError) as error:
        raise CorpusError(f"{where}: an entry of {key} lacks doc_name or page_id") from error
