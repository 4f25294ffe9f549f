"""What is given to a training run, checked before a model is loaded: columns, lengths, positives, enough prompts."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

from mmr5_lab.files import fingerprint
from mmr5_lab.images import page_size
from mmr5_lab.models.memory import text_tokens, visual_tokens
from mmr5_lab.models.probe import PROBE_PAGE
from mmr5_lab.prompting.prompts import asked_question, build_messages, content_text
from mmr5_lab.traces.construction import PromptReader, labelled


def check_traces(traces: datasets.Dataset, processor, max_length: int) -> None:
    """Raise ValueError where traces lack a column or are longer than `max_length` tokens, naming the first such trace.

    trl would cut a long trace at its end, which is the answer.
    """
    _check_columns(traces, ("prompt", "completion", "images"), "traces", "sft_dataset")
    lengths = trace_lengths(traces, processor)
    too_long = [number for number, length in enumerate(lengths) if length > max_length]
    if too_long:
        number = too_long[0]
        question = asked_question(content_text(traces[number]["prompt"][-1]["content"]))
        raise ValueError(
            f"{len(too_long)} of {len(traces)} traces are longer than max_length, {max_length} tokens. The first is"
            f" trace {number + 1} ({question!r}), of {lengths[number]} tokens: raise max_length, lower max_pixels or"
            " leave these traces out"
        )


def trace_lengths(traces: datasets.Dataset, processor) -> list[int]:
    """Return the tokens of each trace, prompt and completion, with its pages as the processor will scale them."""
    around, tokens, lengths = _tokens_around_a_page(processor), dict[tuple[int, int], int](), []
    for trace in traces.to_list():  # as it is stored: the pages are not opened
        sizes = [page_size(image)[::-1] for image in trace["images"]]
        for size in set(sizes) - tokens.keys():
            tokens[size] = visual_tokens(processor, [size])[0]
        text = processor.apply_chat_template([*trace["prompt"], *trace["completion"]], tokenize=False)
        lengths.append(text_tokens(processor, text) + sum(tokens[size] + around for size in sizes))
    return lengths


def _tokens_around_a_page(processor) -> int:
    """Return how many tokens a processor adds around those of a page itself, as Gemma's does with line breaks."""
    text = processor.apply_chat_template(build_messages("q", 1), tokenize=False)
    inputs = processor(text=[text], images=[[Image.new("RGB", PROBE_PAGE)]], add_special_tokens=False)
    [page] = visual_tokens(processor, [PROBE_PAGE])
    return len(inputs["input_ids"][0]) - text_tokens(processor, text) - page


def check_prompts(prompts: datasets.Dataset, batch_size: int, accumulation: int, generations: int) -> None:
    """Raise ValueError where prompts lack a column or a positive, or do not fill a step with whole groups."""
    completions = batch_size * accumulation
    if completions % generations:
        raise ValueError(
            f"{batch_size} × {accumulation} completions a step (BATCH_SIZE × ACCUMULATION) are not a multiple of the"
            f" group size {generations} (GENERATIONS)"
        )
    _check_columns(prompts, ("prompt", "images", "positive_ids", "num_candidates"), "prompts", "rl_dataset")
    without = [number for number, row in enumerate(_rows(prompts), 1) if not len(row["positive_ids"])]
    if without:
        raise ValueError(
            f"{len(without)} of {len(prompts)} prompts have no positive among their candidates; the first is prompt"
            f" {without[0]}: leave them out, since no answer to them can be right"
        )
    needed = completions // generations
    if len(prompts) < needed:
        raise ValueError(
            f"{len(prompts)} prompts do not fill a step of {needed} ({completions} completions, {generations} each):"
            " lower BATCH_SIZE or ACCUMULATION, raise GENERATIONS or take more prompts"
        )


def data_fingerprint(data: datasets.Dataset) -> str:
    """Return what tells traces or prompts from others: texts, labels, order, and the pages by file name and size."""
    return fingerprint(*_rows(data))


def _rows(data: datasets.Dataset) -> Iterator[dict[str, Any]]:
    """Yield each example's texts and labels without opening its pages, for which their file names and sizes stand."""
    reader = data.format["format_kwargs"].get("transform")
    for row in data.to_list():  # as it is stored: the transform, which opens the pages, is not applied
        if isinstance(reader, PromptReader):
            chosen = labelled(reader.corpus.by_id[row["query_id"]], row["pages"])
            question = chosen.question["question"]
            yield {**row, "question": question, "positive_ids": chosen.positive_ids, "seed": reader.seed}
        elif "images" in row:
            yield {**row, "images": [_page_name(image) for image in row["images"]]}
        else:
            yield row


def _page_name(image: Any) -> tuple[str, int | tuple[int, int]]:
    if isinstance(image, str):  # not the folder: a run folder may be moved
        return Path(image).name, Path(image).stat().st_size
    return type(image).__name__, page_size(image)


def _check_columns(data: datasets.Dataset, needed: Sequence[str], kind: str, maker: str) -> None:
    if not len(data):
        raise ValueError(f"there are no {kind} to train on")
    columns = data[0]  # a transform may make columns that `column_names` does not have
    missing = [name for name in needed if name not in columns]
    if missing:
        raise ValueError(
            f"the {kind} have no column {', '.join(missing)}: they need {', '.join(needed)}, as `{maker}` makes them"
        )
