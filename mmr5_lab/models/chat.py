"""Ask a server with OpenAI's chat interface, from many threads at once, and lose nothing to faults that pass.

    chat = Chat("http://localhost:8000/v1", "i2vec/MM-R5", concurrency=16)
    chat.ask(with_images(messages, map(page_url, pages)), max_tokens=200, temperature=0.0).text
    chat.close()

The key is read from the environment variable OPENAI_API_KEY and written nowhere.
"""

import email.utils
import json
import os
import random
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import openai
from openai.types.chat import ChatCompletion

from mmr5_lab.html import data_url
from mmr5_lab.images import Page, plain_file

KEY_VARIABLE = "OPENAI_API_KEY"
LONGEST_PAUSE = 60.0  # seconds between two tries


@dataclass(frozen=True)
class Reply:
    """What a server answered: `apart` is what it gave as reasoning beside the text, `ended` its finish reason."""

    text: str
    apart: str
    ended: str | None
    prompt_tokens: int
    completion_tokens: int


class BadAnswerError(Exception):
    """The server answered, but not with a chat completion."""


class StoppedError(Exception):
    """The chat was closed before the server answered."""


class Chat:
    """Requests to one model of one server; `ask` may be called from any number of threads.

    base_url: up to and with /v1; model: the name that the server knows it by
    concurrency: requests under way at once; one that waits to be tried again takes no place
    timeout: seconds without a word from the server
    retries: further tries after the first; pause: seconds before the second try, doubled each time (with jitter).
        Where the server says how long to wait (Retry-After), all requests do.
    per_minute: requests sent a minute at most
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        concurrency: int = 8,
        timeout: float = 600.0,
        retries: int = 5,
        pause: float = 0.5,
        per_minute: float | None = None,
    ):
        if concurrency < 1:
            raise ValueError(f"concurrency is {concurrency}: it must be at least 1")
        if per_minute is not None and per_minute <= 0:
            raise ValueError(f"per_minute is {per_minute}: it must be positive")
        self.base_url, self.model, self.concurrency = base_url, model, concurrency
        self.retries, self.pause = retries, pause
        self._interval = 60 / per_minute if per_minute else 0.0
        self._slots, self._lock, self._closed = threading.Semaphore(concurrency), threading.Lock(), threading.Event()
        self._next = self._not_before = 0.0  # times of time.monotonic
        self._client = openai.OpenAI(
            base_url=base_url, api_key=os.environ.get(KEY_VARIABLE) or "none", timeout=timeout, max_retries=0
        )

    def ask(
        self,
        messages: list[dict[str, Any]],
        trying: Callable[[Exception | None], None] = lambda failed: None,
        **options: Any,
    ) -> Reply:
        """The server's answer; `options` go into the request.

        trying: called right before each try, with the error of the one before; what it raises ends the request

        Raises the last error where the request was refused or all tries failed, StoppedError after `close`.
        """
        # not through chat.completions.create, which walks through messages part by part: half of a request's work
        body = json.dumps({"model": self.model, "messages": messages, **options}).encode()
        failed: Exception | None = None
        for attempt in range(self.retries + 1):
            try:
                with self._slots:
                    self._wait_for_turn()
                    trying(failed)
                    return _reply(self._client.post("/chat/completions", cast_to=ChatCompletion, content=body))
            except (openai.OpenAIError, BadAnswerError, ValueError) as error:
                if attempt == self.retries or not passing(error):
                    raise
                failed = error
                told = _told_to_wait(error)
                if told is None:
                    wait = min(self.pause * 2**attempt, LONGEST_PAUSE) * random.uniform(0.5, 1.0)
                else:
                    wait = min(told, LONGEST_PAUSE)
                    with self._lock:
                        self._not_before = max(self._not_before, time.monotonic() + wait)
                if self._closed.wait(wait):
                    raise
        raise AssertionError("unreachable")

    def close(self) -> None:
        """Send nothing more and try nothing again."""
        self._closed.set()
        self._client.close()

    def _wait_for_turn(self) -> None:
        with self._lock:
            start = max(time.monotonic(), self._next, self._not_before)
            self._next = start + self._interval
        while (left := max(start, self._not_before) - time.monotonic()) > 0 and not self._closed.wait(left):
            pass
        if self._closed.is_set():
            raise StoppedError("the chat was closed")


def passing(error: Exception) -> bool:
    """May the same request succeed later? Not where the server understood it and said no."""
    status = getattr(error, "status_code", None)
    return not refuses_all(error) and (status is None or status in (408, 409, 429) or status >= 500)


def refuses_all(error: Exception) -> bool:
    """Would the server refuse every other request too: for its key, its model's name, its account?"""
    return getattr(error, "status_code", None) in (401, 403, 404) or (
        getattr(error, "code", None) == "insufficient_quota"
    )


def told(error: Exception) -> str:
    """An error in one line: its name, status and text, without the key, should the server have repeated it."""
    status = getattr(error, "status_code", None)
    text = str(error)
    if key := os.environ.get(KEY_VARIABLE):
        text = text.replace(key, "(key)")
    return f"{type(error).__name__}{f' {status}' if status else ''}: {text[:200]}"


def with_images(messages: list[dict[str, Any]], urls: Iterable[str]) -> list[dict[str, Any]]:
    """The messages with each image placeholder replaced by a URL, in their order."""
    left = iter(urls)

    def part(given: dict[str, Any]) -> dict[str, Any]:
        if given["type"] != "image":
            return given
        return {"type": "image_url", "image_url": {"url": next(left)}}

    return [{**message, "content": [part(p) for p in message["content"]]} for message in messages]


def page_url(page: Page) -> str:
    """Return a page as a data URL of a file that every server shows alike (`images.plain_file`)."""
    return data_url(*plain_file(page))


def _reply(answer: Any) -> Reply:
    try:
        choice = answer.choices[0]
        text = choice.message.content or ""
        # servers with a reasoning parser (vLLM, transformers) give what stood within <think> apart
        apart = getattr(choice.message, "reasoning_content", None) or getattr(choice.message, "reasoning", None) or ""
        tokens = (answer.usage.prompt_tokens, answer.usage.completion_tokens) if answer.usage else (0, 0)
        if not (isinstance(text, str) and isinstance(apart, str) and all(isinstance(t, int) for t in tokens)):
            raise TypeError
        (text + apart).encode()
    except (AttributeError, IndexError, KeyError, TypeError, UnicodeEncodeError):
        raise BadAnswerError(f"the answer is not a chat completion: {str(answer)[:80]!r}") from None
    return Reply(text, apart, choice.finish_reason, *tokens)


def _told_to_wait(error: Exception) -> float | None:
    """Seconds that the server asks to wait (Retry-After: seconds or a date), or None."""
    response = getattr(error, "response", None)
    text = response.headers.get("retry-after", "") if response is not None else ""
    try:
        return max(0.0, float(text))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return None
