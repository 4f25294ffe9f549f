"""Rank pages through any server with OpenAI's chat interface that takes images, such as vLLM with the released weights.

    vllm serve i2vec/MM-R5 --limit-mm-per-prompt '{"image": 20}'

    remote = RemoteReranker("http://localhost:8000/v1", "i2vec/MM-R5", concurrency=16)
    remote.rank_many(pairs)

Prompts and parsing are those of `local.Reranker`. What failed is named at the end, after everything else has been
yielded, so that `rerank_run` keeps the rest and asks only for what is missing next time.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import lru_cache, partial
from typing import Any

from mmr5_lab.models.chat import Chat, RequestError, check_address, page_url, with_images
from mmr5_lab.prompting.answers import parse_ranking
from mmr5_lab.prompting.prompts import build_messages
from mmr5_lab.reranking.pages import Pages, Pair
from mmr5_lab.reranking.ranking import Ranker, Ranking, RemoteError, check_decoding

KEPT_URLS = 1024  # pages that are kept as they are sent: a page stands in several questions' candidates


class RemoteReranker(Ranker):
    """Asks a server. Only mode "reason": the others need the model's own logits.

    base_url: up to and with /v1; model: the name that the server knows it by
    concurrency, timeout, retries, pause: as of `Chat`
    max_pixels: pages with more are made smaller before they are sent; None: pages keep their size
    max_new_tokens: tokens of an answer at most; temperature, seed: how it is sampled

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
        max_pixels: int | None = None,
        max_new_tokens: int = 2048,
        temperature: float = 0.0,
        seed: int | None = None,
    ):
        if concurrency < 1:
            raise ValueError(f"concurrency is {concurrency}: it must be at least 1")
        check_decoding(temperature, max_new_tokens)
        check_address(base_url)
        self._open_chat = partial(
            Chat, base_url, model, concurrency=concurrency, timeout=timeout, retries=retries, pause=pause
        )
        self.concurrency, self.max_pixels = concurrency, max_pixels
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
        url = lru_cache(KEPT_URLS)(lambda key: page_url(pages.source(key), self.max_pixels))
        prompts = [build_messages(query, len(keys)) for (query, _), keys in zip(pairs, pages.keys, strict=True)]
        chat = self._open_chat()
        failures: dict[int, str] = {}
        fatal = False
        pool = ThreadPoolExecutor(2 * self.concurrency)  # a request that waits to be tried again takes only a thread
        try:
            futures = {
                pool.submit(self._ask, chat, messages, keys, url): i
                for i, (messages, keys) in enumerate(zip(prompts, pages.keys, strict=True))
            }
            for future in as_completed(futures):
                error = future.exception()
                if error is None:
                    yield futures[future], future.result()
                elif isinstance(error, RequestError):
                    failures[futures[future]] = str(error)
                    fatal = fatal or error.fatal
                else:  # an odd page must not cost the others
                    failures[futures[future]] = f"{type(error).__name__}: {error}"
        finally:
            chat.close()  # when the caller stops, nothing more is sent or tried again
            pool.shutdown(wait=False, cancel_futures=True)
        if failures:
            raise RemoteError(failures, len(pairs), fatal)

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
        # A text that was cut off, or that holds no ranking, is the model's own: it has faults, as from a local model.
        if reply.problem not in (None, "cut", "empty") or not reply.text.strip():
            raise RequestError(reply.reason)
        parsed = parse_ranking(reply.text, len(keys))
        faults = parsed.faults | ({"truncated"} if reply.problem == "cut" else set())
        seconds = time.perf_counter() - started
        return Ranking(
            list(parsed.order), parsed.think or None, reply.text, faults, None, reply.completion_tokens or 0, seconds
        )
