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

from mmr5_lab.models.chat import Chat, RequestError, page_url, with_images
from mmr5_lab.prompting.answers import parse_ranking
from mmr5_lab.prompting.prompts import build_messages
from mmr5_lab.reranking.pages import Pages, Pair
from mmr5_lab.reranking.ranking import Ranker, Ranking, RemoteError, check_decoding

KEPT_URLS = 1024  # pages that are kept as they are sent: a page stands in several questions' candidates


class RemoteReranker(Ranker):
    """Asks a server. Only mode "reason": the others need the model's own logits.

    max_pixels: pages with more are made smaller before they are sent; None: pages keep their size
    max_new_tokens: tokens of an answer at most; temperature, seed: how it is sampled
    base_url, model, chat: as of `Chat`, such as timeout and retries. Raises ValueError as it does.

    The key is read from the environment variable OPENAI_API_KEY when a request is made, and is kept nowhere.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        max_pixels: int | None = None,
        max_new_tokens: int = 2048,
        temperature: float = 0.0,
        seed: int | None = None,
        concurrency: int = 8,
        **chat: Any,
    ):
        check_decoding(temperature, max_new_tokens)
        self._open_chat = partial(Chat, base_url, model, concurrency=concurrency, **chat)
        self._open_chat().close()  # names a bad option, address or key now
        self.concurrency, self.max_pixels, self.max_new_tokens = concurrency, max_pixels, max_new_tokens
        self._options: dict[str, Any] = {"max_tokens": max_new_tokens, "temperature": temperature, "top_p": 1.0}
        if seed is not None:
            self._options["seed"] = seed
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
        reply = chat.ask(with_images(messages, map(url, keys)), **self._options)
        # A text that was cut off, or that holds no ranking, is the model's own: it has faults, as from a local model.
        if reply.problem not in (None, "cut", "empty") or not reply.text.strip():
            raise RequestError(reply.reason)
        parsed = parse_ranking(reply.text, len(keys))
        faults = parsed.faults | ({"truncated"} if reply.problem == "cut" else set())
        spent = reply.completion_tokens or 0, time.perf_counter() - started
        return Ranking(list(parsed.order), parsed.think or None, reply.text, faults, None, *spent)
