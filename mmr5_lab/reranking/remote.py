"""Rank pages through any server with OpenAI's chat interface that takes images, such as vLLM with the released weights.

    vllm serve i2vec/MM-R5 --limit-mm-per-prompt '{"image": 20}'

    remote = RemoteReranker("http://localhost:8000/v1", "i2vec/MM-R5", concurrency=16)
    remote.rank_many(pairs)

Prompts, parsing and modes are those of `local.Reranker`. Modes other than "reason" need a server that gives
log-probabilities (`models.served_tokens`). Mode "rerank" asks a reranker that has the interface /v1/rerank, such as
Qwen3-VL-Reranker or jina-reranker-m0 on vLLM, or `mmr5 serve`: it has its own prompt and gives scores.

What failed is named at the end, after everything else has been yielded, so that `rerank_run` keeps the rest and asks
only for what is missing next time.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from functools import lru_cache, partial
from math import exp
from typing import Any

from PIL import Image

from mmr5_lab.images import Page
from mmr5_lab.models.chat import Chat, RequestError, page_url, with_images
from mmr5_lab.models.served_tokens import ServedTokens
from mmr5_lab.prompting.prompts import POINTWISE_ANSWERS, build_messages, build_pointwise_messages
from mmr5_lab.reranking.pages import Pages, Pair, TextPage
from mmr5_lab.reranking.ranking import (
    ANSWER_START,
    CONTENT_FREE,
    SERVER_MODES,
    Ranker,
    Ranking,
    RemoteError,
    check_decoding,
    scored_ranking,
    written_ranking,
)

Messages = list[dict[str, Any]]
KEPT_URLS = 1024  # pages that are kept as they are sent: a page stands in several questions' candidates
MOST_PIXELS = 16_777_216  # of a page as it is sent: Qwen3-VL's limit, above Qwen2.5-VL's 12,845,056; no model sees more


class RemoteReranker(Ranker):
    """Asks a server, greedily unless `temperature` > 0 (mode "reason" alone), as `local.Reranker` asks a model.

    max_pixels: pages with more are made smaller before they are sent; None: those beyond `MOST_PIXELS`
    max_new_tokens: tokens of an answer at most; temperature, seed: how it is sampled
    calibrate: in mode "score", subtract what the model says of blank pages
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
        calibrate: bool = False,
        concurrency: int = 8,
        **chat: Any,
    ):
        check_decoding(temperature, max_new_tokens)
        self._open_chat = partial(Chat, base_url, model, concurrency=concurrency, **chat)
        self._open_chat().close()  # names a bad option, address or key now
        self.concurrency, self.calibrate, self.max_pixels = concurrency, calibrate, max_pixels or MOST_PIXELS
        self._options: dict[str, Any] = {"max_tokens": max_new_tokens, "temperature": temperature, "top_p": 1.0}
        if seed is not None:
            self._options["seed"] = seed
        self._sizes = {}
        self._known: dict[tuple[str, bool], int] = {}  # what was found out about the server
        self._priors: dict[tuple[tuple[int, int], ...], list[float]] = {}

    def rank_each(
        self, pairs: Sequence[Pair], mode: str = "reason", batch_size: int = 16
    ) -> Iterator[tuple[int, Ranking]]:
        """Yield (index, ranking) as answers come; `batch_size` is not used, the server batches by itself.

        Raises ValueError for bad input before anything is sent, RemoteError before any page is sent if the server
        lacks what the mode needs, and at the end if requests failed for good.
        """
        if mode not in SERVER_MODES:
            raise ValueError(f"a server cannot be asked for mode {mode!r}: choose one of {', '.join(SERVER_MODES)}")
        if mode == "direct" and self._options["temperature"]:
            raise ValueError("through a server, mode 'direct' decodes greedily: leave out the temperature")
        pages = Pages(pairs, self._sizes)  # which also loads images that were opened lazily, before threads share them
        messages = [
            build_messages(query, len(keys), pages.shown(keys))
            for (query, _), keys in zip(pairs, pages.keys, strict=True)
        ]
        if pages.texts and (mode == "pointwise" or self.calibrate):
            raise ValueError("mode 'pointwise' and calibration need page images: choose another mode, or leave it out")
        url = lru_cache(KEPT_URLS)(lambda key: self._url(pages, key))
        chat = self._open_chat()
        served = ServedTokens(chat, self._known)
        failures: dict[int, str] = {}
        fatal = False
        pool = ThreadPoolExecutor(2 * self.concurrency)  # a request that waits to be tried again takes only a thread
        try:
            if mode not in ("reason", "rerank"):
                served.check(begun=mode != "pointwise")
            futures = {
                pool.submit(self._ask, mode, served, pairs[i][0], messages[i], keys, pages, url): i
                for i, keys in enumerate(pages.keys)
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
        except RequestError as lacking:
            failures, fatal = dict.fromkeys(range(len(pairs)), str(lacking)), True
        finally:
            chat.close()  # when the caller stops, nothing more is sent or tried again
            pool.shutdown(wait=False, cancel_futures=True)
        if failures:
            raise RemoteError(failures, len(pairs), fatal)

    def prompt_tokens(self, query: str, pages: Sequence[Page | TextPage]) -> int | None:
        """Return the tokens of a question's prompt as the server counts them, or None. Raises RemoteError."""
        held = Pages([(query, pages)])
        [keys] = held.keys
        messages = with_images(build_messages(query, len(keys)), [self._url(held, key) for key in keys])
        chat = self._open_chat()
        try:
            return chat.ask(messages, max_tokens=1).prompt_tokens
        except RequestError as error:
            raise RemoteError({0: str(error)}, 1, error.fatal) from None
        finally:
            chat.close()

    def _url(self, pages: Pages, key: bytes) -> str:
        height, width = pages.sizes[key]
        return page_url(pages.source(key), self.max_pixels if height * width > self.max_pixels else None)

    def _ask(
        self,
        mode: str,
        served: ServedTokens,
        query: str,
        messages: Messages,
        keys: list[bytes],
        pages: Pages,
        url: Callable[[bytes], str],
    ) -> Ranking:
        started = time.perf_counter()
        urls = [url(key) for key in pages.images(keys)]
        messages = with_images(messages, urls)
        if mode == "score":
            ranking = self._score(served, messages, len(keys), tuple(pages.sizes[key] for key in pages.images(keys)))
        elif mode == "pointwise":
            ranking = _pointwise(served, query, urls)
        elif mode == "rerank":
            scores = served.chat.rerank(query, [_document(pages, key, url) for key in keys])
            ranking = replace(scored_ranking(scores), tokens=0)
        else:
            ranking = {"reason": self._reason, "direct": _direct}[mode](served, messages, len(keys))
        return replace(ranking, seconds=time.perf_counter() - started)

    def _reason(self, served: ServedTokens, messages: Messages, n: int) -> Ranking:
        reply = served.chat.ask(messages, **self._options)
        # A text that was cut off, or that holds no ranking, is the model's own: it has faults, as from a local model.
        if reply.problem not in (None, "cut", "empty") or not reply.text.strip():
            raise RequestError(reply.reason)
        return written_ranking(reply.text, n, reply.completion_tokens or 0, cut=reply.problem == "cut")

    def _score(self, served: ServedTokens, messages: Messages, n: int, sizes: tuple[tuple[int, int], ...]) -> Ranking:
        scores = _first_id(served, messages, n)
        if self.calibrate:
            if sizes not in self._priors:
                blank = [
                    page_url(Image.new("RGB", (width, height), "white"), self.max_pixels) for height, width in sizes
                ]
                self._priors[sizes] = _first_id(served, with_images(build_messages(CONTENT_FREE, n), blank), n)
            scores = [a - b for a, b in zip(scores, self._priors[sizes], strict=True)]
        return scored_ranking(scores)


def _document(pages: Pages, key: bytes, url: Callable[[bytes], str]) -> dict[str, Any]:
    """Return a page as a reranking server takes it: its text, its image, or both."""
    [(text, image)] = pages.shown([key]) or [("", True)]
    parts: list[dict[str, Any]] = [{"type": "text", "text": text}] if text else []
    if image:
        parts.append({"type": "image_url", "image_url": {"url": url(key)}})
    return {"content": parts}


def _first_id(served: ServedTokens, messages: Messages, n: int) -> list[float]:
    """Return the log-probability that the answer begins with each id."""
    allowed = served.allowed_ids(n)
    return allowed.scores({
        begun: served.log_probs(messages, tokens, ANSWER_START + "".join(begun))
        for begun, tokens in allowed.branches.items()
    })  # fmt: skip


def _direct(served: ServedTokens, messages: Messages, n: int) -> Ranking:
    tokens = served.permutation(messages, ANSWER_START, served.allowed_ids(n))
    return written_ranking(f"{ANSWER_START}{''.join(tokens)}]</answer>", n, len(tokens), thinking=False)


def _pointwise(served: ServedTokens, query: str, urls: list[str]) -> Ranking:
    yes, no = map(served.first_token, POINTWISE_ANSWERS)

    def probability(url: str) -> float:
        found = served.log_probs(with_images(build_pointwise_messages(query), [url]), [yes, no])
        return 1 / (1 + exp(found[no] - found[yes]))

    with ThreadPoolExecutor(len(urls)) as pool:  # the chat bounds the requests under way
        return scored_ranking(list(pool.map(probability, urls)))
