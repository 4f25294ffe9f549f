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

import copy
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from PIL import Image

from mmr5_lab.allowed_ids import AllowedIds
from mmr5_lab.budget import context_length, overfull, text_tokens, visual_tokens
from mmr5_lab.decoding import next_logits, write
from mmr5_lab.models import load_model
from mmr5_lab.page_cache import PageCache
from mmr5_lab.pages import Page, Pages, Pair, Sizes, name_pair
from mmr5_lab.parsing import parse_ranking
from mmr5_lab.prompts import POINTWISE_ANSWERS, build_messages, build_pointwise_messages
from mmr5_lab.side_by_side import cores_for_batches, side_by_side

MODES = ("reason", "direct", "score", "pointwise")
UNREASONED = "<think></think><answer>["  # what "direct" and "score" put into the model's mouth
CONTENT_FREE = "N/A"  # the query against which "score" is calibrated


@dataclass(frozen=True)
class Ranking:
    """What a reranker says about one query's n candidates.

    order: 0-based permutation of range(n), best first
    reasoning: the text inside <think>, or None
    text: the completion as written ("" in modes "score" and "pointwise")
    faults: what was wrong with it, as named by `parsing.parse_ranking`
    scores: one a candidate, in candidate order, higher is better, or None: log-probabilities of the ids ("score"),
        probabilities of "True" ("pointwise"), points ("consensus")
    tokens, seconds: completion tokens, and this query's share of its batch's time
    shown: the candidates that "Image 1", "Image 2", … of the reasoning are (0-based); None: all, in their order
    stability: how alike the orders were that a consensus was made of (mean Kendall tau, -1 to 1), or None
    """

    order: list[int]
    reasoning: str | None
    text: str
    faults: frozenset[str]
    scores: list[float] | None
    tokens: int
    seconds: float
    shown: list[int] | None = None
    stability: float | None = None


class RemoteError(RuntimeError):
    """Requests to a server failed for good. `failures`: index of the pair -> what happened."""

    def __init__(self, failures: dict[int, str], total: int):
        self.failures = failures
        index, reason = next(iter(sorted(failures.items())))
        super().__init__(
            f"{len(failures)} of {total} requests failed; the first is pair {index}: {reason}."
            f" What was answered is kept: start again to ask for the rest"
        )


class Ranker:
    """What ranks pages: a loaded model, a server (`remote`), or a strategy over either (`strategies`)."""

    _sizes: Sizes | None = None  # of pages that were found good, where a ranker remembers them

    def rank_each(
        self, pairs: Sequence[Pair], mode: str = "reason", batch_size: int = 16
    ) -> Iterator[tuple[int, Ranking]]:
        """Like `rank_many`, but yields (index, ranking) as they are finished, in any order."""
        raise NotImplementedError

    def check(self, pairs: Sequence[Pair]) -> None:
        """Raises ValueError, naming pair and page, for pages that cannot be ranked, before any work is done."""
        Pages(pairs, self._sizes)

    def rank(self, query: str, pages: Sequence[Page], mode: str = "reason") -> Ranking:
        """Rank the pages (paths, image bytes or PIL images) of one query.

        Raises ValueError for an empty query, no pages, a page that is not an image, more than the model's context
        holds, or an unknown mode.
        """
        return self.rank_many([(query, pages)], mode=mode)[0]

    def rank_many(self, pairs: Iterable[Pair], mode: str = "reason", batch_size: int = 16) -> list[Ranking]:
        """Rank many (query, pages) pairs; results in their order.

        Raises as `rank`, naming the pair; whatever is raised has `finished`, the rankings made before, by index.
        """
        pairs = list(pairs)
        results: dict[int, Ranking] = {}
        try:
            results.update(self.rank_each(pairs, mode=mode, batch_size=batch_size))
        except Exception as error:
            error.finished = results  # type: ignore[attr-defined]
            raise
        return [results[i] for i in range(len(pairs))]


