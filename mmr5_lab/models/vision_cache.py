"""Encode each page once: a bounded cache of what the vision tower makes of a page image.

A page stands among the candidates of several questions (MMDocIR asks five a document), in every epoch of SFT, and
in every completion of a GRPO group. With the vision tower frozen its features never change:

    cache = PageCache(model)            # from here on, generation, scoring and training use it
    reranker.rank_many(pairs)
    cache.hits, cache.misses, cache.bytes

The cache stands in for `get_image_features` of the model within, which transformers calls in `forward` and in
`generate` alike; there, pages are known by the bytes of their pixels as the tower would see them. A `Reranker` knows
a page sooner, by its file: then it is not even scaled and cut into patches a second time (`encoded`).
"""

import functools
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from itertools import accumulate
from typing import Any, cast

import torch
from PIL import Image

# Model types whose features come apart by page; tested with each (tests/architectures.py).
SUPPORTED = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3", "internvl")
Key = bytes | tuple[bytes, str]
# Of one page: "pooler_output", "deepstack_features" where the model has them, and from `encoded` "text" (what stands in
# a prompt for its place) and "grid" (patches in time, height and width, where the model wants to know).
Features = dict[str, Any]


class PageCache:
    """Keeps the features of the pages that were used last, `max_bytes` of them at most, on the model's device.

    Works for every model of transformers whose `get_image_features` returns one entry a page (Qwen2-VL,
    Qwen2.5-VL, Qwen3-VL) or one row a tile (Gemma 3, InternVL). `remove()` gives the model its own method back.

    Raises TypeError for a model without `get_image_features`, ValueError when a trained vision tower is asked
    for features with gradients: they would be out of date after a step.
    """

    def __init__(self, model: torch.nn.Module, max_bytes: int = 1 << 30):
        encoders: list[Any] = [module for module in model.modules() if hasattr(module, "get_image_features")]
        if not encoders:
            raise TypeError(f"{type(model).__name__} has no get_image_features: its pages cannot be kept")
        self.max_bytes, self.bytes, self.hits, self.misses = max_bytes, 0, 0, 0
        self._kept: OrderedDict[Key, Features] = OrderedDict()
        self._begun: dict[Key, Future[Features]] = {}  # pages that a batch is encoding
        self._lock = threading.Lock()
        self._module = encoders[-1]  # modules() lists a model before what is inside it
        self._encode = self._module.get_image_features
        if hasattr(self._encode, "page_cache"):
            raise ValueError(f"this {type(model).__name__} has a page cache already")

        @functools.wraps(self._encode)  # `generate` reads the signature
        def features(*given: Any, **options: Any) -> Any:
            return self._features(*given, **options)

        cast(Any, features).page_cache = self
        self._module.get_image_features = features

    @staticmethod
    def supports(model: torch.nn.Module) -> bool:
        """Is the model of a type whose features are known to come apart by page?"""
        return getattr(getattr(model, "config", None), "model_type", None) in SUPPORTED

    @property
    def hit_rate(self) -> float:
        """Share of the pages asked for that were there already; 0 before the first."""
        return self.hits / max(1, self.hits + self.misses)

    def remove(self) -> None:
        """Forget all pages and let the model encode for itself again."""
        self.clear()
        del self._module.get_image_features

    def clear(self) -> None:
        """Forget all pages, as is necessary when the vision tower's weights were changed."""
        self._kept.clear()
        self.bytes = 0

    def _features(self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor | None = None, **options: Any) -> Any:
        if torch.is_grad_enabled() and any(p.requires_grad for p in _vision_parameters(self._module)):
            raise ValueError("the vision tower is being trained: its features cannot be kept (freeze it, or no cache)")
        if image_grid_thw is None:
            pages = list(pixel_values.split(1))  # tiles; each is encoded for itself
            keys = [_key(page, None, options) for page in pages]
        else:
            pages = list(pixel_values.split(image_grid_thw.prod(-1).tolist()))
            keys = [_key(page, grid, options) for page, grid in zip(pages, image_grid_thw, strict=True)]

        def encode(places: list[int]) -> list[Features]:
            given = {} if image_grid_thw is None else {"image_grid_thw": image_grid_thw[places]}
            return self._encoded(torch.cat([pages[i] for i in places]), [1] * len(places), **given, **options)

        return self.joined(self._found(keys, encode))

    def encoded(self, keys: Sequence[bytes], image: Callable[[bytes], Image.Image], processor: Any) -> list[Features]:
        """The features of pages that are known by `keys`; `image` gives those that are not here yet.

        Beside what `joined` needs, each has "text" and "grid".
        """
        settings = processor.image_processor.to_json_string()  # scaled otherwise, a page is another page

        def encode(places: list[int]) -> list[Features]:
            images = [image(keys[i]) for i in places]
            options = processor._merge_kwargs(tokenizer_init_kwargs=processor.tokenizer.init_kwargs)["images_kwargs"]
            seen, texts = processor._process_images(images, **{**options, "return_tensors": "pt"})
            grids = seen.get("image_grid_thw")
            tiles = [1] * len(images)  # of each page
            if "num_patches" in seen:
                tiles = [int(count) for count in seen["num_patches"]]
            elif "num_crops" in seen:
                tiles = [1 + int(count) for count in seen["num_crops"]]
            model: Any = self._module
            pixels = seen["pixel_values"].to(model.device, model.dtype)
            given = {} if grids is None else {"image_grid_thw": grids.to(model.device)}
            pages = self._encoded(pixels, tiles, **given)
            for i, page in enumerate(pages):
                page |= {"text": texts[i], "grid": None if grids is None else grids[i]}
            return pages

        return self._found([(key, settings) for key in keys], encode)

    def joined(self, pages: Sequence[Features]) -> Any:
        """What `get_image_features` would have returned for these pages."""
        outputs = [page["pooler_output"] for page in pages]
        values: dict[str, Any] = {"pooler_output": tuple(outputs) if self._listed else torch.cat(outputs)}
        if "deepstack_features" in pages[0]:
            values["deepstack_features"] = [
                tuple(layer) for layer in zip(*(page["deepstack_features"] for page in pages), strict=True)
            ]
        return self._kind(**values)

    def _found(self, keys: Sequence[Key], encode: Callable[[list[int]], list[Features]]) -> list[Features]:
        """The pages of these keys; `encode` makes those that are not kept, and is told where each first stands."""
        new: dict[Key, int] = {}
        with self._lock:  # batches side by side encode at once, but no page twice
            found = {key: self._kept[key] for key in keys if key in self._kept}
            elsewhere = {key: self._begun[key] for key in keys if key in self._begun and key not in found}
            for i, key in enumerate(keys):
                if key not in found and key not in elsewhere:
                    new.setdefault(key, i)
            begun = {key: Future[Features]() for key in new}
            self._begun |= begun
            self.misses += len(new)
            self.hits += len(keys) - len(new)
        try:
            found |= zip(new, encode(list(new.values())) if new else [], strict=True)
        except BaseException as error:
            for future in begun.values():
                future.set_exception(error)
            raise
        else:
            for key, future in begun.items():
                future.set_result(found[key])
        finally:
            with self._lock:
                for key in begun:
                    if key in found:
                        self._keep(key, found[key])
                    del self._begun[key]
        found |= {key: future.result() for key, future in elsewhere.items()}
        with self._lock:
            for key in keys:
                self._keep(key, found[key])
        return [found[key] for key in keys]

    def _encoded(self, pixels: torch.Tensor, tiles: list[int], **options: Any) -> list[Features]:
        """The features of each page, as tensors of their own, so that a page can be forgotten without the others.

        tiles: rows of each page, where features come as one tensor with a row a tile
        """
        with torch.no_grad():
            output = self._encode(pixels, **{**options, "return_dict": True})
        self._kind, self._listed = type(output), not isinstance(output.pooler_output, torch.Tensor)
        if not self._listed:
            ends = list(accumulate(tiles))
            return [
                {"pooler_output": output.pooler_output[end - count : end].clone()}
                for end, count in zip(ends, tiles, strict=True)
            ]
        pages: list[Features] = [{"pooler_output": features.clone()} for features in output.pooler_output]
        deep: Sequence[Any] | None = getattr(output, "deepstack_features", None)
        if deep is not None:
            for i, page in enumerate(pages):
                page["deepstack_features"] = [layer[i].clone() for layer in deep]
        return pages

    def _keep(self, key: Key, page: Features) -> None:
        if key in self._kept:
            self._kept.move_to_end(key)
            return
        size = _bytes(page)
        if size > self.max_bytes:
            return
        self._kept[key] = page
        self.bytes += size
        while self.bytes > self.max_bytes:
            _, oldest = self._kept.popitem(last=False)
            self.bytes -= _bytes(oldest)


def _vision_parameters(module: torch.nn.Module):
    language = getattr(module, "language_model", None)
    inside = {id(p) for p in language.parameters()} if language is not None else set()
    return (p for p in module.parameters() if id(p) not in inside)


def _key(page: torch.Tensor, grid: torch.Tensor | None, options: dict[str, Any]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    digest.update(repr((tuple(page.shape), None if grid is None else grid.tolist(), sorted(options.items()))).encode())
    digest.update(page.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.digest()


def _bytes(page: Features) -> int:
    tensors = [page["pooler_output"], *page.get("deepstack_features", ())]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
