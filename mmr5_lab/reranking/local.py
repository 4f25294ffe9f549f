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
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mmr5_lab.images import Page
from mmr5_lab.models.allowed_ids import AllowedIds
from mmr5_lab.models.generation import next_logits, write
from mmr5_lab.models.loading import load_model
from mmr5_lab.models.memory import context_length, overfull, text_tokens, visual_tokens
from mmr5_lab.models.vision_cache import PageCache
from mmr5_lab.prompting.answers import parse_ranking
from mmr5_lab.prompting.prompts import POINTWISE_ANSWERS, build_messages, build_pointwise_messages
from mmr5_lab.reranking.pages import Pages, Pair, name_pair
from mmr5_lab.reranking.ranking import MODES, Ranker, Ranking

UNREASONED = "<think></think><answer>["  # what "direct" and "score" put into the model's mouth
CONTENT_FREE = "N/A"  # the query against which "score" is calibrated


class Reranker(Ranker):
    """A loaded model with its way of decoding. Greedy unless `temperature` > 0; then `seed` makes it repeatable.

    calibrate: in mode "score", subtract what the model says of blank pages, which is its liking for places
        (contextual calibration, arXiv 2102.09690)
    page_cache: the cache that the model was given (`mmr5_lab.models.vision_cache`), for its figures; None: it has none
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
        for batch in batches:
            started = time.perf_counter()
            rankings = self._rank_batch(
                [prompts[i] for i in batch], [pages.keys[i] for i in batch], pages, mode, self._draws(batch)
            )
            seconds = (time.perf_counter() - started) / len(batch)
            for i, values in zip(batch, rankings, strict=True):
                yield i, Ranking(**values, seconds=seconds)

    def _draws(self, batch: list[int]) -> torch.Generator | None:
        """The generator of a batch's tokens: the same whichever batches were ranked before."""
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
                    f"{where}: {problem}. Show fewer pages (or rank windows) or set a smaller max_pixels or"
                    " max_new_tokens; `mmr5_lab.models.memory.plan` says which would fit"
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