class Reranker(Ranker):
    """A loaded model with its way of decoding. Greedy unless `temperature` > 0; then `seed` makes it repeatable.

    calibrate: in mode "score", subtract what the model says of blank pages, which is its liking for places
        (contextual calibration, arXiv 2102.09690)
    page_cache: the cache that the model was given (`mmr5_lab.page_cache`), for its figures; None: it has none
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
        self.model, self.processor, self.page_cache = model, processor, page_cache
        self._special = [t.content for t in processor.tokenizer.added_tokens_decoder.values() if t.special]
        self.max_new_tokens, self.seed = max_new_tokens, seed
        self.calibrate = calibrate
        # what `generate` is told, over the model's generation configuration
        self.generation: dict[str, Any] = (
            {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
            if temperature > 0
            else {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        )
        self._sizes = {}
        self._lock = threading.RLock()  # a tokenizer serves one thread at a time: its padding is set anew for each call
        self._allowed: dict[int, AllowedIds] = {}
        self._blank: dict[tuple[tuple[int, int], ...], list[float]] = {}

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        adapter: str | Path | None = None,
        *,
        max_new_tokens: int = 2048,
        temperature: float = 0.0,
        seed: int | None = None,
        calibrate: bool = False,
        page_cache_bytes: int = 1 << 30,
        **options: Any,
    ) -> "Reranker":
        """Load `model` (and merge `adapter`); `options` go to `models.load_model`.

        page_cache_bytes: bound of the page cache, on the model's device; 0: no cache
        """
        loaded, processor = load_model(model, adapter, **options)
        cache = PageCache(loaded, page_cache_bytes) if page_cache_bytes and PageCache.supports(loaded) else None
        return cls(
            loaded,
            processor,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            calibrate=calibrate,
            page_cache=cache,
        )

    def rank_each(
        self, pairs: Sequence[Pair], mode: str = "reason", batch_size: int = 16
    ) -> Iterator[tuple[int, Ranking]]:
        """Yield (index, ranking) as batches finish, pairs of like length together.

        All pairs are checked before the first batch, so that bad input cannot cost finished work.
        """
        with self._lock:
            pages, prompts, lengths = self._checked(pairs, mode, batch_size)
        order = sorted(range(len(pairs)), key=lambda i: lengths[i])
        batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        at_once = min(cores_for_batches(self.model), len(batches))
        free: SimpleQueue[Reranker] = SimpleQueue()
        for k in range(at_once):
            free.put(self._twin() if k else self)

        def ranked(batch: list[int]) -> tuple[list[dict[str, Any]], float]:
            reranker, started = free.get(), time.perf_counter()
            try:
                values = reranker._rank_batch(
                    [prompts[i] for i in batch], [pages.keys[i] for i in batch], pages, mode, self._draws(batch)
                )
            finally:
                free.put(reranker)
            return values, (time.perf_counter() - started) / len(batch) / at_once

        for batch, (rankings, seconds) in side_by_side(ranked, batches, at_once):
            for i, values in zip(batch, rankings, strict=True):
                yield i, Ranking(**values, seconds=seconds)

    def _twin(self) -> "Reranker":
        """A reranker with the same weights, whose model can work beside ours: models keep notes of their batch."""
        twin = copy.copy(self)
        shared = chain(self.model.parameters(), self.model.buffers())
        twin.model = copy.deepcopy(self.model, {id(tensor): tensor for tensor in shared})
        return twin

    def _draws(self, batch: list[int]) -> torch.Generator | None:
        """What a batch's tokens are drawn with, whichever batch is worked on beside it."""
        return None if self.seed is None else torch.Generator(self.model.device).manual_seed(self.seed + batch[0])

    def _checked(self, pairs: Sequence[Pair], mode: str, batch_size: int) -> tuple[Pages, list[str], list[int]]:
        """The pages, and each pair's prompt and its tokens. Raises ValueError, naming the pair."""
        if mode not in MODES:
            raise ValueError(f"unknown mode {mode!r}: choose one of {', '.join(MODES)}")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: it must be at least 1")
        if mode == "pointwise":
            _first_tokens(self.processor.tokenizer, POINTWISE_ANSWERS)
        pages = Pages(pairs, self._sizes)
        tokens: dict[tuple[int, int], int] = {}
        prompts, lengths = [], []
        limit = context_length(self.model.config)
        for i, ((query, _), keys) in enumerate(zip(pairs, pages.keys, strict=True)):
            where = name_pair(i, query)
            try:
                text = self._prompt(query, len(keys), mode)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{where}: {error}") from None
            visual = []
            for k, key in enumerate(keys):
                size = pages.sizes[key]
                if size not in tokens:
                    try:
                        tokens[size] = visual_tokens(self.processor, [size])[0]
                    except ValueError as error:  # such as an aspect ratio that the processor refuses
                        raise ValueError(f"{where}, page {k} ({size[1]} × {size[0]} pixels): {error}") from None
                visual.append(tokens[size])
            words = text_tokens(self.processor, text)
            at_once = [max(visual)] if mode == "pointwise" else visual
            room = {"reason": self.max_new_tokens, "direct": 8 * len(keys)}.get(mode, 0)
            if problem := overfull(at_once, words, room, limit):
                raise ValueError(
                    f"{where}: {problem}. Show fewer pages (or rank windows)"
                    f" or set a smaller max_pixels or max_new_tokens; `mmr5_lab.budget.plan` says which would fit"
                )
            prompts.append(text)
            lengths.append(words + sum(at_once))
        return pages, prompts, lengths

    def _prompt(self, query: str, count: int, mode: str) -> str:
        for token in self._special if isinstance(query, str) else ():
            # what this model takes for a token, beside the usual ones
            query = query.replace(token, f"{token[0]} {token[1:]}")
        messages = build_pointwise_messages(query) if mode == "pointwise" else build_messages(query, count)
        text = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return text + (UNREASONED if mode in ("direct", "score") else "")

    def _inputs(self, texts: list[str], keys: list[list[bytes]], pages: Pages) -> dict[str, Any]:
        """What the model takes for these prompts and the pages in each."""
        device = self.model.device
        if self.page_cache is None:
            images = [[pages.image(key) for key in row] for row in keys]
            with self._lock:
                plain = self.processor(
                    text=texts, images=images, padding=True, padding_side="left", return_tensors="pt",
                    add_special_tokens=False,
                ).to(device)  # fmt: skip
            plain["pixel_values"] = plain["pixel_values"].to(self.model.dtype)
            return dict(plain)
        seen = self.page_cache.encoded(list(chain.from_iterable(keys)), pages.image, self.processor)
        expanded, _ = self.processor.get_text_with_replacements(list(texts), [page["text"] for page in seen])
        with self._lock:
            lists = self.processor.tokenizer(expanded, padding=True, padding_side="left", add_special_tokens=False)
        if self.processor.return_mm_token_type_ids:
            of_text = "token_type_ids" in self.processor.model_input_names
            kinds = self.processor.create_mm_token_type_ids(lists["input_ids"])
            lists["token_type_ids" if of_text else "mm_token_type_ids"] = kinds
        inputs: dict[str, Any] = {name: torch.tensor(values, device=device) for name, values in lists.items()}
        if seen[0]["grid"] is not None:
            inputs["image_grid_thw"] = torch.stack([page["grid"] for page in seen]).to(device)
        return inputs | {"mm_encoder_outputs": {"image": self.page_cache.joined(seen)}}

    @torch.inference_mode()
    def _rank_batch(
        self, texts: list[str], keys: list[list[bytes]], pages: Pages, mode: str, draws: torch.Generator | None
    ) -> list[dict[str, Any]]:
        """The fields of each prompt's ranking."""
        if mode == "pointwise":
            return self._pointwise(texts, keys, pages)
        inputs = self._inputs(texts, keys, pages)
        sizes = [len(row) for row in keys]
        if mode != "score":
            return self._generate(inputs, sizes, mode, draws)
        rows = self._score(inputs, sizes)
        if self.calibrate:
            rows = [
                [value - prior for value, prior in zip(row, self._prior(shown, pages), strict=True)]
                for row, shown in zip(rows, keys, strict=True)
            ]
        return [_scored(row) for row in rows]

    def _generate(
        self, inputs: dict[str, Any], sizes: list[int], mode: str, draws: torch.Generator | None
    ) -> list[dict[str, Any]]:
        tokenizer = self.processor.tokenizer
        ends = _end_tokens(self.model, tokenizer)
        allowed: Sequence[AllowedIds] | None
        if mode == "direct":
            allowed = [self._allowed_ids(n) for n in sizes]
            longest = max(ids.longest for ids in allowed)
        else:
            allowed, longest = None, self.max_new_tokens
        rows = write(self.model, inputs, ends, allowed, draws, max_new_tokens=longest, **self.generation)
        values = []
        for row, n in zip(rows, sizes, strict=True):
            ended = bool(row) and row[-1] in ends
            with self._lock:
                text = tokenizer.decode(row[:-1] if ended else row, skip_special_tokens=True)
            if mode == "direct":
                text = f"{UNREASONED}{text}]</answer>"
            parsed = parse_ranking(text, n)
            faults = parsed.faults
            if mode == "direct":
                faults -= {"no_think"}  # it was told not to
            elif not ended:
                faults |= {"truncated"}
            values.append({
                "order": list(parsed.order), "reasoning": parsed.think or None, "text": text, "faults": faults,
                "scores": None, "tokens": len(row),
            })  # fmt: skip
        return values

    def _allowed_ids(self, n: int) -> AllowedIds:
        with self._lock:
            if n not in self._allowed:
                self._allowed[n] = AllowedIds(self.processor.tokenizer, n)
            return self._allowed[n]

    def _score(self, inputs: dict[str, Any], sizes: list[int]) -> list[list[float]]:
        """Log-probability that the answer begins with each id; ids of several tokens are read token by token."""
        paths = {n: self._allowed_ids(n).paths for n in sizes}
        scores = torch.zeros(len(sizes), max(sizes))
        prefixes = sorted({path[:k] for row in paths.values() for path in row for k in range(len(path))}, key=len)
        for prefix, found in zip(prefixes, next_logits(self.model, inputs, prefixes), strict=True):
            logits = _finite(found).log_softmax(-1).cpu()
            for r, n in enumerate(sizes):
                for i, path in enumerate(paths[n]):
                    if path[: len(prefix)] == prefix and len(path) > len(prefix):
                        scores[r, i] += logits[r, path[len(prefix)]]
        return [row[:n] for row, n in zip(scores.tolist(), sizes, strict=True)]

    def _prior(self, keys: list[bytes], pages: Pages) -> list[float]:
        """What the model says of as many blank pages of the same sizes, for no question."""
        sizes = tuple(pages.sizes[key] for key in keys)
        if sizes not in self._blank:
            if len(self._blank) >= 1000:
                self._blank.clear()
            blank = Pages([(CONTENT_FREE, [Image.new("RGB", (width, height), "white") for height, width in sizes])])
            inputs = self._inputs([self._prompt(CONTENT_FREE, len(keys), "score")], blank.keys, blank)
            [self._blank[sizes]] = self._score(inputs, [len(keys)])
        return self._blank[sizes]

    def _pointwise(self, texts: list[str], keys: list[list[bytes]], pages: Pages) -> list[dict[str, Any]]:
        """Probability of the first of the two answers against the second, page by page, a pair's pages together."""
        with self._lock:
            yes, no = _first_tokens(self.processor.tokenizer, POINTWISE_ANSWERS)
        flat = [(text, [key]) for text, row in zip(texts, keys, strict=True) for key in row]
        flat_scores: list[float] = []
        step = 4 * len(keys)  # pages a pass, however many candidates there are
        for start in range(0, len(flat), step):
            part = flat[start : start + step]
            inputs = self._inputs([text for text, _ in part], [page for _, page in part], pages)
            [found] = next_logits(self.model, inputs, [()])
            logits = _finite(found)
            flat_scores += (logits[:, yes] - logits[:, no]).sigmoid().tolist()
        left = iter(flat_scores)
        return [_scored(list(islice(left, len(row)))) for row in keys]


def _scored(scores: list[float]) -> dict[str, Any]:
    """A ranking by scores; ties stay in candidate order."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    return {"order": order, "reasoning": None, "text": "", "faults": frozenset(), "scores": scores, "tokens": 1}


def _first_tokens(tokenizer, answers: Sequence[str]) -> list[int]:
    first = [tokenizer(answer, add_special_tokens=False)["input_ids"][0] for answer in answers]
    if len(set(first)) < len(first):
        raise ValueError(
            f"this tokenizer begins {' and '.join(answers)} alike: mode 'pointwise' cannot tell them apart"
        )
    return first


def _finite(logits: torch.Tensor) -> torch.Tensor:
    """Logits in float32. Raises FloatingPointError where they are no numbers, which would rank at random."""
    if not torch.isfinite(logits).all():
        raise FloatingPointError(f"the model's logits are not finite ({logits.dtype}): load it with dtype float32")
    return logits.float()


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


def _end_tokens(model, tokenizer) -> set[int]:
    ends = model.generation_config.eos_token_id
    return {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
