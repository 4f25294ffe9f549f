"""Rankings of a corpus's questions, and the TREC files that hold them.

Lines are `question Q0 page rank score tag`; labels (qrels) are `question 0 page 1`.
"""

import codecs
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmr5_lab.corpus.documents import Corpus
from mmr5_lab.corpus.ids import CorpusError, name_key, page_id, parse_page_id, question_key
from mmr5_lab.files import replacing

logger = logging.getLogger(__name__)

_DECIMALS = 5  # of written scores
_ITS_CORPUS = "read the run with the corpus (and split) that it was made from"


class RankingsError(ValueError):
    """A run that cannot be read; the message names file and line."""


@dataclass(frozen=True)
class Rankings:
    """Ranked pages of each question.

    pages: question id -> 0-based pages of the question's document, best first; what `metrics.evaluate` takes
    scores: question id -> score of each of these pages, falling or level, or None if there are none
    """

    pages: dict[str, list[int]]
    scores: dict[str, list[float]] | None = None

    @property
    def unmatched(self) -> list[str]:
        """Questions whose pages all score 0: BM25 knows none of their words, so that the order is the pages' own."""
        return [question for question, scores in (self.scores or {}).items() if not any(scores)]


def best(scores: np.ndarray, top_k: int) -> tuple[list[int], list[float]]:
    """Return the places of the `top_k` highest scores, falling, and the scores; ties in the order of places."""
    order = np.argsort(-scores, kind="stable")[:top_k]
    return order.tolist(), scores[order].tolist()


def rank_by_score(scores: Iterable[tuple[str, np.ndarray]], top_k: int) -> Rankings:
    """Return the `top_k` best pages of each question from (question id, score of each page); ties in page order."""
    ranked = {question: best(row, top_k) for question, row in scores}
    return Rankings({q: pages for q, (pages, _) in ranked.items()}, {q: row for q, (_, row) in ranked.items()})


def write_trec(run: Rankings, corpus: Corpus, path: str | Path, tag: str = "mmr5") -> None:
    """Write a run as TREC lines `question Q0 page rank score tag`, ranks from 1.

    Without scores, 1 / rank stands in. Scores are lowered where they tie, in steps that trec_eval's single precision
    still tells apart, because other tools sort by score and break ties their own way.

    Raises RankingsError for an unknown question, a score that is not finite, or a tag with white space; the file is
    then left as it was.
    """
    if tag.split() != [tag]:
        raise RankingsError(f"the tag {tag!r} must be one word")
    documents = dict(zip(corpus.questions["question_id"], corpus.questions["doc_name"], strict=True))
    with replacing(Path(path)) as new, new.open("w", encoding="utf-8") as file:
        for question, pages in run.pages.items():
            if question not in documents:
                raise RankingsError(f"{corpus.folder} has no question {question!r}")
            scores = run.scores[question] if run.scores else [1 / rank for rank in range(1, len(pages) + 1)]
            if not np.isfinite(scores).all():
                raise RankingsError(
                    f"question {question!r} has scores that are not finite: {list(scores)}; rank it again"
                )
            for rank, (page, score) in enumerate(zip(pages, _falling(scores), strict=True), 1):
                name = page_id(documents[question], page)
                file.write(f"{question} Q0 {name} {rank} {score:.{_DECIMALS}f} {tag}\n")


def _falling(scores: Sequence[float]) -> Iterator[float]:
    """Yield the scores, rounded, each below the one before also in single precision."""
    below = float("inf")
    for score in scores:
        written = round(min(float(score), below), _DECIMALS)
        yield written
        below = written - max(10**-_DECIMALS, 2 * float(np.spacing(np.float32(abs(written)))))


