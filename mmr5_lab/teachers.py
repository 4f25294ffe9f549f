"""Who explains a page to the student: the offline evidence teacher.

A teacher is given a question, one page and its label, and says why the page can or cannot help answer the
question (arXiv 2506.12364, data construction). A teacher of your own needs the same three members:
`name`, `explain` and `refine`.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import pandas as pd

from mmr5_lab.corpus import Corpus
from mmr5_lab.mini.documents import PageContent, describe


class Teacher(Protocol):
    """Writes the reasoning of a trace; `name` is recorded in it."""

    name: str

    def explain(self, question: pd.Series, page: int, positive: bool) -> str:
        """Why `page` (0-based) can (`positive`) or cannot help; `question` is a row of `Corpus.questions`."""

    def refine(self, question: pd.Series, pages: Sequence[int], positives: Sequence[int]) -> str:
        """One sentence for the positive images, one for the rest; `positives` are 1-based places in `pages`."""


class EvidenceTeacher:
    """Explains from the known content of a page: which words, cell or bar answer the question, or what is missing.

    It needs documents whose annotations list what each page states (key "pages") and questions with their
    asked parts (key "facts"), as the miniature's do. Its verdict is the label's, as for the paper's teacher.

    Raises ValueError, naming document or question, where that content is not annotated.
    """

    name = "evidence"

    def __init__(self, corpus: Corpus):
        extra = corpus.documents.set_index("doc_name")["extra"]
        self._pages: dict[str, list[PageContent]] = {}
        for doc_name, known in extra.items():
            if "pages" not in known:
                raise ValueError(
                    f"document {doc_name!r} has no known page content: the evidence teacher cannot explain it"
                )
            self._pages[str(doc_name)] = [PageContent(**_tuples(page)) for page in known["pages"]]

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
        return self._pages[question["doc_name"]][page]

    def _asked(self, question: pd.Series) -> dict[str, str]:
        if "facts" not in question["extra"]:
            raise ValueError(
                f"question {question['question_id']!r} has no known facts: the evidence teacher cannot explain it"
            )
        return question["extra"]["facts"]


def _tuples(page: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in page.items()}
