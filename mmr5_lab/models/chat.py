"""Ask a server with OpenAI's chat interface from many threads at once, and lose nothing to faults that pass.

    reply = Chat("http://localhost:8000/v1", "i2vec/MM-R5").ask(messages, max_tokens=200)
    reply.problem or reply.answer

The key is read from the environment variable OPENAI_API_KEY and written nowhere.
"""

import email.utils
import io
import json
import logging
import math
import os
import random
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import openai

from mmr5_lab.html import data_url, visible
from mmr5_lab.images import Page, open_page, plain_file
from mmr5_lab.models.replies import Reply, own_words, read_reply

logger = logging.getLogger(__name__)

KEY_VARIABLE = "OPENAI_API_KEY"
LONGEST_PAUSE = 60.0  # seconds between two tries, where the server does not say how long
LONGEST_WAIT = 600.0  # seconds that a server may ask to wait; beyond that the work ends
TOKEN_SIDE = 28  # pixels of a visual token of Qwen2.5-VL, whose processor would round a page's sides to multiples of it

_FATAL = (401, 402, 403, 404, 405)  # a wrong key, an empty account, a forbidden or unknown model or path
_FATAL_CODES = {"insufficient_quota", "billing_hard_limit_reached", "billing_not_active", "invalid_api_key"}
_OPTIONS = ("max_tokens", "top_p", "temperature", "seed")  # that some models do not take
_NOT_TAKEN = re.compile("(?i)unsupported|not support|instead|deprecated|unrecognized|not permitted|cannot both")
_TOO_LONG = re.compile(
    r"context (?:length|window|size)|context_length|model length|too (?:long|large)|at most \d+ image", re.IGNORECASE
)


@dataclass(eq=False)
class RequestError(Exception):
    """A request that got no reply. Its message is one line: a kind, the server, what happened, without the key."""

    message: str
    billable: bool = False  # the server may have worked for it, and send a bill
    passing: bool = False  # the same request may succeed later
    fatal: bool = False  # every other request would fail too: a wrong key, model or address, an empty account
    wait: float | None = None  # seconds that the server asks to wait
    option: str | None = None  # of the request, which the server does not take

    def __str__(self) -> str:
        return self.message


