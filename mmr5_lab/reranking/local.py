"""Rerank candidate pages with a vision-language model that sees them all at once.

    reranker = Reranker.from_pretrained("runs/03_grpo/…/model")
    ranking = reranker.rank("What was the revenue in 2015?", ["page1.png", "page2.png"])
    ranking.order, ranking.reasoning, ranking.faults

Modes:

- "reason" thinks, then answers (arXiv 2506.12364);
- "direct" answers at once, decoding held to permutations of the ids;
- "score" reads the probabilities of the ids at the answer's first place in one forward pass (FIRST, arXiv
  2406.15657);
- "pointwise" asks of every page alone whether it is relevant, and ranks by the probability of "True" (RagVL, arXiv
  2407.21439; the wording is that of lightonai/MonoQwen2-VL-v0.1).

An answer that cannot be used is repaired and named in `faults`, never hidden.
"""

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mmr5_lab.images import Page
from mmr5_lab.models.allowed_ids import AllowedIds
from mmr5_lab.models.generation import GREEDY, complete, next_logits
from mmr5_lab.models.loading import load_model
from mmr5_lab.models.memory import context_length
from mmr5_lab.models.threads import SpareCores
from mmr5_lab.models.vision_cache import PageCache
from mmr5_lab.prompting.answers import with_opening
from mmr5_lab.reranking.inputs import Prompt, model_inputs, pointwise_tokens, prompts_of
from mmr5_lab.reranking.pages import Pages, Pair
from mmr5_lab.reranking.ranking import (
    ANSWER_START,
    CONTENT_FREE,
    MODES,
    Ranker,
    Ranking,
    check_decoding,
    scored_ranking,
    written_ranking,
)

PAGES_A_QUERY = 4  # pages that "pointwise" reads in one pass for each query of a batch


