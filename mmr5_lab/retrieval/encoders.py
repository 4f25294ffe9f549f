"""Models that turn pages and questions into vectors: the paper's retrievers, and a dense text embedder.

    encoder = load_encoder("colqwen", "vidore/colqwen2-v1.0-hf")
    pages = encoder.encode_pages([image, …])             # arrays of shape (vectors, dimensions), of length 1 each
    queries = encoder.encode_queries(["How high was…?"])

What matters is that prompts, pooling and normalisation are those that a model was trained with. Each class names where
its recipe stands; the tests hold it against that recipe on a small random model of the same architecture.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import normalize
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPModel,
    ColQwen2ForRetrieval,
    LlavaNextForConditionalGeneration,
)

from mmr5_lab.images import open_page

IMAGE, TEXT = "image", "text"


def best_device() -> str:
    """The accelerator that PyTorch finds ("cuda", "mps", …), or "cpu"."""
    return str(torch.accelerator.current_accelerator(check_available=True) or "cpu")


class Encoder(Protocol):
    """What retrieval needs of a model.

    reads: "image" or "text", what `encode_pages` takes of a page
    about: JSON values that the vectors depend on

    Both methods return one array of shape (vectors, dimensions) for each input, each vector of length 1, the same
    whatever the batch.
    """

    reads: str
    about: dict[str, Any]

    def encode_pages(self, pages: Sequence[Any]) -> list[np.ndarray]: ...

    def encode_queries(self, queries: Sequence[str]) -> list[np.ndarray]: ...


class _ImageEncoder:
    """A transformers model and its processor, loaded where they run best.

    By default a vector is the last token's state, so texts are padded on the left; subclasses make the inputs.
    """

    method: str
    model_class: Any
    padding_side: str | None = "left"
    reads = IMAGE
    _page_inputs: Any  # list of images -> what the model takes
    _query_inputs: Any  # list of texts -> what the model takes

    def __init__(self, model: str | Path, *, device: str | None = None):
        self.device = device or best_device()
        dtype = torch.bfloat16 if self.device.startswith("cuda") else torch.float32
        self.model = self.model_class.from_pretrained(model, dtype=dtype).to(self.device).eval()
        self.processor: Any = AutoProcessor.from_pretrained(model)
        if self.padding_side:
            self.processor.tokenizer.padding_side = self.padding_side
        self.about: dict[str, Any] = {"method": self.method, "model": str(model)}

    @torch.inference_mode()
    def encode_pages(self, pages: Sequence[Image.Image]) -> list[np.ndarray]:
        return [vectors.cpu().numpy() for vectors in self.page_vectors(pages)]

    @torch.inference_mode()
    def encode_queries(self, queries: Sequence[str]) -> list[np.ndarray]:
        return [vectors.cpu().numpy() for vectors in self.query_vectors(queries)]

    def page_vectors(self, pages: Sequence[Image.Image]) -> list[torch.Tensor]:
        """Return what `encode_pages` does as tensors, with gradients where they are on."""
        return self._vectors(self._page_inputs([open_page(page) for page in pages]).to(self.device))

    def query_vectors(self, queries: Sequence[str]) -> list[torch.Tensor]:
        """Return what `encode_queries` does as tensors, with gradients where they are on."""
        return self._vectors(self._query_inputs([_plain(query) for query in queries]).to(self.device))

    def _vectors(self, inputs: Any) -> list[torch.Tensor]:
        return _single(self.model.model(**inputs).last_hidden_state[:, -1])

    def _inputs(self, **options: Any) -> Any:
        return self.processor(return_tensors="pt", padding=True, **options)

    def _set_pixels(self, least: int, recipe: int, max_pixels: int | None) -> None:
        """Scale pages to `least` to `max_pixels`; None: the recipe's, or the model folder's own where that is lower."""
        most = max_pixels or min(recipe, self.processor.image_processor.size["longest_edge"])
        self.processor.image_processor.size = {"shortest_edge": min(least, most), "longest_edge": most}
        self.about["max_pixels"] = most


def _plain(query: str) -> str:
    """Return a question in which a Qwen tokenizer sees no special token, such as an image's."""
    return query.replace("<|", "< |")


def _single(vectors: torch.Tensor) -> list[torch.Tensor]:
    """Return one normalised vector an input, shape (1, dimensions)."""
    return list(normalize(vectors.float(), dim=-1)[:, None])


class ClipEncoder(_ImageEncoder):
    """CLIP: projected features of both towers (https://arxiv.org/abs/2103.00020; CLIPModel.forward in transformers).

    A page is squeezed to the vision tower's square of 224 or 336 pixels; a question is cut after 77 tokens.
    """

    method, model_class, padding_side = "clip", CLIPModel, None

    def _page_inputs(self, pages: list[Image.Image]) -> Any:
        return self.processor(images=pages, return_tensors="pt")

    def _query_inputs(self, queries: list[str]) -> Any:
        length = self.model.config.text_config.max_position_embeddings
        return self._inputs(text=queries, truncation=True, max_length=length)

    def _vectors(self, inputs: Any) -> list[torch.Tensor]:
        tower = self.model.get_text_features if "input_ids" in inputs else self.model.get_image_features
        return _single(tower(**inputs).pooler_output)


