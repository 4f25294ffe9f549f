"""Rank pages through any server with OpenAI's chat interface that takes images, such as vLLM with the released weights.

    vllm serve i2vec/MM-R5 --limit-mm-per-prompt '{"image": 20}'

    remote = RemoteReranker("http://localhost:8000/v1", "i2vec/MM-R5", concurrency=16)
    remote.rank_many(pairs)

Prompts and parsing are those of `rerank.Reranker`. Requests that fail for a passing reason (429, 5xx, time-outs, cut
connections, answers that are not JSON) are tried again with growing pauses; what failed for good is named at the end,
after everything else has been given out, so that `rerank.rerank_run` keeps it and asks only for the rest next time.
"""

import io
import os
import random
import re
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import openai
from PIL import Image

from mmr5_lab.corpus import as_rgb
from mmr5_lab.parsing import parse_ranking
from mmr5_lab.prompts import build_messages
from mmr5_lab.rerank import Page, Pair, Ranker, Ranking, RemoteError
from mmr5_lab.typeset import data_url

KEY_VARIABLE = "OPENAI_API_KEY"
_END_TOKEN = re.compile(r"<\|\w+\|>\Z")
LONGEST_PAUSE = 60.0  # seconds between two tries


class RemoteReranker(Ranker):
    """Asks a server. Only mode "reason": the others need the model's own logits.

    base_url: up to and with /v1; model: the name that the server knows it by
    concurrency: requests under way at once
    timeout: seconds without a word from the server
    retries: further tries after the first; pause: seconds before the second try, doubled each time (with jitter),
        unless the server says how long (Retry-After)

    The key is read from the environment variable OPENAI_API_KEY when a request is made, and is kept nowhere.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        concurrency: int = 8,
        timeout: float = 600.0,
        retries: int = 5,
        pause: float = 1.0,
        max_new_tokens: int = 2048,
        temperature: float = 0.0,
        seed: int | None = None,
    ):
        if concurrency < 1:
            raise ValueError(f"concurrency is {concurrency}: it must be at least 1")
        self.base_url, self.model, self.concurrency = base_url, model, concurrency
        self.timeout, self.retries, self.pause = timeout, retries, pause
        self.max_new_tokens, self.temperature, self.seed = max_new_tokens, temperature, seed

    def rank_each(
        self, pairs: Sequence[Pair], mode: str = "reason", batch_size: int = 16
    ) -> Iterator[tuple[int, Ranking]]:
        """Yield (index, ranking) as answers come; `batch_size` is not used, the server batches by itself.

        Raises ValueError for bad input before anything is sent, RemoteError at the end if requests failed for good.
        """
        if mode != "reason":
            raise ValueError(f"mode {mode!r} needs the model's logits, which a server does not give: use mode 'reason'")
        self.check(pairs)  # which also loads images that were opened lazily, before threads share them
        requests = [build_messages(query, len(pages)) for query, pages in pairs]
        stopped = threading.Event()
        failures: dict[int, str] = {}
        pool = ThreadPoolExecutor(self.concurrency)
        client = openai.OpenAI(
            base_url=self.base_url,
            api_key=os.environ.get(KEY_VARIABLE) or "none",
            timeout=self.timeout,
            max_retries=0,
        )
        try:
            asked = {
                pool.submit(self._ask, client, messages, pages, stopped): i
                for i, (messages, (_, pages)) in enumerate(zip(requests, pairs, strict=True))
            }
            for future in as_completed(asked):
                try:
                    yield asked[future], future.result()
                except Exception as error:  # one odd answer or page must not cost the others
                    failures[asked[future]] = _told(error)
        finally:
            stopped.set()  # when the caller stops, nothing more is sent or tried again
            client.close()
            pool.shutdown(wait=False, cancel_futures=True)
        if failures:
            raise RemoteError(failures, len(pairs))

    def _ask(
        self, client: openai.OpenAI, messages: list[dict[str, Any]], pages: Sequence[Page], stopped: threading.Event
    ) -> Ranking:
        started = time.perf_counter()
        given: Any = _with_images(messages, pages)
        options: dict[str, Any] = {} if self.seed is None else {"seed": self.seed}
        for attempt in range(self.retries + 1):
            try:
                answer = client.chat.completions.create(
                    model=self.model,
                    messages=given,
                    max_tokens=self.max_new_tokens,
                    temperature=self.temperature,
                    top_p=1.0,
                    **options,
                )
                return _ranking(answer, len(pages), time.perf_counter() - started)
            except (openai.OpenAIError, _BadAnswerError, ValueError) as error:
                if attempt == self.retries or not _passing(error):
                    raise
                if stopped.wait(_wait(error, self.pause * 2**attempt)):
                    raise
        raise AssertionError("unreachable")


class _BadAnswerError(Exception):
    """The server answered, but not with a chat completion."""


def _ranking(answer: Any, n: int, seconds: float) -> Ranking:
    try:
        choice = answer.choices[0]
        text, ended = choice.message.content or "", choice.finish_reason
        # servers with a reasoning parser (vLLM, transformers) give what stood within <think> apart
        apart = getattr(choice.message, "reasoning_content", None) or getattr(choice.message, "reasoning", None)
        if apart:
            apart = _END_TOKEN.sub("", apart)  # which transformers leaves where the block was not closed
            text = f"<think>{apart}</think>{text}" if text else f"<think>{apart}"
        tokens = answer.usage.completion_tokens if answer.usage else 0
        if not isinstance(text, str) or not isinstance(tokens, int):
            raise TypeError
        text.encode()
    except (AttributeError, IndexError, KeyError, TypeError, UnicodeEncodeError):
        raise _BadAnswerError(f"the answer is not a chat completion: {str(answer)[:80]!r}") from None
    parsed = parse_ranking(text, n)
    faults = parsed.faults | ({"truncated"} if ended == "length" else set())
    return Ranking(list(parsed.order), parsed.think or None, text, faults, None, tokens, seconds)


def _passing(error: Exception) -> bool:
    """May the same request succeed later? Not where the server understood it and said no."""
    status = getattr(error, "status_code", None)
    return status is None or status in (408, 409, 429) or status >= 500


def _wait(error: Exception, pause: float) -> float:
    response = getattr(error, "response", None)
    told = response.headers.get("retry-after", "") if response is not None else ""
    if told.isascii() and told.isdigit():
        return min(float(told), LONGEST_PAUSE)
    return min(pause, LONGEST_PAUSE) * random.uniform(0.5, 1.0)


def _told(error: Exception) -> str:
    status = getattr(error, "status_code", None)
    return f"{type(error).__name__.strip('_')}{f' {status}' if status else ''}: {str(error)[:200]}"


def _with_images(messages: list[dict[str, Any]], pages: Sequence[Page]) -> list[dict[str, Any]]:
    """The messages with each image placeholder replaced by a page, as a data URL."""
    left = iter(pages)

    def part(given: dict[str, Any]) -> dict[str, Any]:
        if given["type"] != "image":
            return given
        return {"type": "image_url", "image_url": {"url": _as_url(next(left))}}

    return [{**message, "content": [part(p) for p in message["content"]]} for message in messages]


def _as_url(page: Page) -> str:
    data = Path(page).read_bytes() if isinstance(page, str | Path) else page
    if isinstance(data, bytes):
        image = Image.open(io.BytesIO(data))
        if image.format == "JPEG":  # sent as it is; others may be transparent or of kinds that are not taken everywhere
            return data_url(data, "jpeg")
        data = image
    buffer = io.BytesIO()
    as_rgb(data).save(buffer, "PNG")
    return data_url(buffer.getvalue(), "png")