class Reranker(Ranker):
    """A loaded model with its way of decoding. Greedy unless `temperature` > 0; then `seed` makes it repeatable.

    calibrate: in mode "score", subtract what the model says of blank pages, which is its liking for places
        (contextual calibration, arXiv 2102.09690)
    page_cache: the cache that the model was given (`mmr5_lab.models.vision_cache`); None: it has none

    Several threads may use one reranker; their batches take turns. Raises ValueError for a temperature below 0 and for
    no room for new tokens.
    """

    def __init__(
        self,
        model,
        processor,
        *,
        max_new_tokens: int = 2048,
        temperature: float = 0.0,
        seed: int | None = None,
        calibrate: bool = False,
        page_cache: PageCache | None = None,
    ):
        check_decoding(temperature, max_new_tokens)
        self.model, self.processor, self.page_cache = model, processor, page_cache
        self.max_new_tokens, self.seed, self.calibrate = max_new_tokens, seed, calibrate
        # options of `generate` that stand over the model's generation configuration
        sampling = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
        self.generation: dict[str, Any] = sampling if temperature > 0 else {**GREEDY}
        ends = model.generation_config.eos_token_id
        self._ends = {processor.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
        tokens_of = lambda text: processor.tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
        self._allowed_ids = lru_cache(lambda n: AllowedIds(tokens_of, n, processor.tokenizer.eos_token_id))
        self._sizes = {}
        self._priors: dict[tuple[tuple[int, int], ...], list[float]] = {}
        # A model keeps its batch's rope deltas, a tokenizer its padding: two batches at once would rank wrongly.
        self._lock = threading.Lock()

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        adapter: str | Path | None = None,
        *,
        page_cache_bytes: int = 1 << 30,
        max_new_tokens: int = 2048,
        temperature: float = 0.0,
        seed: int | None = None,
        calibrate: bool = False,
        **options: Any,
    ) -> "Reranker":
        """Load `model` (and merge `adapter`); `options` go to `models.load_model`.

        page_cache_bytes: bound of the page cache, on the model's device; 0: no cache
        """
        check_decoding(temperature, max_new_tokens)  # before weights are loaded
        loaded, processor = load_model(model, adapter, **options)
        reranker = cls(
            loaded, processor, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, calibrate=calibrate
        )
        if page_cache_bytes and PageCache.supports(loaded):
            reranker.page_cache = PageCache(loaded, page_cache_bytes)
        return reranker

    def rank_each(
        self, pairs: Sequence[Pair], mode: str = "reason", batch_size: int = 16
    ) -> Iterator[tuple[int, Ranking]]:
        """Yield (index, ranking) as batches finish, pairs of like length together.

        All pairs are checked before the first batch, so that bad input cannot cost finished work.
        """
        if mode not in MODES:
            raise ValueError(f"unknown mode {mode!r}: choose one of {', '.join(MODES)}")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: it must be at least 1")
        with self._lock:
            pages = Pages(pairs, self._sizes)
            prompts = prompts_of(pairs, pages, mode, self.model, self.processor, self.max_new_tokens)
        order = sorted(range(len(pairs)), key=lambda i: prompts[i].tokens)
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            started = time.perf_counter()
            seed = None if self.seed is None else self.seed + batch[0]  # whichever batches were ranked before
            with self._lock, torch.inference_mode(), SpareCores(self.model.device):
                rankings = self._rank_batch([prompts[i] for i in batch], pages, mode, seed)
            seconds = (time.perf_counter() - started) / len(batch)
            for i, ranking in zip(batch, rankings, strict=True):
                yield i, replace(ranking, seconds=seconds)

    def _rank_batch(self, prompts: list[Prompt], pages: Pages, mode: str, seed: int | None) -> list[Ranking]:
        if mode in ("reason", "direct"):
            return self._written(prompts, pages, mode, seed)
        rows = self._score(prompts, pages) if mode == "score" else self._pointwise(prompts, pages)
        return [scored_ranking(row) for row in rows]

    def _inputs(self, prompts: Sequence[Prompt], pages: Pages) -> dict[str, Any]:
        return model_inputs(prompts, pages, self.model, self.processor, self.page_cache)

    def _written(self, prompts: list[Prompt], pages: Pages, mode: str, seed: int | None) -> list[Ranking]:
        """Return the rankings that the model writes, in mode "direct" held to permutations of the ids."""
        allowed, longest = None, self.max_new_tokens
        if mode == "direct":
            allowed = [self._allowed_ids(len(prompt.pages)) for prompt in prompts]
            longest = max(ids.longest for ids in allowed)
        options = {**self.generation, "max_new_tokens": longest}
        rows = complete(self.model, self._inputs(prompts, pages), self._ends, allowed=allowed, seed=seed, **options)
        rankings = []
        for prompt, row in zip(prompts, rows, strict=True):
            ended = row[-1] in self._ends
            text = self.processor.tokenizer.decode(row[:-1] if ended else row, skip_special_tokens=True)
            n = len(prompt.pages)
            if mode == "direct":
                text = f"{ANSWER_START}{text}]</answer>"
                rankings.append(written_ranking(text, n, len(row) - ended, thinking=False))
            else:
                rankings.append(written_ranking(with_opening(text, prompt.text), n, len(row), cut=not ended))
        return rankings

    def _score(self, prompts: list[Prompt], pages: Pages) -> list[list[float]]:
        """Return the log-probability that each prompt's answer begins with each id, less the prior if calibrated."""
        rows = self._first_id(self._inputs(prompts, pages), [len(prompt.pages) for prompt in prompts])
        if not self.calibrate:
            return rows
        if pages.texts:
            raise ValueError("calibration shows the model blank page images: leave it out where pages are texts")
        priors = [self._prior(tuple(pages.sizes[key] for key in prompt.pages)) for prompt in prompts]
        return [[a - b for a, b in zip(row, prior, strict=True)] for row, prior in zip(rows, priors, strict=True)]

    def _first_id(self, inputs: dict[str, Any], counts: list[int]) -> list[list[float]]:
        """Return the log-probability of each id, in each row of a batch; ids of several tokens are read one by one."""
        allowed = [self._allowed_ids(n) for n in counts]
        prefixes = max(allowed, key=lambda ids: len(ids.ids)).branches  # those of fewer ids are among them
        logits = [each.log_softmax(-1).cpu() for each in next_logits(self.model, inputs, list(prefixes))]
        return [
            ids.scores(dict(zip(prefixes, (each[r] for each in logits), strict=True))) for r, ids in enumerate(allowed)
        ]

    def _prior(self, sizes: tuple[tuple[int, int], ...]) -> list[float]:
        """Return what `_first_id` gives for no question and blank pages of these (height, width)."""
        if sizes not in self._priors:
            pairs = [(CONTENT_FREE, [Image.new("RGB", (width, height), "white") for height, width in sizes])]
            blank = Pages(pairs)
            prompts = prompts_of(pairs, blank, "score", self.model, self.processor, self.max_new_tokens)
            [self._priors[sizes]] = self._first_id(self._inputs(prompts, blank), [len(sizes)])
        return self._priors[sizes]

    def _pointwise(self, prompts: list[Prompt], pages: Pages) -> list[list[float]]:
        """Return the probability of the first of the two answers against the second, for each page of each prompt."""
        yes, no = pointwise_tokens(self.processor.tokenizer)
        single = [replace(prompt, pages=[key]) for prompt in prompts for key in prompt.pages]
        scores: list[float] = []
        step = PAGES_A_QUERY * len(prompts)  # however many candidates there are
        for start in range(0, len(single), step):
            [logits] = next_logits(self.model, self._inputs(single[start : start + step], pages), [()])
            scores += (logits[:, yes] - logits[:, no]).sigmoid().tolist()
        each = iter(scores)
        return [[next(each) for _ in prompt.pages] for prompt in prompts]


class QueryReranker:
    """The released class's interface: `QueryReranker("i2vec/MM-R5").rerank(query, image_list)`.

    Prompts are the released ones, token for token, and decoding is as released (`examples/reranker.py` in
    https://github.com/i2vec/MM-R5): sampling at temperature 0.3, the rest left to the model's generation
    configuration, at most 8,192 tokens. `seed` makes it repeatable, `temperature=0.0` greedy. `options` go to
    `Reranker.from_pretrained`.
    """

    def __init__(self, model_path: str | Path, **options: Any):
        self.reranker = Reranker.from_pretrained(model_path, **options)
        if "temperature" not in options:
            self.reranker.generation = {"do_sample": True, "temperature": 0.3}
        if "max_new_tokens" not in options:
            half = (context_length(self.reranker.model.config) or 2 * 8192) // 2
            self.reranker.max_new_tokens = min(8192, half)

    def rerank(self, query: str, image_list: Sequence[Page]) -> list[int]:
        """0-based indices of `image_list`, best first, always a permutation. Raises as `Reranker.rank`."""
        return self.reranker.rank(query, image_list).order
