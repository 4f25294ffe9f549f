"""Who explains a page to the student: any model behind OpenAI's chat interface, or an offline evidence teacher.

A teacher is given a question, one page and its label, and says why the page can or cannot help answer the
question (arXiv 2506.12364, data construction). A teacher of your own needs the same three members:
`name`, `explain` and `refine`, which must be safe to call from several threads if it also has `workers`.

    with open_teacher(corpus) as teacher:                                                      # offline
    with open_teacher(corpus, "https://api.openai.com/v1", "gpt-4o", "answers.sqlite") as teacher:
"""

import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import openai
import pandas as pd

from mmr5_lab.corpus.documents import Corpus
from mmr5_lab.models.chat import BadAnswerError, Chat, page_url, refuses_all, told
from mmr5_lab.prompting.prompts import refine_prompt, teacher_prompt
from mmr5_lab.retrieval.bm25 import bm25_scores, content_words
from mmr5_lab.traces.account import Account

PAGE_TOKENS = 1500
"""What a page may count as at most: GPT-4o counts 1,445 for the largest, Qwen2.5-VL 1,282 at 1,003,520 pixels."""


class Teacher(Protocol):
    """Writes the reasoning of a trace; `name` is recorded in it."""

    name: str

    def explain(self, question: pd.Series, page: int, positive: bool) -> str:
        """Why `page` (0-based) can (`positive`) or cannot help; `question` is a row of `Corpus.questions`."""

    def refine(self, question: pd.Series, pages: Sequence[int], positives: Sequence[int]) -> str:
        """One sentence for the positive images, one for the rest; `positives` are 1-based places in `pages`."""


class TeacherError(RuntimeError):
    """One page that the teacher did not explain; others may be asked for."""


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
    offline: Teacher | None = None,
) -> "Iterator[Teacher]":
    """The teacher `model` on a server (see `Chat`, `Account`), or without both the offline one; closed at the end.

    Raises ValueError where only one of them is given, and like `Chat` and `Account`.
    """
    if bool(server) != bool(model):
        raise ValueError("a teacher on a server needs both: the server's address and the model's name there")
    if not server or not model:
        yield offline or QuoteTeacher(corpus)
        return
    chat = Chat(server, model, concurrency=concurrency, per_minute=per_minute, timeout=timeout)
    account = Account(answers, price_in=price_in, price_out=price_out, budget=budget)
    try:
        yield ServerTeacher(corpus, chat, account)
    finally:
        chat.close()
        account.close()


def think_lines(teacher: Teacher, question: pd.Series, pages: Sequence[int], positives: Sequence[int]) -> str:
    """A line `Image i: …` for each page, in order; `positives` are 1-based places in `pages`."""
    right = [i in positives for i in range(1, len(pages) + 1)]
    explained = getattr(teacher, "map", map)(partial(teacher.explain, question), pages, right)
    return "\n".join(f"Image {i}: {' '.join(text.split())}" for i, text in enumerate(explained, 1))


