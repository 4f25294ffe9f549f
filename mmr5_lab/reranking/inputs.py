"""From a query and its pages to what a model takes: the prompt's text, its length, and the tensors of a batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from mmr5_lab.models.memory import context_length, overfull, text_tokens, visual_tokens
from mmr5_lab.models.vision_cache import PageCache
from mmr5_lab.prompting.answers import with_opening
from mmr5_lab.prompting.prompts import POINTWISE_ANSWERS, build_messages, build_pointwise_messages
from mmr5_lab.reranking.pages import Pages, Pair, name_pair
from mmr5_lab.reranking.ranking import ANSWER_START


@dataclass(frozen=True)
class Prompt:
    """One query as a model is asked.

    text: chat template applied; pages: keys in `Pages`, in candidate order
    tokens: of the text and of the pages that are shown at once
    """

    text: str
    pages: list[bytes]
    tokens: int


def prompts_of(pairs: Sequence[Pair], pages: Pages, mode: str, model, processor, max_new_tokens: int) -> list[Prompt]:
    """Return the prompt of each pair. Raises ValueError, naming the pair, for one that the model cannot take."""
    limit = context_length(model.config)
    tokens_of_size = lru_cache(None)(lambda size: visual_tokens(processor, [size])[0])
    prompts = []
    for i, ((query, _), keys) in enumerate(zip(pairs, pages.keys, strict=True)):
        where = name_pair(i, query)
        try:
            text = prompt_text(query, len(keys), mode, processor, pages.shown(keys))
        except (TypeError, ValueError) as error:
            raise type(error)(f"{where}: {error}") from None
        visual = []
        for k, key in enumerate(keys):
            if key not in pages.sizes:
                continue
            height, width = pages.sizes[key]
            try:
                visual.append(tokens_of_size((height, width)))
            except ValueError as error:  # such as an aspect ratio that the processor refuses
                raise ValueError(f"{where}, page {k} ({width} × {height} pixels): {error}") from None
        visual = [max(visual)] if mode == "pointwise" else visual
        words = text_tokens(processor, text)
        answer = {"reason": max_new_tokens, "direct": 8 * len(keys)}.get(mode, 0)
        if problem := overfull(visual, words, answer, limit):
            raise ValueError(
                f"{where}: {problem}. Show fewer pages (or rank windows) or set a smaller max_pixels or"
                " max_new_tokens; `mmr5_lab.models.memory.plan` says which would fit"
            )
        prompts.append(Prompt(text, keys, words + sum(visual)))
    return prompts


def prompt_text(query: str, count: int, mode: str, processor, shown: Sequence[tuple[str, bool]] | None = None) -> str:
    """Return the text of a prompt for `count` pages (`shown` as of `build_messages`).

    Raises ValueError or TypeError for a bad query, and ValueError for texts in mode "pointwise".
    """
    special = [token.content for token in processor.tokenizer.added_tokens_decoder.values() if token.special]

    def plain(text: str) -> str:  # this model's own control tokens, beside the usual ones
        for token in special if isinstance(text, str) else ():
            text = text.replace(token, f"{token[0]} {token[1:]}")
        return text

    if mode == "pointwise":
        if shown:
            raise ValueError("mode 'pointwise' was made for page images: choose another mode, or the channel image")
        messages = build_pointwise_messages(plain(query))
    else:
        messages = build_messages(plain(query), count, shown and [(plain(text), image) for text, image in shown])
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return with_answer_start(text) if mode in ("direct", "score") else text


def pointwise_tokens(tokenizer) -> tuple[int, int]:
    """Return the tokens with which the two answers of mode "pointwise" begin. Raises ValueError where they are one."""
    yes, no = (tokenizer(answer, add_special_tokens=False)["input_ids"][0] for answer in POINTWISE_ANSWERS)
    if yes == no:  # all pages would tie
        raise ValueError(f"this tokenizer begins {' and '.join(POINTWISE_ANSWERS)} alike: choose another mode")
    return yes, no


def with_answer_start(prompt: str) -> str:
    """Return a prompt's text with an answer without reasoning begun behind it (`ANSWER_START`)."""
    # A template may have opened the think block already, and may have put a line break behind it.
    return prompt + (ANSWER_START.removeprefix("<think>") if with_opening("", prompt) else ANSWER_START)


def model_inputs(prompts: Sequence[Prompt], pages: Pages, model, processor, cache: PageCache | None) -> dict[str, Any]:
    """Return what the model takes for a batch, padded on the left; pages come from the cache where there is one."""
    texts, padding = [prompt.text for prompt in prompts], {"padding": True, "padding_side": "left"}
    if cache is None:
        images: Any = [[pages.image(key) for key in pages.images(prompt.pages)] for prompt in prompts]
        if not all(images):  # processors take no prompt without images among others; one list of all serves as well
            images = [image for row in images for image in row] or None
        inputs = processor(text=texts, images=images, return_tensors="pt", add_special_tokens=False, **padding)
        inputs = inputs.to(model.device)
        if images:
            inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        return dict(inputs)
    # What the processor does, with a page's features in place of its pixels
    keys = [key for prompt in prompts for key in pages.images(prompt.pages)]
    if not keys:
        return model_inputs(prompts, pages, model, processor, None)
    features = cache.encode(keys, pages.sizes, pages.image, processor)
    expanded, _ = processor.get_text_with_replacements(texts, [page["text"] for page in features])
    lists = processor.tokenizer(expanded, add_special_tokens=False, **padding)
    if processor.return_mm_token_type_ids:
        of_text = "token_type_ids" in processor.model_input_names  # Gemma's name for the same
        kinds = processor.create_mm_token_type_ids(lists["input_ids"])
        lists["token_type_ids" if of_text else "mm_token_type_ids"] = kinds
    tensors: dict[str, Any] = {name: torch.tensor(values, device=model.device) for name, values in lists.items()}
    if features[0]["grid"] is not None:
        tensors["image_grid_thw"] = torch.stack([page["grid"] for page in features]).to(model.device)
    return tensors | {"mm_encoder_outputs": {"image": cache.joined(features)}}
