"""Teachers, which explain pages to the student: any model behind OpenAI's chat interface, or an offline one.

A teacher gets a question, one page and its label, and says why the page can or cannot help answer the question
(arXiv 2506.12364, data construction). A teacher of your own needs the members of `Teacher`, which must be safe to call
from several threads if it also has `workers`.
"""

import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import pandas as pd

from mmr5_lab.corpus.documents import Corpus
from mmr5_lab.models.chat import Chat, RequestError, page_url
from mmr5_lab.models.replies import Reply
from mmr5_lab.prompting.prompts import refine_prompt, teacher_prompt
from mmr5_lab.retrieval.bm25 import bm25_scores, content_words
from mmr5_lab.traces.account import Account

PAGE_TOKENS = 1500  # of a page at most: GPT-4o counts 1,445 for the largest, Qwen2.5-VL 1,282 at 1,003,520 pixels
TEMPLATE_TOKENS = 50  # that a chat template adds to a prompt, at most


class Teacher(Protocol):
    """Writes the reasoning of a trace; `name` is recorded in it."""

    name: str

    def explain(self, question: pd.Series, page: int, positive: bool) -> str:
        """Return why `page` (0-based) can (`positive`) or cannot help; `question` is a row of `Corpus.questions`."""

    def refine(self, question: pd.Series, pages: Sequence[int], positives: Sequence[int]) -> str:
        """Return a sentence on the positive images and one on the rest; `positives` are 1-based places in `pages`."""


class TeacherError(RuntimeError):
    """One page that the teacher did not explain, in the form "kind: more"; others may be asked for."""


class TeacherGoneError(RuntimeError):
    """The teacher would refuse every further page too."""


@contextmanager
def open_teacher(
    corpus: Corpus,
    server: str | None = None,
    model: str | None = None,
    answers: str | Path = "answers.sqlite",
    *,
    concurrency: int = 16,
    per_minute: float | None = None,
    timeout: float = 120.0,
    price_in: float = 0.0,
    price_out: float = 0.0,
    budget: float | None = None,
    max_pixels: int | None = None,
    max_tokens: int = 300,
    offline: Teacher | None = None,
) -> "Iterator[Teacher]":
    """Open the teacher `model` on a server (see `Chat`, `Account`), or without both `offline` (or a `QuoteTeacher`).

    max_pixels: pages with more are made smaller before they are sent; max_tokens: of an answer, its thinking included

    Raises ValueError where only one of server and model is named, and like `Chat` and `Account`.
    """
    if bool(server) != bool(model):
        raise ValueError("a teacher on a server needs both: the server's address and the model's name there")
    if not server or not model:
        yield offline or QuoteTeacher(corpus)
        return
    chat = Chat(server, model, concurrency=concurrency, per_minute=per_minute, timeout=timeout)
    account = Account(answers, price_in=price_in, price_out=price_out, budget=budget)
    try:
        yield ServerTeacher(corpus, chat, account, max_tokens=max_tokens, max_pixels=max_pixels)
    finally:
        chat.close()
        account.close()


def think_lines(teacher: Teacher, question: pd.Series, pages: Sequence[int], positives: Sequence[int]) -> str:
    """Return a line `Image i: …` for each page, in order; `positives` are 1-based places in `pages`."""
    labels = [i in positives for i in range(1, len(pages) + 1)]
    texts = getattr(teacher, "map", map)(partial(teacher.explain, question), pages, labels)
    return "\n".join(f"Image {i}: {' '.join(text.split())}" for i, text in enumerate(texts, 1))