class Chat:
    """Requests to one model of one server; `ask` may be called from any number of threads.

    base_url: up to and with /v1; model: the name that the server knows it by
    concurrency: requests under way at once; per_minute: requests sent at most; timeout: seconds without a word
    retries: further tries after the first; pause: seconds before the second try, doubled each time (with jitter).
        Where the server says how long to wait (Retry-After), all requests wait.

    Raises ValueError for options out of range, an incomplete address, and a key that no HTTP header can hold.
    """

    # openai's own retries are off: they ask an empty account again (a 429), keep their place while they wait, sleep on
    # after `close`, take a body that is no JSON for an answer, and hide the tries from whoever books their cost.

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
        if concurrency < 1 or (per_minute is not None and per_minute <= 0):
            raise ValueError(f"concurrency is {concurrency} and per_minute {per_minute}: they must be positive")
        self.address, self.model, self.concurrency = check_address(base_url), model, concurrency
        self.timeout, self.retries, self.pause = timeout, retries, pause
        self._interval = 60 / per_minute if per_minute else 0.0
        self._slots, self._lock, self._ended = threading.Semaphore(concurrency), threading.Lock(), threading.Event()
        self._next = self._not_before = 0.0  # times of time.monotonic
        self._why_ended = ""
        self._reached = False  # has the server ever answered?
        self._renamed: dict[str, str | None] = {}  # options that the server does not take -> those that it takes
        self._client = openai.OpenAI(base_url=base_url, api_key=_key(), timeout=timeout, max_retries=0)

    def ask(
        self,
        messages: list[dict[str, Any]],
        each_try: Callable[[Callable[[], Reply]], Reply] = lambda send: send(),
        **options: Any,
    ) -> Reply:
        """Return the server's reply, which need not be an answer (`Reply.problem`); `options` go into the request.

        each_try: called for each try with the function that sends it; an error that it raises itself ends the request

        A reply is final, whatever it says. Tried again are rate limits, server errors, cut connections, and bodies that
        are no chat completion. Options that the model does not take are renamed or left out from then on. Raises
        RequestError where the request was refused or all tries failed, and after `close` or a fatal one.
        """
        return self._until_answered("/chat/completions", {"messages": messages}, _chat_reply, each_try, **options)

    def rerank(self, query: str, documents: list[dict[str, Any]]) -> list[float]:
        """Return the score that a reranking server (/v1/rerank) gives each document, in their order.

        documents: each {"content": parts of a chat message}, as vLLM takes them. Raises RequestError as `ask`.
        """
        request = {"query": query, "documents": documents}
        return self._until_answered("/rerank", request, partial(_scores, len(documents)))

    def _until_answered(
        self,
        path: str,
        request: dict[str, Any],
        read: Callable[[str], Any],
        each_try: Callable[[Callable[[], Any]], Any] = lambda send: send(),
        **options: Any,
    ) -> Any:
        tries = 0
        while True:
            sent = {new: value for name, value in options.items() if (new := self._renamed.get(name, name))}
            try:
                with self._slots:
                    self._wait_for_turn()
                    return each_try(partial(self._post, path, {"model": self.model, **request, **sent}, read))
            except RequestError as error:
                failed = error
            if failed.option in sent:
                self._rename(failed.option, failed)
                continue
            tries += 1
            if not failed.passing or tries > self.retries:
                if failed.fatal:
                    self._end(str(failed))
                raise failed
            wait = min(self.pause * 2 ** (tries - 1), LONGEST_PAUSE) * random.uniform(0.5, 1.0)
            if failed.wait is not None:
                wait = failed.wait
                with self._lock:
                    self._not_before = max(self._not_before, time.monotonic() + wait)
                if wait > 30:
                    logger.warning("%s; going on in %.0f s", failed, wait)
            if self._ended.wait(wait):
                raise failed

    def close(self) -> None:
        """Send nothing more and try nothing again."""
        self._end("closed: the chat was closed before the server answered")
        self._client.close()

    def _end(self, why: str) -> None:
        self._why_ended = self._why_ended or why
        self._ended.set()

    def _wait_for_turn(self) -> None:
        with self._lock:
            start = max(time.monotonic(), self._next, self._not_before)
            self._next = start + self._interval
        while (wait := max(start, self._not_before) - time.monotonic()) > 0 and not self._ended.wait(wait):
            pass
        if self._ended.is_set():
            raise RequestError(self._why_ended, fatal=True)

    def _post(self, path: str, request: dict[str, Any], read: Callable[[str], Any]) -> Any:
        # Not through chat.completions.create, which walks through messages part by part: half of a request's work.
        # As text: openai's ChatCompletion checks no types.
        body = json.dumps(request).encode()
        try:
            answer = read(self._client.post(path, cast_to=str, content=body))
        except openai.APIStatusError as error:
            raise self._refusal(error) from None
        except openai.APIConnectionError as error:
            raise self._no_answer(error) from None
        except ValueError as error:
            message = f"unreadable: {self.address}: {_line(str(error))}"
            raise RequestError(message, billable=True, passing=True) from None
        except RuntimeError:
            if not self._ended.is_set():
                raise
            raise RequestError(self._why_ended, billable=True, fatal=True) from None  # the client closed meanwhile
        self._reached = True
        return answer

    def _refusal(self, error: openai.APIStatusError) -> RequestError:
        """What an HTTP error says."""
        self._reached = True
        status, codes = error.status_code, {str(error.code), str(error.type)}
        kind = "filtered" if "content_filter" in codes else f"{type(error).__name__} {status}"
        message = own_words(error.body) or (json.dumps(error.body) if error.body else str(error))
        # A service that checks each page answers 403 to the one that it does not like.
        of_this_page = status == 403 and re.search("moderation|flagged", message)
        fatal = bool(codes & _FATAL_CODES) or (status in _FATAL and not of_this_page)
        wait = _retry_after(error.response.headers)
        if wait is not None and wait > LONGEST_WAIT:
            fatal, message = True, f"it asks to wait {wait / 3600:.1f} hours, start again then: {message}"
        option = _option_not_taken(message, error.param) if status in (400, 422) else None
        if status == 413 or (status == 400 and _TOO_LONG.search(message)):
            option = None
            message = (
                "too much for it, lower the pixels of a page (max_pixels), the pages shown at once (candidates, window)"
                f" or the room for the answer (max_new_tokens): {message}"
            )
        if status == 404:
            message = f"it has no such path or model: {message}"
        return RequestError(
            f"{kind}: {self.address}: {_line(message)}",
            passing=not fatal and (status in (408, 409, 429) or status >= 500),
            fatal=fatal,
            wait=wait,
            option=option,
        )

    def _no_answer(self, error: openai.APIConnectionError) -> RequestError:
        """What kept a request from being answered."""
        if isinstance(error, openai.APITimeoutError):
            message = f"timeout: {self.address}: no word within {self.timeout:g} s"
            return RequestError(message, billable=True, passing=True)
        causes: list[BaseException] = [error]
        while cause := causes[-1].__cause__ or causes[-1].__context__:
            causes.append(cause)
        wrong = any(isinstance(cause, ConnectionRefusedError | socket.gaierror | ssl.SSLError) for cause in causes)
        # A server that has answered before may be starting again; before that the address is wrong.
        return RequestError(
            f"no connection: {self.address}: {_line(str(causes[-1]) or type(causes[-1]).__name__)}",
            billable=not wrong,
            passing=self._reached or not wrong,
            fatal=wrong,
        )

    def _rename(self, option: str, failed: RequestError) -> None:
        with self._lock:
            if option not in self._renamed:
                self._renamed[option] = "max_completion_tokens" if option == "max_tokens" else None
                logger.warning("from now on sent with %s: %s", self._renamed[option] or f"no {option}", failed)


