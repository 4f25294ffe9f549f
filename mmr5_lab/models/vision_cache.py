"""Encode each page once: a bounded cache of what the vision tower makes of a page image.

A page stands among the candidates of several questions (MMDocIR asks five a document), in every epoch of SFT, and
in every completion of a GRPO group. With the vision tower frozen its features never change:

    cache = PageCache(model)            # from here on, generation, scoring and training use it
    reranker.rank_many(pairs)
    cache.hits, cache.misses, cache.bytes

The cache stands in for `get_image_features` of the inner model, which transformers calls in `forward` and in
`generate` alike; there, a page's key is the bytes of its pixels as the tower would see them. A `Reranker` knows a page
sooner, by its file, and then does not even scale it and cut it into patches a second time (`encode`).
"""

import functools
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, groupby
from typing import Any

import torch
from PIL import Image

# Model types whose features come apart by page; tested with each (tests/helpers/architectures.py).
SUPPORTED = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3", "internvl")
PIXELS_AT_ONCE = 8_000_000  # of the pages that are encoded in one pass: eight of the paper's size
Key = bytes | tuple[bytes, str]
# Of one page: "pooler_output", "deepstack_features" where the model has them, and from `encode` "text" (what stands in
# a prompt in its place) and "grid" (patches in time, height and width, where the model needs them).
Features = dict[str, Any]


