"""First-stage retrieval: for each question, the pages of its own document, best first.

    run = retrieve(corpus, method="bm25", top_k=10)
    run = retrieve(corpus, method="colqwen", model="vidore/colqwen2-v1.0-hf")
    write_trec(run, corpus, "colqwen.trec")
    evaluate(run.pages, corpus)

Runs and labels are TREC files: `question Q0 page rank score tag` and `question 0 page 1`.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bm25s
import numpy as np

from mmr5_lab.corpus import Corpus, CorpusError, page_id, parse_page_id, replacing

logger = logging.getLogger(__name__)
logging.getLogger("bm25s").setLevel(logging.WARNING)  # it asks for DEBUG

METHODS = ("bm25", "clip", "e5-v", "dse", "gme", "colqwen", "dense")
_DECIMALS = 5  # of written scores
_ITS_CORPUS = "read the run with the corpus (and split) that it was made from"


class RunError(ValueError):
    """A run that cannot be read; the message names file and line."""


@dataclass(frozen=True)
class Run:
    """Ranked pages of each question.

    pages: question id -> 0-based pages of the question's document, best first; what `metrics.evaluate` takes
    scores: question id -> score of each of these pages, falling or level, or None if there are none
    """

    pages: dict[str, list[int]]
    scores: dict[str, list[float]] | None = None


def retrieve(
    corpus: Corpus,
    method: str = "bm25",
    top_k: int = 10,
    *,
    source: str = "ocr_text",
    stopwords: str | list[str] = "en",
    model: str | Path | None = None,
    vectors: str | Path | None = None,
    batch_size: int = 4,
    **options: Any,
) -> Run:
    """Rank the pages of each question's own document and keep the best `top_k`.

    method: one of `METHODS`; see `bm25_scores` for `source` and `stopwords`. The others encode pages with a `model`
      (folder or hub name; None: `encoders.ENCODERS`' choice), `batch_size` at a time, and keep the `vectors` in a
      folder, by default one a model beside the corpus's files; pages that are there are not encoded again. `options`
      go to `encoders.load_encoder`.

    Equal scores are in page order, so a document without words is ranked by page order; a logged warning
    names such documents.

    Raises ValueError for an unknown method or top_k < 1, CorpusError if pages are missing, VectorsError for a folder
    with other vectors, RuntimeError for a model that cannot be fetched.
    """
    if method not in METHODS:
        raise ValueError(f"unknown retrieval method {method!r}; there is: {', '.join(METHODS)}")
    if top_k < 1:
        raise ValueError(f"top_k is {top_k}; it must be at least 1")
    if method != "bm25":
        from mmr5_lab.dense import encode_corpus, rank_documents  # loads torch
        from mmr5_lab.encoders import load_encoder

        encoder = load_encoder(method, model, **options)
        store = encode_corpus(corpus, encoder, vectors, batch_size=batch_size, source=source)
        return rank_documents(corpus, encoder, store, top_k)
    pages_of: dict[str, list[int]] = {}
    scores_of: dict[str, list[float]] = {}
    wordless = []
    for doc_name, questions in corpus.questions.groupby("doc_name", sort=False):
        texts = [corpus.page_text(doc_name, page, source) for page in range(corpus.num_pages(doc_name))]
        scores = bm25_scores(texts, questions["question"].tolist(), stopwords)
        if scores is None:
            wordless.append(doc_name)
            scores = np.zeros((len(questions), len(texts)))
        for question, row in zip(questions["question_id"], scores, strict=True):
            pages_of[question], scores_of[question] = best(row, top_k)
    if wordless:
        logger.warning(
            "%d documents have no words in %s, their pages are ranked by page order: %s",
            len(wordless),
            source,
            ", ".join(wordless[:5]) + (", …" if len(wordless) > 5 else ""),
        )
    return Run(pages_of, scores_of)


def best(scores: np.ndarray, top_k: int) -> tuple[list[int], list[float]]:
    """Places of the `top_k` highest scores, falling, and the scores; ties in the order of places."""
    order = np.argsort(-scores, kind="stable")[:top_k]
    return order.tolist(), scores[order].tolist()


def hard_negatives(run: Run, corpus: Corpus, num_candidates: int = 5, max_share: float = 0.95) -> Run:
    """Candidates to train on: each question's right pages, and with them the wrong ones that score highest.

    run: many pages a question, with scores (retrieve with a large `top_k`)
    max_share: a wrong page that scores more than this share of the best right page is left out: such pages are often
      right without a label (arXiv 2407.15831, section 4.1: TopK-PercPos). 1 leaves out those that score higher.

    At most `num_candidates` - 1 right pages are taken, by score; one that the run does not hold comes after those that
    it does, without a bound on the wrong ones if it holds none. Questions with fewer than two candidates are left out.
    The pages come in falling order of score, so that `traces.training_candidates` may shuffle them or not.

    Raises ValueError for a run without scores, num_candidates < 2, and a question that the corpus does not have.
    """
    if run.scores is None:
        raise ValueError("the run has no scores: hard negatives are chosen by them")
    if num_candidates < 2:
        raise ValueError(f"num_candidates is {num_candidates}; a right and a wrong page need at least 2")
    mined: dict[str, list[int]] = {}
    scores_of: dict[str, list[float]] = {}
    for question, pages in run.pages.items():
        if question not in corpus.by_id:
            raise ValueError(f"{corpus.folder} has no question {question!r}: the run belongs to another corpus")
        gold = corpus.by_id[question]["gold_pages"]
        scores = dict(zip(pages, run.scores[question], strict=True))
        lowest = min(scores.values(), default=0.0)
        right = sorted(gold, key=lambda page: -scores.get(page, -np.inf))[: num_candidates - 1]
        top = max((scores[page] for page in gold if page in scores), default=None)
        # A share of a score below 0 would lie above it.
        bound = np.inf if top is None else top - (1 - max_share) * abs(top)
        wrong = [page for page in pages if page not in gold and scores[page] <= bound][: num_candidates - len(right)]
        if wrong:
            chosen = sorted([*right, *wrong], key=lambda page: -scores.get(page, lowest))
            mined[question] = chosen
            scores_of[question] = [scores.get(page, lowest) for page in chosen]
    return Run(mined, scores_of)


def bm25_scores(texts: list[str], queries: list[str], stopwords: str | list[str] = "en") -> np.ndarray | None:
    r"""BM25 of each text for each query, shape (queries, texts); None if no text has a word.

    Words are `\w+`, lower case, without stemming; `stopwords` is a list of words to leave out, or "en" for
    bm25s's English list. Lucene's variant with k1 = 1.5, b = 0.75, as bm25s computes it
    (https://arxiv.org/abs/2407.03618): a word w of the query adds, with N texts of which n hold w,

        ln(1 + (N - n + .5) / (n + .5)) · tf / (tf + k1 · (1 - b + b · length / mean length))
    """
    words = content_words(texts, stopwords)
    if not any(words):
        return None  # bm25s cannot index this
    index = bm25s.BM25(k1=1.5, b=0.75, method="lucene")
    index.index(words, show_progress=False)
    scores = np.zeros((len(queries), len(texts)), dtype=np.float32)
    for row, query in zip(scores, content_words(queries, stopwords), strict=True):
        if query:
            row[:] = index.get_scores(query)
    return scores


def content_words(texts: list[str], stopwords: str | list[str] = "en") -> list[list[str]]:
    """The words of each text as BM25 counts them: lower case, without stop words."""
    return bm25s.tokenize(texts, token_pattern=r"\w+", stopwords=stopwords, return_ids=False, show_progress=False)


def write_trec(run: Run, corpus: Corpus, path: str | Path, tag: str = "mmr5") -> None:
    """Write a run as TREC lines `question Q0 page rank score tag`, ranks from 1.

    Without scores, 1 / rank stands in. Scores are lowered where they tie, in steps that trec_eval's single precision
    still tells apart, because other tools sort by score and break ties their own way.

    Raises RunError for an unknown question, a score that is not finite, or a tag with white space; the file is then
    left as it was.
    """
    if tag.split() != [tag]:
        raise RunError(f"the tag {tag!r} must be one word")
    documents = dict(zip(corpus.questions["question_id"], corpus.questions["doc_name"], strict=True))
    with replacing(Path(path)) as new, new.open("w", encoding="utf-8") as file:
        for question, pages in run.pages.items():
            if question not in documents:
                raise RunError(f"{corpus.folder} has no question {question!r}")
            scores = run.scores[question] if run.scores else [1 / rank for rank in range(1, len(pages) + 1)]
            if not np.isfinite(scores).all():
                raise RunError(f"question {question!r} has scores that are not finite: {list(scores)}; rank it again")
            for rank, (page, score) in enumerate(zip(pages, _falling(scores), strict=True), 1):
                name = page_id(documents[question], page)
                file.write(f"{question} Q0 {name} {rank} {score:.{_DECIMALS}f} {tag}\n")


def _falling(scores: Sequence[float]) -> Iterator[float]:
    """The scores, rounded, each below the one before also in single precision."""
    below = float("inf")
    for score in scores:
        written = round(min(float(score), below), _DECIMALS)
        yield written
        below = written - max(10**-_DECIMALS, 2 * float(np.spacing(np.float32(abs(written)))))


def read_trec(path: str | Path, corpus: Corpus) -> Run:
    """Read a TREC run; pages are sorted by score, falling, and ties by the written rank.

    Raises RunError, naming file and line, for a line without six fields or with a rank or score that is not a
    number, a question or page that the corpus does not have, a page of another document than the question's,
    and a page that a question lists twice; and for a file that is missing or empty.
    """
    documents = dict(zip(corpus.questions["question_id"], corpus.questions["doc_name"], strict=True))
    entries: dict[str, dict[int, tuple[float, int]]] = {}
    for where, line in _lines(Path(path)):
        fields = line.split()
        if len(fields) != 6:
            raise RunError(
                f"{where}: {len(fields)} fields instead of `question Q0 page rank score tag`; write the run again"
            )
        question, _, name, rank_text, score_text, _ = fields
        try:
            rank, score = int(rank_text), float(score_text)
        except ValueError:
            raise RunError(
                f"{where}: rank {rank_text!r} or score {score_text!r} is not a number; write them as digits"
            ) from None
        if not np.isfinite(score):
            raise RunError(f"{where}: the score is {score_text}, which has no order; rank question {question!r} again")
        if question not in documents:
            raise RunError(f"{where}: the corpus has no question {question!r}; {_ITS_CORPUS}")
        try:
            doc_name, page = parse_page_id(name)
        except CorpusError as error:
            raise RunError(f"{where}: {error}") from None
        if doc_name != documents[question]:
            raise RunError(
                f"{where}: page {name!r} is not of the question's document {documents[question]!r}; {_ITS_CORPUS}"
            )
        if page >= corpus.num_pages(doc_name):
            last = corpus.num_pages(doc_name) - 1
            raise RunError(f"{where}: {doc_name!r} has no page {page}, only 0 to {last}; {_ITS_CORPUS}")
        pages = entries.setdefault(question, {})
        if page in pages:
            raise RunError(f"{where}: page {name!r} is listed twice for question {question!r}; keep its better line")
        pages[page] = (-score, rank)
    if not entries:
        raise RunError(f"{path} holds no rankings; retrieve or rerank again")
    order = {question: sorted(pages, key=pages.__getitem__) for question, pages in entries.items()}
    scores = {question: [-entries[question][page][0] for page in pages] for question, pages in order.items()}
    return Run(order, scores)


def write_qrels(corpus: Corpus, path: str | Path) -> None:
    """Write the gold pages as TREC labels, a line `question 0 page 1` for each."""
    columns = ["question_id", "doc_name", "gold_pages"]
    with replacing(Path(path)) as new, new.open("w", encoding="utf-8") as file:
        for question, doc_name, gold in corpus.questions[columns].itertuples(index=False):
            file.writelines(f"{question} 0 {page_id(doc_name, page)} 1\n" for page in gold)


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """("file, line n", line) of each line that is not blank."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RunError(f"the run {path} does not exist") from None
    except (IsADirectoryError, UnicodeDecodeError) as error:
        raise RunError(f"{path} is not a text file: {error}") from None
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{path}, line {number}", line
