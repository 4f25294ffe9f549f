"""The miniature's own teacher: it explains a page from what the page is known to state."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from mmr5_lab.corpus.documents import Corpus
from mmr5_lab.mini.documents import PageContent, describe
from mmr5_lab.traces.teachers import QuoteTeacher


def evidence_teacher(corpus: Corpus) -> "EvidenceTeacher | QuoteTeacher":
    """The offline teacher for a corpus: by its annotated page content where it has that, else by the pages' words."""
    annotated = all("pages" in known for known in corpus.documents["extra"])
    return EvidenceTeacher(corpus) if annotated else QuoteTeacher(corpus)


class EvidenceTeacher:
    """Explains from the known content of a page: which words, cell or bar answer the question, or what is missing.

    It needs documents whose annotations list what each page states (key "pages") and questions with their
    asked parts (key "facts"), as the miniature's do. Its verdict is the label's, as for the paper's teacher.

    Raises ValueError, naming document or question, where that content is not annotated.
    """

    name = "evidence"

    def __init__(self, corpus: Corpus):
        self._corpus = corpus
        self._content_of: dict[int, PageContent] = {}  # row of the page file; a document may borrow pages of others
        for doc_name, known in zip(corpus.documents["doc_name"], corpus.documents["extra"], strict=True):
            if "pages" not in known:
                raise ValueError(
                    f"document {doc_name!r} has no known page content: the evidence teacher cannot explain it"
                )
            contents = [PageContent(**_tuples(page)) for page in known["pages"]]
            self._content_of |= dict(zip(corpus.rows(doc_name), contents, strict=False))

    def explain(self, question: pd.Series, page: int, positive: bool) -> str:
        verdict = "It answers the question." if positive else "It does not help."
        return f"{describe(self._content(question, page), self._asked(question))}. {verdict}"

    def refine(self, question: pd.Series, pages: Sequence[int], positives: Sequence[int]) -> str:
        sentences = []
        for number in positives:
            content = self._content(question, pages[number - 1])
            sentences.append(f"Image {number} shows {describe(content, self._asked(question))}.")
        return " ".join([*sentences, "The other images do not."])

    def _content(self, question: pd.Series, page: int) -> PageContent:
        return self._content_of[self._corpus.rows(question["doc_name"])[page]]

    def _asked(self, question: pd.Series) -> dict[str, str]:
        if "facts" not in question["extra"]:
            raise ValueError(
                f"question {question['question_id']!r} has no known facts: the evidence teacher cannot explain it"
            )
        return question["extra"]["facts"]


def _tuples(page: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in page.items()}