class ServerTeacher:
    """Asks a vision-language model on a server, as the paper asked GPT-4o: one page with its label at a time.

    account: keeps every answer by question, page image and request, so that nothing is asked twice
    options: of the request; "max_tokens" (or "max_completion_tokens") bounds what an answer may cost
    page_tokens: what the server counts for a page image at most; a prompt's words count a token a byte

    `explain` and `refine` raise TeacherError where a call failed for good, TeacherGoneError where all would (a wrong
    key, an unknown model, an empty account), BudgetError where the call could pass the budget.
    """

    def __init__(
        self,
        corpus: Corpus,
        chat: Chat,
        account: Account,
        *,
        options: Mapping[str, Any] | None = None,
        page_tokens: int = PAGE_TOKENS,
    ):
        self.name, self.account = chat.model, account
        self._corpus, self._chat, self._page_tokens = corpus, chat, page_tokens
        self._options = dict(options or {"max_tokens": 300, "temperature": 0.0})
        self._most = max(int(self._options.get(key, 0)) for key in ("max_tokens", "max_completion_tokens"))
        if account.budget is not None and not self._most:
            raise ValueError("a budget needs max_tokens (or max_completion_tokens) among the options")
        # A trace's pages are asked for at once, or at a run's end few traces would leave most places empty; but one
        # after another within a budget, of which each call under way takes the most that it can cost.
        self.map: Callable[..., Iterator[str]] = ThreadPoolExecutor(self.workers).map if account.budget is None else map
        self._lock = threading.Lock()
        self._under_way: dict[str, Future[str]] = {}

    @property
    def workers(self) -> int:
        """Threads to call from: more than are under way at once, since those that wait to try again take no place."""
        return 2 * self._chat.concurrency

    def explain(self, question: pd.Series, page: int, positive: bool) -> str:
        return self._ask(
            teacher_prompt(question["question"], positive), self._corpus.page_bytes(question["doc_name"], page)
        )

    def refine(self, question: pd.Series, pages: Sequence[int], positives: Sequence[int]) -> str:
        return self._ask(
            refine_prompt(question["question"], positives, think_lines(self, question, pages, positives)), None
        )

    def _ask(self, prompt: str, image: bytes | None) -> str:
        """The answer to a prompt with or without an image; calls for the same are made once."""
        shown = hashlib.sha256(image).hexdigest() if image else None
        request = json.dumps([self.name, self._options, prompt, shown], sort_keys=True)
        key = hashlib.sha256(request.encode()).hexdigest()
        with self._lock:
            future = self._under_way.get(key)
            ours = future is None
            if future is None:
                future = self._under_way[key] = Future()
        if ours:
            try:
                answer = self.account.find(key)
                future.set_result(self._send(key, prompt, image) if answer is None else answer)
            except BaseException as error:
                future.set_exception(error)
            finally:
                with self._lock:
                    del self._under_way[key]
        return future.result()

    def _send(self, key: str, prompt: str, image: bytes | None) -> str:
        content: list[dict[str, Any]] = [{"type": "text", "text": prompt}]
        if image:
            content.append({"type": "image_url", "image_url": {"url": page_url(image)}})
        bound = len(prompt.encode()) + 50 + (self._page_tokens if image else 0)  # 50: the chat template's own
        number: int | None = None

        def trying(failed: Exception | None) -> None:
            nonlocal number
            if failed is not None:
                self._refused(number, failed)
            number = self.account.open_try(key, self.name, bound, self._most)

        try:
            reply = self._chat.ask([{"role": "user", "content": content}], trying=trying, **self._options)
        except (openai.OpenAIError, BadAnswerError, ValueError) as error:
            self._refused(number, error)
            kind = TeacherGoneError if refuses_all(error) else TeacherError
            raise kind(told(error)) from None
        if reply.prompt_tokens > bound and self.account.budget is not None:
            raise_to = reply.prompt_tokens - bound + self._page_tokens
            with self._lock:
                self._page_tokens = max(self._page_tokens, raise_to)
        answer = reply.text.rpartition("</think>")[2].strip()  # of a teacher that reasons aloud
        assert number is not None
        tokens = (reply.prompt_tokens, reply.completion_tokens)
        self.account.close_try(number, *(tokens if any(tokens) else (bound, self._most)), answer)
        return answer

    def _refused(self, number: int | None, error: Exception) -> None:
        """A try that the server refused costs nothing; one that was cut off or answered oddly may, so it stays."""
        if number is not None and getattr(error, "status_code", None) is not None:
            self.account.close_try(number, 0, 0)


class QuoteTeacher:
    """Explains from a page's words: quotes the passage that fits the question best, and says what it has and lacks.

    For any page with text. Of a positive page without a word of the question (a chart, a scan without OCR) it has
    nothing to say, "", and the trace is rejected as empty.
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
            return f"The page has no words on {_listed(lacks[: self.LISTED])}. It does not help."
        missing = f"without {_listed(lacks)}" if lacks else "but not what is asked"
        return f'The nearest words, "{quote}", have {_listed(has)}, {missing}. It does not help.'

    def refine(self, question: pd.Series, pages: Sequence[int], positives: Sequence[int]) -> str:
        evidence = {i: self._evidence(question, pages[i - 1]) for i in positives}
        said = [f'Image {i} says "{quote}", with {_listed(has)}.' for i, (quote, has, _) in evidence.items() if has]
        return " ".join([*said, "The other images do not help."]) if len(said) == len(positives) else ""

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
        held = set(content_words([quote], "en_plus")[0])
        has, lacks = ([w for w in wanted if (w in held) is given][: self.LISTED] for given in (True, False))
        return quote, has, lacks


def _listed(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words) or "what is asked"