class E5VEncoder(_ImageEncoder):
    """E5-V: the last state after asking for one word (https://huggingface.co/royokong/e5-v, arXiv 2407.12580)."""

    method, model_class = "e5-v", LlavaNextForConditionalGeneration
    _template = (
        "<|start_header_id|>user<|end_header_id|>\n\n{}\nSummary above {} in one word: <|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n \n"
    )

    def _page_inputs(self, pages: list[Image.Image]) -> Any:
        return self._inputs(images=pages, text=[self._template.format("<image>", "image")] * len(pages))

    def _query_inputs(self, queries: list[str]) -> Any:
        # <image> in a question would ask for an image that is not there.
        safe = [query.replace("<image>", "image") for query in queries]
        return self._inputs(text=[self._template.format("{}", "sentence").format(query) for query in safe])


class DseEncoder(_ImageEncoder):
    """DSE on Qwen2-VL: the state of <|endoftext|> after the prompt (https://huggingface.co/MrLight/dse-qwen2-2b-mrl-v1,
    arXiv 2406.11251). A question comes with a blank image of one visual token, as in training.
    """

    method, model_class = "dse", AutoModelForImageTextToText

    def __init__(self, model: str | Path, *, max_pixels: int | None = None, **options: Any):
        super().__init__(model, **options)
        self._set_pixels(28 * 28, 2560 * 28 * 28, max_pixels)

    def _page_inputs(self, pages: list[Image.Image]) -> Any:
        return self._prompted(pages, ["What is shown in this image?"] * len(pages))

    def _query_inputs(self, queries: list[str]) -> Any:
        return self._prompted([Image.new("RGB", (28, 28))] * len(queries), [f"Query: {query}" for query in queries])

    def _prompted(self, images: list[Image.Image], texts: list[str]) -> Any:
        prompts = []
        for text in texts:
            message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
            prompt = self.processor.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
            prompts.append(prompt + "<|endoftext|>")
        return self._inputs(images=images, text=prompts)


class GmeEncoder(_ImageEncoder):
    """GME on Qwen2-VL: the state of the last token (https://huggingface.co/Alibaba-NLP/gme-Qwen2-VL-2B-Instruct,
    gme_inference.py; arXiv 2412.16855).

    Its code hands embeddings to the language model without positions, so visual tokens are numbered one by one, not by
    row and column as Qwen2-VL does by itself. We do the same: the weights were published with that.
    """

    method, model_class, padding_side = "gme", AutoModelForImageTextToText, "right"
    _prompt = "<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<|endoftext|>"
    _page = _prompt.format("You are a helpful assistant.", "<|vision_start|><|image_pad|><|vision_end|>")
    _query = _prompt.format("Find an image that matches the given text.", "{}")

    def __init__(self, model: str | Path, *, max_pixels: int | None = None, **options: Any):
        super().__init__(model, **options)
        self._set_pixels(256 * 28 * 28, 1280 * 28 * 28, max_pixels)

    def _page_inputs(self, pages: list[Image.Image]) -> Any:
        return self._inputs(images=pages, text=[self._page] * len(pages))

    def _query_inputs(self, queries: list[str]) -> Any:
        return self._inputs(text=[self._query.format(query) for query in queries])

    def _vectors(self, inputs: Any) -> list[torch.Tensor]:
        positions = torch.arange(inputs["input_ids"].shape[1], device=self.device).expand(3, *inputs["input_ids"].shape)
        states = self.model.model(**inputs, position_ids=positions).last_hidden_state
        ends = inputs["attention_mask"].sum(1) - 1
        return _single(states[torch.arange(len(ends), device=self.device), ends])


