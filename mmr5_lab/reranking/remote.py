"""Rank pages through any server with OpenAI's chat interface that takes images, such as vLLM with the released weights.

    vllm serve i2vec/MM-R5 --limit-mm-per-prompt '{"image": 20}'

    remote = RemoteReranker("http://localhost:8000/v1", "i2vec/MM-R5", concurrency=16)
    remote.rank_many(pairs)

Prompts and parsing are those of `rerank.Reranker`. Requests that fail for a passing reason (429, 5xx, time-outs, cut
connections, answers that are not JSON) are tried again with growing pauses; what failed for good is named at the end,
after everything else has been given out, so that `rerank.rerank_run` keeps it and asks only for the rest next time.
"""

import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import lru_cache
from typing import Any

from mmr5_lab.models.chat import Chat, Reply, page_url, told, with_images
from mmr5_lab.prompting.answers import parse_ranking
from mmr5_lab.prompting.prompts import build_messages
from mmr5_lab.reranking.pages import Pages, Pair
from mmr5_lab.reranking.ranking import Ranker, Ranking, RemoteError

KEPT_URLS = 1024  # pages that are kept as they are sent: a page stands in several questions' candidates
_END_TOKEN = re.compile(r"<\|\w+\|>\Z")


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
        pause: float = 0.5,
        max_new_tokens: int = 2048,
        temperature: float = 0.0,
        seed: int | None = None,
    ):
        if concurrency < 1:
            raise ValueError(f"concurrency is {concurrency}: it must be at least 1")
        self.base_url, self.model, self.concurrency = base_url, model, concurrency
        self.timeout, self.retries, self.pause = timeout, retries, pause
        self.max_new_tokens, self.temperature, self.seed = max_new_tokens, temperature, seed
        self._sizes = {}

    def rank_each(
        self, pairs: Sequence[Pair], mode: str = "reason", batch_size: int = 16
    ) -> Iterator[tuple[int, Ranking]]:
        """Yield (index, ranking) as answers come; `batch_size` is not used, the server batches by itself.

        Raises ValueError for bad input before anything is sent, RemoteError at the end if requests failed for good.
        """
        if mode != "reason":
            raise ValueError(f"mode {mode!r} needs the model's logits, which a server does not give: use mode 'reason'")
        pages = Pages(pairs, self._sizes)  # which also loads images that were opened lazily, before threads share them
        url = lru_cache(KEPT_URLS)(lambda key: page_url(pages.source(key)))
        requests = [build_messages(query, len(keys)) for (query, _), keys in zip(pairs, pages.keys, strict=True)]
        failures: dict[int, str] = {}
        pool = ThreadPoolExecutor(2 * self.concurrency)  # those that wait to be tried again take a thread, not a place
        chat = Chat(
            self.base_url,
            self.model,
            concurrency=self.concurrency,
            timeout=self.timeout,
            retries=self.retries,
            pause=self.pause,
        )
        try:
            asked = {
                pool.submit(self._ask, chat, messages, keys, url): i
                for i, (messages, keys) in enumerate(zip(requests, pages.keys, strict=True))
            }
            for future in as_completed(asked):
                try:
                    yield asked[future], future.result()
                except Exception as error:  # one odd answer or page must not cost the others
                    failures[asked[future]] = told(error)
        finally:
            chat.close()  # when the caller stops, nothing more is sent or tried again
            pool.shutdown(wait=False, cancel_futures=True)
        if failures:
            raise RemoteError(failures, len(pairs))

    def _ask(
        self, chat: Chat, messages: list[dict[str, Any]], keys: list[bytes], url: Callable[[bytes], str]
    ) -> Ranking:
        started = time.perf_counter()
        options: dict[str, Any] = {} if self.seed is None else {"seed": self.seed}
        reply = chat.ask(
            with_images(messages, map(url, keys)),
            max_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=1.0,
            **options,
        )
        return _ranking(reply, len(keys), time.perf_counter() - started)


def _ranking(reply: Reply, n: int, seconds: float) -> Ranking:
    text = reply.text
    if reply.apart:
        apart = _END_TOKEN.sub("", reply.apart)  # which transformers leaves where the block was not closed
        text = f"<think>{apart}</think>{text}" if text else f"<think>{apart}"
    parsed = parse_ranking(text, n)
    faults = parsed.faults | ({"truncated"} if reply.ended == "length" else set())
    return Ranking(list(parsed.order), parsed.think or None, text, faults, None, reply.completion_tokens, seconds)
