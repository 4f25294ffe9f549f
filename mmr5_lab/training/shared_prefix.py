"""GRPO that encodes the prompt of a group, its pages and its tokens, once for all G completions.

Plain GRPO encodes the prompt, most of which is pages, anew for every completion: when it samples, when it computes the
reference model's probabilities, and in the loss. Here a prompt is encoded once for sampling and its keys and values are
copied to each completion. In the loss the completions of a prompt stand behind one another in one row:

    prompt but its last token | last token, completion 1 | last token, completion 2 | …

with a mask that lets a completion see the prompt and itself alone, and with the positions that it would have alone.
Losses and gradients are those of plain trl up to rounding. The idea is that of Prefix Grouper (arXiv 2506.05433); the
layout in one row needs no change to the model's attention.

What this touches in trl and transformers is listed in docs/upstream.md.
"""

import functools
from typing import Any, cast

import torch
from trl import GRPOTrainer
from trl.trainer.utils import pad, split_pixel_values_by_grid, split_tensor_dict, unsplit_pixel_values_by_grid

from mmr5_lab.models.generation import preallocated_cache

# Model types whose positions come from `get_rope_index`, and attention kernels that take any mask.
SUPPORTED = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
KERNELS = ("sdpa", "eager")
IGNORED = -100  # the label of tokens that are not scored, as everywhere in transformers
Images = tuple[torch.Tensor, torch.Tensor]  # of one row: patches and grids


def cannot_share(model: torch.nn.Module) -> str | None:
    """Return why `model` cannot share prefixes, or None where sharing is known to change no result."""
    config: Any = model.config
    if config.model_type not in SUPPORTED:
        return f"the model type {config.model_type} is not one of {', '.join(SUPPORTED)}"
    if (kernel := config.get_text_config()._attn_implementation) not in KERNELS:
        return f"the attention kernel {kernel} takes no mask of its own, as {' and '.join(KERNELS)} do"
    return None


class SharedPrefixGRPOTrainer(GRPOTrainer):
    """trl's GRPOTrainer for Qwen's vision-language models, which encodes each prompt once a group.

    Arguments and results are GRPOTrainer's, with two differences. The completions of a step are not shuffled among its
    passes, so that those of a prompt stay together: a step's gradient is the same. And a top share of uncertain tokens
    (`top_entropy_quantile`) is taken of each pass on each device, not of a pass on all devices, so that several devices
    train what one does. The model must be one that can share (`cannot_share`).
    """

    _buffered_inputs: Any

    def __init__(self, model, *args: Any, **options: Any):
        _share_in_generation(model)
        super().__init__(model, *args, **options)

    def _prepare_inputs(self, generation_batch):
        """As trl's, which shuffles single completions and would tear groups apart."""
        args, model = cast(Any, self.args), cast(Any, self.model)
        if not model.training:
            return super()._prepare_inputs(generation_batch)
        if self._step % (args.steps_per_generation * self.num_iterations) == 0 or self._buffered_inputs is None:
            whole: Any = split_pixel_values_by_grid(self._generate_and_score_completions(generation_batch))
            torch.randperm(len(whole["completion_ids"]))  # trl's draw, so that what is sampled next is the same
            batches: Any = split_tensor_dict(whole, args.steps_per_generation)
            self._buffered_inputs = [unsplit_pixel_values_by_grid(batch) for batch in batches]
        return self._buffered_inputs[self._step % args.steps_per_generation]

    def get_high_entropy_mask(self, entropies: torch.Tensor, mask: torch.Tensor, threshold: float) -> torch.Tensor:
        """Return which tokens of this pass are at or above the quantile `threshold` of its entropies."""
        kept = entropies[mask.bool()].float()
        if not len(kept):  # every completion was cut and masked
            return mask.bool()
        return (entropies >= torch.quantile(kept, threshold)) & mask.bool()

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, compute_entropy=False, **options: Any
    ):
        """Return log-probabilities and entropies of the completions' tokens, (rows, logits_to_keep) each."""
        width = input_ids.shape[1] - logits_to_keep
        images = _by_row(options["pixel_values"], options["image_grid_thw"], options["num_images"])
        logps = input_ids.new_zeros(len(input_ids), logits_to_keep, dtype=torch.float32)
        entropies = torch.zeros_like(logps)
        for start in range(0, len(input_ids), batch_size or len(input_ids)):
            groups = _same_prompts(input_ids[:, :width], images, start, batch_size)
            rows = [row for group in groups for row in group]
            first = [group[0] for group in groups]
            mask = attention_mask[first, :width]
            positions, _ = _inner(model).get_rope_index(
                input_ids[first, :width],
                image_grid_thw=_pixels(images, first)["image_grid_thw"],
                attention_mask=mask,
                mm_token_type_ids=options["mm_token_type_ids"][first, :width],
            )
            inputs, tokens = _packed(
                [row[:, kept.bool()] for row, kept in zip(positions.unbind(1), mask, strict=True)],
                [input_ids[row, :width][attention_mask[row, :width].bool()] for row in first],
                [[input_ids[row, width:][attention_mask[row, width:].bool()] for row in group] for group in groups],
            )
            with self.accelerator.autocast():
                output = model(**inputs, **_pixels(images, first), fused_lm_head=True)
            where = attention_mask[rows, width:].bool()
            logps = _placed(logps, rows, where, output.log_probs, tokens)
            if compute_entropy:
                entropies = _placed(entropies, rows, where, output.entropy, tokens)
        return logps, entropies if compute_entropy else None, None