def check_address(base_url: str) -> str:
    """Return a server's address for messages, without user and query. Raises ValueError where it is none."""
    try:
        parts = urlsplit(base_url)
        if parts.scheme in ("http", "https") and parts.hostname and not re.search(r"\s", base_url) and parts.port != 0:
            return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        why = "it must begin with http:// or https:// and end with /v1, such as http://localhost:8000/v1"
    except ValueError as error:  # of a port that is none
        why = str(error)
    raise ValueError(f"{visible(base_url)!r} is not the address of a server: {why}")


def with_images(messages: list[dict[str, Any]], urls: Iterable[str]) -> list[dict[str, Any]]:
    """Return the messages with each image placeholder replaced by a URL, in their order."""
    parts = ({"type": "image_url", "image_url": {"url": url}} for url in urls)
    return [
        {**message, "content": [next(parts) if part["type"] == "image" else part for part in message["content"]]}
        for message in messages
    ]


def page_url(page: Page, max_pixels: int | None = None) -> str:
    """Return a page as a data URL of a file that every server shows alike (`images.plain_file`).

    max_pixels: a page with more is made smaller, its sides in proportion, to multiples of `TOKEN_SIDE`; None: it keeps
        its size
    """
    data, kind = plain_file(page)
    if max_pixels is not None:
        image = open_page(data)
        scale = (max_pixels / (image.width * image.height)) ** 0.5
        if scale < 1:
            buffer = io.BytesIO()
            width, height = (max(1, int(side * scale)) for side in image.size)
            whole = (width // TOKEN_SIDE * TOKEN_SIDE or width, height // TOKEN_SIDE * TOKEN_SIDE or height)
            image.resize(whole).save(buffer, kind, quality=90)
            data = buffer.getvalue()
    return data_url(data, kind)


def _chat_reply(body: str) -> Reply:
    reply = read_reply(body)
    return replace(reply, detail=_line(reply.detail))


def _scores(n: int, body: str) -> list[float]:
    """Return the scores of n documents in a reranking server's answer. Raises ValueError where one is missing."""
    answer = json.loads(body)
    try:
        scores = {int(result["index"]): float(result["relevance_score"]) for result in answer["results"]}
    except (KeyError, TypeError) as error:
        raise ValueError(f"no list of results with index and relevance_score: {body[:200]}") from error
    if set(scores) != set(range(n)) or not all(map(math.isfinite, scores.values())):
        raise ValueError(f"scores of documents {sorted(scores)} where {n} were sent: {body[:200]}")
    return [scores[k] for k in range(n)]


def _option_not_taken(message: str, param: Any) -> str | None:
    """The option that an error says the model does not take."""
    if not _NOT_TAKEN.search(message):
        return None
    if param in _OPTIONS:
        return param
    return next((name for name in _OPTIONS if re.search(rf"\b{name}\b", message)), None)


def _retry_after(headers: Any) -> float | None:
    """Seconds that the server asks to wait (Retry-After: seconds or a date), or None."""
    text = headers.get("retry-after", "")
    try:
        return max(0.0, float(text))
    except ValueError:
        date = email.utils.parsedate_tz(text)
        return max(0.0, email.utils.mktime_tz(date) - time.time()) if date else None


def _line(text: str) -> str:
    """A text as one line of at most 300 characters, without the key, should the server have repeated it."""
    if key := os.environ.get(KEY_VARIABLE):
        text = text.replace(key, "(key)")
    return visible(" ".join(text.split()))[:300]


def _key() -> str:
    """The key. Raises ValueError where no header can hold it, which httpx would call a connection error."""
    key = os.environ.get(KEY_VARIABLE) or "none"
    if odd := re.search("[^!-~]", key):
        raise ValueError(
            f"{KEY_VARIABLE} is not a key: character {odd.end()} of {len(key)} is {odd[0]!a}. Set it again"
        )
    return key