class ColQwenEncoder(_ImageEncoder):
    """ColQwen2 and ColQwen2.5: a vector a token, for late interaction (arXiv 2407.01449; colpali-engine's ColQwen2 and
    ColQwen2_5; https://huggingface.co/docs/transformers/model_doc/colqwen2, whose checkpoints end with -hf).

    Prompts are the processor's. transformers 5.23 numbers the visual tokens of a page one by one, because it hands the
    language model embeddings alone; colpali-engine, with which the weights were trained, numbers them by row and column
    (M-RoPE). We pass the latter.
    """

    method, model_class, padding_side = "colqwen", ColQwen2ForRetrieval, None

    def __init__(self, model: str | Path, *, max_pixels: int | None = None, **options: Any):
        super().__init__(model, **options)
        self._set_pixels(4 * 28 * 28, 768 * 28 * 28, max_pixels)

    def _page_inputs(self, pages: list[Image.Image]) -> Any:
        return self.processor.process_images(images=pages)

    def _query_inputs(self, queries: list[str]) -> Any:
        return self.processor.process_queries(text=queries)

    def _vectors(self, inputs: Any) -> list[torch.Tensor]:
        inputs.pop("mm_token_type_ids", None)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        if "image_grid_thw" in inputs:
            image = (ids == self.processor.image_token_id).int()
            inputs["position_ids"] = self.model.vlm.get_rope_index(
                ids, mm_token_type_ids=image, image_grid_thw=inputs["image_grid_thw"], attention_mask=mask
            )[0]
        vectors = self.model(**inputs).embeddings.float()
        return [v[m] for v, m in zip(vectors, mask.bool(), strict=True)]  # without the batch's padding

    @torch.inference_mode()
    def heat_map(self, query: str, page: Any) -> tuple[list[str], np.ndarray]:
        """Return the tokens of a question and how much each of a page's patches is like each of them.

        Tokens are those of the question alone, without the prompt's. The array has shape (tokens, rows, columns) and
        holds cosines. A token adds its largest to the page's score (MaxSim), unless it finds more in the prompt.
        """
        inputs = self._page_inputs([open_page(page)]).to(self.device)
        image = inputs["input_ids"][0] == self.processor.image_token_id
        _, height, width = inputs["image_grid_thw"][0].tolist()
        merge = self.processor.image_processor.merge_size
        [patches] = self._vectors(inputs)
        [words] = self.query_vectors([query])
        prefix = self.processor.query_prefix
        tokens = self.processor.tokenizer(prefix + _plain(query), add_special_tokens=False, return_offsets_mapping=True)
        kept = [k for k, (_, end) in enumerate(tokens["offset_mapping"]) if end > len(prefix)]
        likeness = (words[kept] @ patches[image].T).cpu().numpy()
        texts = [self.processor.tokenizer.decode([tokens["input_ids"][k]]).strip() for k in kept]
        return texts, likeness.reshape(-1, height // merge, width // merge)


class DenseEncoder:
    """Any text embedder of sentence-transformers, on the words of a page (`pip install "mmr5-lab[retrieval]"`).

    Prompts are the model's own for queries and documents; `query_prompt` stands in for models that keep none, such as
    BGE (https://huggingface.co/BAAI/bge-large-en-v1.5). A page longer than the model's window is cut.
    """

    method, reads = "dense", TEXT

    def __init__(self, model: str | Path, *, device: str | None = None, query_prompt: str | None = None):
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError:
            raise RuntimeError(
                'the dense text embedder needs sentence-transformers: pip install "mmr5-lab[retrieval]"'
            ) from None
        self.model = SentenceTransformer(str(model), device=device or best_device())
        self._query_prompt = query_prompt
        self.about = {"method": self.method, "model": str(model), "query_prompt": query_prompt}

    def encode_pages(self, pages: Sequence[str]) -> list[np.ndarray]:
        vectors = self.model.encode_document(list(pages), normalize_embeddings=True, show_progress_bar=False)
        return list(vectors[:, None])

    def encode_queries(self, queries: Sequence[str]) -> list[np.ndarray]:
        vectors = self.model.encode_query(
            list(queries), prompt=self._query_prompt, normalize_embeddings=True, show_progress_bar=False
        )
        return list(vectors[:, None])


ENCODERS: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "clip": (ClipEncoder, "openai/clip-vit-large-patch14-336", {}),
    "e5-v": (E5VEncoder, "royokong/e5-v", {}),
    "dse": (DseEncoder, "MrLight/dse-qwen2-2b-mrl-v1", {}),
    "gme": (GmeEncoder, "Alibaba-NLP/gme-Qwen2-VL-2B-Instruct", {}),
    "colqwen": (ColQwenEncoder, "vidore/colqwen2-v1.0-hf", {}),
    "dense": (
        DenseEncoder,
        "BAAI/bge-large-en-v1.5",
        {"query_prompt": "Represent this sentence for searching relevant passages: "},
    ),
}
"""Method -> its class, the model it takes by default, and that model's options."""


def load_encoder(method: str, model: str | Path | None = None, **options: Any) -> Encoder:
    """The encoder of a method of `ENCODERS`; `model` is a folder or a name on the Hugging Face hub.

    options: `device`, and `max_pixels` for those that read images, `query_prompt` for "dense"
    Raises ValueError for an unknown method, RuntimeError for a model that is not there and cannot be fetched.
    """
    if method not in ENCODERS:
        raise ValueError(f"unknown encoder {method!r}; there is: {', '.join(ENCODERS)}")
    encoder, default, its_options = ENCODERS[method]
    if model is None:
        options = its_options | options
    name = str(default if model is None else model)
    try:
        return encoder(name, **options)
    except OSError as error:
        raise RuntimeError(
            f"{name} is neither a model folder nor could it be fetched: run `hf download {name}` where there is a "
            f"network, or name a folder ({str(error).splitlines()[0]})"
        ) from error