def _placed(whole, rows: list[int], where, values, tokens):
    """Return `whole` with `values` at `tokens` (packed row and place) put into `rows`, where they are tokens."""
    part = values.new_zeros(where.shape).masked_scatter(where, values[tokens[0], tokens[1]])
    return whole.to(part.dtype).index_copy(0, torch.tensor(rows, device=part.device), part)


def _by_row(pixels, grids, num_images: list[int]) -> list[Images]:
    """Return patches and grids of each row's images."""
    by_row = grids.split(num_images)
    return list(zip(pixels.split([int(grid.prod(-1).sum()) for grid in by_row]), by_row, strict=True))


def _pixels(images: list[Images], rows: list[int]) -> dict[str, torch.Tensor]:
    """Return the model's inputs for the images of some rows."""
    patches, grids = zip(*(images[row] for row in rows), strict=True)
    return {"pixel_values": torch.cat(patches), "image_grid_thw": torch.cat(grids)}


def _same_prompts(ids: torch.Tensor, images: list[Images], start: int = 0, count: int | None = None) -> list[list[int]]:
    """Return `count` rows from `start` on in groups of the same tokens and pages, in the order of their first ones."""
    groups: list[list[int]] = []
    for row in range(start, min(len(ids), start + (count or len(ids)))):
        for group in groups:
            other = group[0]
            # Two orders of pages of one size have equal tokens: only their pixels tell them apart.
            if torch.equal(ids[row], ids[other]) and all(map(torch.equal, images[row], images[other])):
                group.append(row)
                break
        else:
            groups.append([row])
    return groups


def _inner(model) -> Any:
    """Return the part of a model that joins pages and tokens."""
    return next(module for module in model.modules() if hasattr(module, "get_rope_index"))


def _packed(
    positions: list[torch.Tensor], prompts: list[torch.Tensor], completions: list[list[torch.Tensor]]
) -> tuple[dict[str, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """Return inputs with one row a prompt, and where (row, column) the output scores the completions' tokens, in order.

    A token's probability is in the output of the token before it.
    """
    packed: dict[str, list[torch.Tensor]] = {"ids": [], "labels": [], "positions": [], "segments": []}
    for prompt, position, texts in zip(prompts, positions, completions, strict=True):
        shared, last = prompt[:-1], prompt[-1:]
        no_label, lengths = torch.full_like(last, IGNORED), [len(text) + 1 for text in texts]
        places = [position[:, -1:] + torch.arange(length, device=prompt.device) for length in lengths]
        segments = [torch.full((length,), number, device=prompt.device) for number, length in enumerate(lengths, 1)]
        packed["ids"].append(torch.cat([shared, *(part for text in texts for part in (last, text))]))
        packed["labels"].append(
            torch.cat([no_label.expand(len(shared)), *(part for text in texts for part in (no_label, text))])
        )
        packed["positions"].append(torch.cat([position[:, :-1], *places], 1).T)
        packed["segments"].append(torch.cat([torch.zeros_like(shared), *segments]))
    labels = pad(packed["labels"], padding_value=IGNORED)
    inputs = {
        "input_ids": pad(packed["ids"], padding_value=0),
        "labels": labels,
        "position_ids": pad(packed["positions"], padding_value=0).permute(2, 0, 1),
        "attention_mask": _mask(pad(packed["segments"], padding_value=-1)),
    }
    rows, columns = (labels != IGNORED).nonzero(as_tuple=True)
    return inputs, (rows, columns - 1)


def _mask(segments: torch.Tensor) -> torch.Tensor:
    """Return which tokens each token sees: the earlier ones of its segment and of the prompt's, (rows, 1, n, n)."""
    causal = torch.ones(segments.shape[1], segments.shape[1], dtype=torch.bool, device=segments.device).tril()
    seen = (segments[:, None, :] == 0) | (segments[:, None, :] == segments[:, :, None])
    return (seen & causal)[:, None]


def _share_in_generation(model) -> None:
    """Let `model.generate` encode rows with the same prompt and pages once; it samples as before."""
    original, inner = model.generate, _inner(model)

    @functools.wraps(original)
    def generate(input_ids=None, pixel_values=None, image_grid_thw=None, **options: Any):
        inputs = {"input_ids": input_ids, "pixel_values": pixel_values, "image_grid_thw": image_grid_thw}
        if pixel_values is None or options.get("cache") is not None:
            return original(**inputs, **options)
        tokens = (input_ids == model.config.image_token_id).sum(1)
        patches = model.config.vision_config.spatial_merge_size**2  # that one visual token is made of
        ends = (image_grid_thw.prod(-1) // patches).cumsum(0)  # visual tokens up to the end of each page
        pages = torch.searchsorted(ends, tokens.cumsum(0), right=True)  # up to the end of each row
        images = _by_row(pixel_values, image_grid_thw, pages.diff(prepend=pages.new_zeros(1)).tolist())
        groups = _same_prompts(input_ids, images)
        if len(groups) == len(input_ids):
            return original(**inputs, **options)
        first = [group[0] for group in groups]
        cache = preallocated_cache(model)
        with torch.no_grad():
            inner(
                input_ids=input_ids[first, :-1],
                attention_mask=options["attention_mask"][first, :-1],
                mm_token_type_ids=options["mm_token_type_ids"][first, :-1],
                **_pixels(images, first),
                cache=cache,
                use_cache=True,
            )
        group_of_row = torch.empty(len(input_ids), dtype=torch.long, device=input_ids.device)
        for number, group in enumerate(groups):
            group_of_row[group] = number
        cache.batch_select_indices(cast(Any, group_of_row))
        inner.rope_deltas = inner.rope_deltas[group_of_row]
        return original(input_ids=input_ids, cache=cache, **options)

    model.generate = generate
