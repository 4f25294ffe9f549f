"""Rankings of a corpus's questions, and the TREC files that hold them.

Lines are `question Q0 page rank score tag`; labels (qrels) are `question 0 page 1`.
"""

import codecs
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmr5_lab.corpus.documents import Corpus
from mmr5_lab.corpus.ids import CorpusError, name_key, page_id, parse_page_id, question_key
from mmr5_lab.files import replacing

_DECIMALS = 5  # of written scores
_ITS_CORPUS = "read the run with the corpus (split, padding) that it was made from"


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


def rank_by_score(scores: Iterable[tuple[str, np.ndarray]], top_k: int) -> Rankings:
    """Return the `top_k` best pages of each question from (question id, score of each page); ties in page order."""
    pages, kept = {}, {}
    for question, row in scores:
        order = np.argsort(-row, kind="stable")[:top_k]
        pages[question], kept[question] = order.tolist(), row[order].tolist()
    return Rankings(pages, kept)


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
                raise RankingsError(f"question {question!r} has scores that are not finite: {list(scores)}")
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
    the form of accents and `.pdf`.

    Raises RankingsError, naming file and line, for a line that has not six fields with an integer rank and a finite
    score, a question or page that the corpus does not have, a page of another document than the question's, and a page
    that a question lists twice; and for a file that is missing or empty.
    """
    documents = dict(zip(corpus.questions["question_id"], corpus.questions["doc_name"], strict=True))
    spellings = {question_key(question): question for question in documents}
    entries: dict[str, dict[int, tuple[float, int]]] = {}  # question -> page -> what it is sorted by
    lines = [(number, line) for number, line in enumerate(_read(Path(path)).split("\n"), 1) if line.strip()]
    for line_number, line in lines:
        where = f"{path}, line {line_number}"
        try:
            name, _, page, rank, score, _ = line.split()
            order = -float(score), int(rank)
            if not np.isfinite(order[0]):
                raise ValueError
        except ValueError:
            raise RankingsError(
                f"{where} is not `question Q0 page rank score tag` with an integer rank and a finite score, but "
                f"{line.strip()!r:.200}; write the run again"
            ) from None
        question = name if name in documents else spellings.get(question_key(name))
        if question is None:
            raise RankingsError(f"{where}: the corpus has no question {name!r}; {_ITS_CORPUS}")
        try:
            doc_name, number = parse_page_id(page)
        except CorpusError as error:
            raise RankingsError(f"{where}: {error}") from None
        if name_key(doc_name) != name_key(documents[question]):
            raise RankingsError(
                f"{where}: page {page!r} is not of the question's document {documents[question]!r}; {_ITS_CORPUS}"
            )
        if number >= (count := corpus.num_pages(documents[question])):
            from_1 = number == count and not any(":0 " in line for _, line in lines)
            cause = "does the run count pages from 1? Or " if from_1 else ""
            raise RankingsError(
                f"{where}: {documents[question]!r} has no page {number}, only 0 to {count - 1}; {cause}{_ITS_CORPUS}"
            )
        if entries.setdefault(question, {}).setdefault(number, order) is not order:
            raise RankingsError(f"{where}: page {page!r} is listed twice for question {name!r}; keep its better line")
    if not entries:
        raise RankingsError(f"{path} holds no rankings; retrieve or rerank again")
    ranked = {question: sorted(pages, key=pages.__getitem__) for question, pages in entries.items()}
    return Rankings(ranked, {q: [-entries[q][page][0] for page in pages] for q, pages in ranked.items()})


def _read(path: Path) -> str:
    """Return the text of a file in UTF-8, or in UTF-16 with a byte-order mark, as editors on Windows write it."""
    try:
        data = path.read_bytes()
        utf16 = len(data) > 2 and data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        return data.decode("utf-16" if utf16 else "utf-8-sig")
    except FileNotFoundError:
        raise RankingsError(f"the run {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RankingsError(f"{path} is not a text file in UTF-8 ({error}): save it as UTF-8") from None


def write_qrels(corpus: Corpus, path: str | Path) -> None:
    """Write the gold pages as TREC labels, a line `question 0 page 1` for each."""
    columns = ["question_id", "doc_name", "gold_pages"]
    with replacing(Path(path)) as new, new.open("w", encoding="utf-8") as file:
        for question, doc_name, gold in corpus.questions[columns].itertuples(index=False):
            file.writelines(f"{question} 0 {page_id(doc_name, page)} 1\n" for page in gold)
