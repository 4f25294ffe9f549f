"""Rankings of a corpus's questions, and the TREC files that hold them.

Lines are `question Q0 page rank score tag`; labels (qrels) are `question 0 page 1`.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmr5_lab.corpus.documents import Corpus
from mmr5_lab.corpus.ids import CorpusError, page_id, parse_page_id
from mmr5_lab.files import replacing

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

    Raises RankingsError, naming file and line, for a line without six fields or with a rank or score that is not a
    number, a question or page that the corpus does not have, a page of another document than the question's,
    and a page that a question lists twice; and for a file that is missing or empty.
    """
    entries: dict[str, dict[int, tuple[float, int]]] = {}  # question -> page -> what it is sorted by
    documents = dict(zip(corpus.questions["question_id"], corpus.questions["doc_name"], strict=True))
    for where, line in _lines(Path(path)):
        question, page, score, rank = _parse_line(line, where)
        if question not in documents:
            raise RankingsError(f"{where}: the corpus has no question {question!r}; {_ITS_CORPUS}")
        pages = entries.setdefault(question, {})
        number = _page_number(page, documents[question], corpus, where)
        if number in pages:
            raise RankingsError(
                f"{where}: page {page!r} is listed twice for question {question!r}; keep its better line"
            )
        pages[number] = (-score, rank)
    if not entries:
        raise RankingsError(f"{path} holds no rankings; retrieve or rerank again")
    order = {question: sorted(pages, key=pages.__getitem__) for question, pages in entries.items()}
    scores = {question: [-entries[question][page][0] for page in pages] for question, pages in order.items()}
    return Rankings(order, scores)


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
    if name != doc_name:
        raise RankingsError(f"{where}: page {page!r} is not of the question's document {doc_name!r}; {_ITS_CORPUS}")
    if number >= corpus.num_pages(name):
        last = corpus.num_pages(name) - 1
        raise RankingsError(f"{where}: {name!r} has no page {number}, only 0 to {last}; {_ITS_CORPUS}")
    return number


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
        raise RankingsError(f"the run {path} does not exist") from None
    except (IsADirectoryError, UnicodeDecodeError) as error:
        raise RankingsError(f"{path} is not a text file: {error}") from None
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{path}, line {number}", line