class PageCache:
    """Keeps the features of the pages that were used last, `max_bytes` of them at most, on the model's device.

    Works for every model of transformers whose `get_image_features` returns one entry a page (Qwen2-VL,
    Qwen2.5-VL, Qwen3-VL) or one row a tile (Gemma 3, InternVL). Raises ValueError when a vision tower in training is
    asked for features: they would be out of date after a step.
    """

    def __init__(self, model: torch.nn.Module, max_bytes: int = 1 << 30):
        self.max_bytes, self.bytes, self.hits, self.misses = max_bytes, 0, 0, 0
        self._kept: OrderedDict[Key, Features] = OrderedDict()
        encoders: list[Any] = [module for module in model.modules() if hasattr(module, "get_image_features")]
        self._module = encoders[-1]  # modules() lists a model before what is inside it
        self._tower = self._module.get_image_features

        @functools.wraps(self._tower)  # `generate` reads the signature
        def features(*args: Any, **options: Any) -> Any:
            return self._features(*args, **options)

        self._module.get_image_features = features

    @staticmethod
    def supports(model: torch.nn.Module) -> bool:
        """Return whether the model is of a type whose features are known to come apart by page."""
        return getattr(getattr(model, "config", None), "model_type", None) in SUPPORTED

    def clear(self) -> None:
        """Forget all pages, as is necessary when the vision tower's weights were changed."""
        self._kept.clear()
        self.bytes = 0

    def encode(
        self,
        keys: Sequence[bytes],
        sizes: Mapping[bytes, tuple[int, int]],
        image: Callable[[bytes], Image.Image],
        processor: Any,
    ) -> list[Features]:
        """Return the features of pages that are known by `keys`, each with "text" and "grid".

        sizes: height and width of each page; image: opens a page that is not in the cache
        """
        settings = processor.image_processor.to_json_string()  # scaled otherwise, a page is another page

        def process(places: list[int]) -> list[Features]:
            return self._process([image(keys[i]) for i in places], processor)

        pixels = [sizes[key][0] * sizes[key][1] for key in keys]
        return self._lookup([(key, settings) for key in keys], pixels, process)

    def joined(self, pages: Sequence[Features]) -> Any:
        """Return what `get_image_features` would have returned for these pages."""
        outputs = [page["pooler_output"] for page in pages]
        values: dict[str, Any] = {"pooler_output": tuple(outputs) if self._listed else torch.cat(outputs)}
        if "deepstack_features" in pages[0]:
            values["deepstack_features"] = list(zip(*(page["deepstack_features"] for page in pages), strict=True))
        return self._kind(**values)

    def _features(self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor | None = None, **options: Any) -> Any:
        """Stand in for the model's `get_image_features`."""
        language = getattr(self._module, "language_model", None)
        of_text = {id(p) for p in language.parameters()} if language is not None else set()
        if torch.is_grad_enabled() and any(p.requires_grad and id(p) not in of_text for p in self._module.parameters()):
            raise ValueError("the vision tower is being trained: its features cannot be kept (freeze it, or no cache)")
        if image_grid_thw is None:  # tiles; each is encoded for itself
            pages, grids = list(pixel_values.split(1)), [None] * len(pixel_values)
        else:
            pages, grids = list(pixel_values.split(image_grid_thw.prod(-1).tolist())), list(image_grid_thw)
        keys = [_pixel_key(page, grid, options) for page, grid in zip(pages, grids, strict=True)]
        pixels = [page.numel() // 6 for page in pages]  # three colours, and Qwen's patches hold each page twice

        def encode(places: list[int]) -> list[Features]:
            grid = {} if image_grid_thw is None else {"image_grid_thw": image_grid_thw[places]}
            return self._run_tower(torch.cat([pages[i] for i in places]), [1] * len(places), **grid, **options)

        return self.joined(self._lookup(keys, pixels, encode))

    def _lookup(
        self, keys: Sequence[Key], pixels: Sequence[int], encode: Callable[[list[int]], list[Features]]
    ) -> list[Features]:
        """Return the pages of these keys; `encode` makes those at the places that it is given."""
        features = {key: self._kept[key] for key in keys if key in self._kept}
        # where each page that is not in the cache first stands
        missing = [i for i, key in enumerate(keys) if key not in features and key not in keys[:i]]
        self.misses += len(missing)
        self.hits += len(keys) - len(missing)
        starts = accumulate((pixels[i] for i in missing), initial=0)
        for _, group in groupby(zip(missing, starts, strict=False), lambda pair: pair[1] // PIXELS_AT_ONCE):
            places = [i for i, _ in group]
            for i, page in zip(places, encode(places), strict=True):
                features[keys[i]] = page
                self._keep(keys[i], page)  # at once: a later group may fail
        for key in keys:
            self._keep(key, features[key])
        return [features[key] for key in keys]

    def _process(self, images: list[Image.Image], processor: Any) -> list[Features]:
        """Scale images, cut them into patches or tiles, and encode them."""
        options = processor._merge_kwargs(tokenizer_init_kwargs=processor.tokenizer.init_kwargs)["images_kwargs"]
        processed, texts = processor._process_images(images, **{**options, "return_tensors": "pt"})
        crops = processed.get("num_crops", [0] * len(images))  # of each page, beside the page itself
        tiles = [int(count) for count in processed.get("num_patches", [1 + count for count in crops])]
        model: Any = self._module
        grids = processed.get("image_grid_thw")
        grid = {} if grids is None else {"image_grid_thw": grids.to(model.device)}
        pages = self._run_tower(processed["pixel_values"].to(model.device, model.dtype), tiles, **grid)
        for i, page in enumerate(pages):
            page |= {"text": texts[i], "grid": None if grids is None else grids[i]}
        return pages

    def _run_tower(self, pixels: torch.Tensor, tiles: list[int], **options: Any) -> list[Features]:
        """Return the features of each page, as tensors of their own, so that one page can be forgotten.

        tiles: rows of each page, where features come as one tensor with a row a tile
        """
        with torch.no_grad():
            output = self._tower(pixels, **{**options, "return_dict": True})
        self._kind, self._listed = type(output), not isinstance(output.pooler_output, torch.Tensor)
        parts = output.pooler_output if self._listed else output.pooler_output.split(tiles)
        pages: list[Features] = [{"pooler_output": part.clone()} for part in parts]
        for layer in getattr(output, "deepstack_features", None) or ():
            for page, part in zip(pages, layer, strict=True):
                page.setdefault("deepstack_features", []).append(part.clone())
        return pages

    def _keep(self, key: Key, page: Features) -> None:
        size = _bytes(page)
        if key in self._kept:
            self._kept.move_to_end(key)
        elif size <= self.max_bytes:
            self._kept[key] = page
            self.bytes += size
        while self.bytes > self.max_bytes:
            _, oldest = self._kept.popitem(last=False)
            self.bytes -= _bytes(oldest)


def _pixel_key(page: torch.Tensor, grid: torch.Tensor | None, options: dict[str, Any]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    digest.update(repr((tuple(page.shape), None if grid is None else grid.tolist(), sorted(options.items()))).encode())
    digest.update(page.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.digest()


def _bytes(page: Features) -> int:
    tensors = [page["pooler_output"], *page.get("deepstack_features", ())]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