class ServerTeacher:
    """Asks a vision-language model on a server, as the paper asked GPT-4o: one page with its label at a time.

    account: keeps every answer by question, page image and request, so that no answer is paid for twice
    max_tokens, max_pixels: as of `open_teacher`

    One teacher asks nothing twice, not even what got no answer: orders of a question share its pages. `explain` and
    `refine` raise TeacherError where the server gave no answer (`replies.PROBLEMS`) or a request failed for good,
    TeacherGoneError where all would fail (a wrong key, an unknown model, an empty account), BudgetError where a request
    could pass the budget.
    """

    def __init__(
        self, corpus: Corpus, chat: Chat, account: Account, *, max_tokens: int = 300, max_pixels: int | None = None
    ):
        self.name, self.account = chat.model, account
        self._corpus, self._chat, self._max_tokens, self._max_pixels = corpus, chat, max_tokens, max_pixels
        self._options = {"max_tokens": max_tokens, "temperature": 0.0}
        self._page_tokens = PAGE_TOKENS
        # A trace's pages are asked for at once, or at a run's end few traces would leave most places empty; but one
        # after another within a budget, of which each request under way takes the most that it can cost.
        self.map: Callable[..., Iterator[str]] = ThreadPoolExecutor(self.workers).map if account.budget is None else map
        self._lock = threading.Lock()
        self._answers: dict[str, Future[str]] = {}

    @property
    def workers(self) -> int:
        """Threads to call from; more than requests under way, since one that waits to be tried again takes a thread."""
        return 2 * self._chat.concurrency

    def explain(self, question: pd.Series, page: int, positive: bool) -> str:
        image = self._corpus.page_bytes(question["doc_name"], page)
        return self._answer(teacher_prompt(question["question"], positive), image)

    def refine(self, question: pd.Series, pages: Sequence[int], positives: Sequence[int]) -> str:
        lines = think_lines(self, question, pages, positives)
        return self._answer(refine_prompt(question["question"], positives, lines), None)

    def _answer(self, prompt: str, image: bytes | None) -> str:
        """The answer to a prompt with or without an image. Threads that want the same share one request."""
        parts: list[Any] = [self.name, self._options, prompt, hashlib.sha256(image).hexdigest() if image else None]
        parts += [] if self._max_pixels is None else [self._max_pixels]  # answers of before it was an option stay valid
        key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
        with self._lock:
            first = key not in self._answers
            future = self._answers.setdefault(key, Future())
        if first:
            try:
                future.set_result(self.account.find(key) or self._send(key, prompt, image))
            except BaseException as error:
                future.set_exception(error)
        return future.result()

    def _send(self, key: str, prompt: str, image: bytes | None) -> str:
        content: list[dict[str, Any]] = [{"type": "text", "text": prompt}]
        if image:
            content.append({"type": "image_url", "image_url": {"url": page_url(image, self._max_pixels)}})
        booked = partial(self._booked, key, len(prompt.encode()), bool(image))
        try:
            reply = self._chat.ask([{"role": "user", "content": content}], booked, **self._options)
        except RequestError as error:
            raise (TeacherGoneError if error.fatal else TeacherError)(str(error)) from None
        if reply.problem:
            raise TeacherError(reply.reason + (f"; max_tokens is {self._max_tokens}" if reply.problem == "cut" else ""))
        return reply.answer

    def _booked(self, key: str, words: int, shown: bool, send: Callable[[], Reply]) -> Reply:
        """Send a request once; what it costs is booked before, at a token for each byte, and corrected after."""
        page = self._page_tokens if shown else 0
        most = words + TEMPLATE_TOKENS + page, self._max_tokens
        number = self.account.open_try(key, self.name, *most)
        try:
            reply = send()
        except RequestError as error:
            tokens = most if error.billable else (0, 0)
            self.account.close_try(number, *tokens, problem=str(error).partition(":")[0])
            raise
        tokens = (0, 0) if reply.problem == "failed" else most  # where the server does not count
        if reply.prompt_tokens is not None and reply.completion_tokens is not None:
            tokens = reply.prompt_tokens, reply.completion_tokens
        self.account.close_try(number, *tokens, None if reply.problem else reply.answer, reply.problem or "")
        if self.account.budget is not None and shown:  # a page counts more than was thought: the next may, too
            with self._lock:
                self._page_tokens = max(self._page_tokens, page + tokens[0] - most[0])
        return reply


class QuoteTeacher:
    """Explains from a page's words: quotes the passage that fits the question best, and says what it has and lacks.

    Of a positive page without a word of the question (a chart, a scan without OCR) it returns "", and the trace is
    rejected as empty.
    """

    name = "quotes"
    PASSAGE = 16  # words quoted; with what is said around them an explanation stays within the paper's 40
    LISTED = 4  # words of the question named

    def __init__(self, corpus: Corpus):
        self._corpus = corpus

    def explain(self, question: pd.Series, page: int, positive: bool) -> str:
        quote, has, lacks = self._evidence(question, page)
        if positive:
            return f'The page says "{quote}", with {_listed(has)}. It answers the question.' if has else ""
        if not has:
            return f"The page has no words on {_listed(lacks)}. It does not help."
        missing = f"without {_listed(lacks)}" if lacks else "but not what is asked"
        return f'The nearest words, "{quote}", have {_listed(has)}, {missing}. It does not help.'

    def refine(self, question: pd.Series, pages: Sequence[int], positives: Sequence[int]) -> str:
        evidence = {i: self._evidence(question, pages[i - 1]) for i in positives}
        if not all(has for _, has, _ in evidence.values()):
            return ""
        sentences = [f'Image {i} says "{quote}", with {_listed(has)}.' for i, (quote, has, _) in evidence.items()]
        return " ".join([*sentences, "The other images do not help."])

    def _evidence(self, question: pd.Series, page: int) -> tuple[str, list[str], list[str]]:
        """The passage that fits question and answer best, and the question's words that it has and lacks."""
        words = self._corpus.page_text(question["doc_name"], page).replace('"', "'").split()
        step = self.PASSAGE // 2
        passages = [" ".join(words[k : k + self.PASSAGE]) for k in range(0, max(1, len(words) - step), step)]
        wanted = list(dict.fromkeys(content_words([question["question"]], "en_plus")[0]))
        scores = bm25_scores(passages, [f"{question['question']} {question['answer']}"])
        if scores is None:
            return "", [], wanted[: self.LISTED]
        quote = passages[int(scores[0].argmax())]
        quoted = set(content_words([quote], "en_plus")[0])
        has, lacks = [w for w in wanted if w in quoted], [w for w in wanted if w not in quoted]
        return quote, has[: self.LISTED], lacks[: self.LISTED]


def _listed(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words) or "what is asked"