def read_trec(path: str | Path, corpus: Corpus) -> Rankings:
    """Read a TREC run; pages are sorted by score, falling, and ties by the written rank.

    The file is UTF-8, or UTF-16 with a byte-order mark. Names of documents may differ from the corpus's in capitals,
    the form of accents and `.pdf`. A run that seems to count pages from 1 gets a logged warning.

    Raises RankingsError, naming file and line, for a line without six fields or with a rank or score that is not a
    number, a question or page that the corpus does not have, a page of another document than the question's,
    and a page that a question lists twice; and for a file that is missing or empty.
    """
    documents = dict(zip(corpus.questions["question_id"], corpus.questions["doc_name"], strict=True))
    spellings = {question_key(question): question for question in documents}
    entries: dict[str, dict[int, tuple[float, int]]] = {}  # question -> page -> what it is sorted by
    lines = list(_lines(Path(path)))
    for where, line in lines:
        name, page, score, rank = _parse_line(line, where)
        question = name if name in documents else spellings.get(question_key(name))
        if question is None:
            raise RankingsError(f"{where}: the corpus has no question {name!r}; {_ITS_CORPUS}")
        number = _page_number(page, documents[question], corpus, where)
        if number == corpus.num_pages(documents[question]):
            from_1 = "" if any(":0 " in line for _, line in lines) else "does the run count pages from 1? Or "
            raise RankingsError(
                f"{where}: {documents[question]!r} has no page {number}, only 0 to {number - 1}; {from_1}{_ITS_CORPUS}"
            )
        pages = entries.setdefault(question, {})
        if number in pages:
            raise RankingsError(f"{where}: page {page!r} is listed twice for question {name!r}; keep its better line")
        pages[number] = (-score, rank)
    if not entries:
        raise RankingsError(f"{path} holds no rankings; retrieve or rerank again")
    order = {question: sorted(pages, key=pages.__getitem__) for question, pages in entries.items()}
    scores = {question: [-entries[question][page][0] for page in pages] for question, pages in order.items()}
    _warn_of_counting_from_1(order, documents, corpus, path)
    return Rankings(order, scores)


def _warn_of_counting_from_1(
    order: dict[str, list[int]], documents: dict[str, str], corpus: Corpus, path: str | Path
) -> None:
    if any(0 in pages for pages in order.values()):
        return
    # How likely page 0 is nowhere among the listed ones, if each page were listed as often as any other.
    chance = math.prod(1 - len(pages) / (corpus.num_pages(documents[q]) + 1) for q, pages in order.items())
    if chance < 0.001:
        logger.warning("%s lists page 0 of no document: pages count from 0 here; does the run count from 1?", path)


def _parse_line(line: str, where: str) -> tuple[str, str, float, int]:
    """Return question, page id, score and rank of a TREC line."""
    fields = line.split()
    if len(fields) != 6:
        raise RankingsError(
            f"{where}: {len(fields)} fields instead of `question Q0 page rank score tag`; write the run again"
        )
    question, _, page, rank_text, score_text, _ = fields
    try:
        rank, score = int(rank_text), float(score_text)
    except ValueError:
        raise RankingsError(
            f"{where}: rank {rank_text!r} or score {score_text!r} is not a number; write them as digits"
        ) from None
    if not np.isfinite(score):
        raise RankingsError(f"{where}: the score is {score_text}, which has no order; rank question {question!r} again")
    return question, page, score, rank


def _page_number(page: str, doc_name: str, corpus: Corpus, where: str) -> int:
    """Return the 0-based page of a page id, which must be one of the question's document."""
    try:
        name, number = parse_page_id(page)
    except CorpusError as error:
        raise RankingsError(f"{where}: {error}") from None
    if name_key(name) != name_key(doc_name):
        raise RankingsError(f"{where}: page {page!r} is not of the question's document {doc_name!r}; {_ITS_CORPUS}")
    if number > corpus.num_pages(doc_name):
        last = corpus.num_pages(doc_name) - 1
        raise RankingsError(f"{where}: {doc_name!r} has no page {number}, only 0 to {last}; {_ITS_CORPUS}")
    return number


def write_qrels(corpus: Corpus, path: str | Path) -> None:
    """Write the gold pages as TREC labels, a line `question 0 page 1` for each."""
    columns = ["question_id", "doc_name", "gold_pages"]
    with replacing(Path(path)) as new, new.open("w", encoding="utf-8") as file:
        for question, doc_name, gold in corpus.questions[columns].itertuples(index=False):
            file.writelines(f"{question} 0 {page_id(doc_name, page)} 1\n" for page in gold)


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yield ("file, line n", line) of each line that is not blank."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise RankingsError(f"the run {path} does not exist") from None
    except OSError as error:
        raise RankingsError(f"{path} is not a text file: {error.strerror}") from None
    utf16 = len(data) > 2 and data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise RankingsError(f"{path} is not a text file in UTF-8 ({error}): save it as UTF-8") from None
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{path}, line {number}", line
