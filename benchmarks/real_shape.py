"""Random-weight models of the real Qwen2.5-VL class, with the shape of the real ones: grouped heads, large pages.

The miniature's ratios measure Python and caches of 200 tokens. Here a page is 1,003,520 pixels, 1,280 visual tokens, as
in the paper, and 5 questions of a document share 11 pages, as they do in MMDocIR (twelve of its documents, BM25's top
five: .56 of the pages were shown before; `docs/log.md`). Weights are random, so texts mean nothing; work and memory are
real. Random weights never end an answer, so a rule does, after 256 to 372 tokens: 314 are five explanations of 40 words
and the ids in Qwen's vocabulary.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from zlib import crc32

import torch
from PIL import Image
from transformers import LogitsProcessor, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from mmr5_lab.corpus.documents import load_corpus
from mmr5_lab.experiments.runs import project_root
from mmr5_lab.mini.model import SPECIAL, build_processor

PAGE = (896, 1120)  # width, height: 1,003,520 pixels, 1,280 visual tokens
DOCUMENT_PAGES, QUESTIONS = 11, 5
MEDIUM = {"hidden": 1024, "layers": 5, "heads": 8, "vision_hidden": 320, "vision_layers": 4}  # 81 million parameters
LARGE = {"hidden": 1536, "layers": 14, "heads": 12, "vision_hidden": 640, "vision_layers": 12}  # 410 million
SEVEN_B = {  # Qwen2.5-VL-7B's own numbers, from its config.json
    "hidden": 3584, "inner": 18_944, "layers": 28, "heads": 28, "key_heads": 4, "vocabulary": 152_064, "tied": False,
    "vision_hidden": 1280, "vision_inner": 3420, "vision_layers": 32, "whole": [7, 15, 23, 31],
}  # fmt: skip


def build(
    folder: Path,
    *,
    hidden: int,
    layers: int,
    heads: int,
    vision_hidden: int,
    vision_layers: int,
    inner: int = 0,
    key_heads: int = 0,
    vocabulary: int = 16_384,
    tied: bool = True,
    vision_inner: int = 0,
    whole: Sequence[int] = (),
) -> None:
    """Write a random model, 128 numbers a head, and its processor into `folder`.

    inner, vision_inner: of the gated MLPs; 0: 11/4 of the width. key_heads; 0: a quarter of the query heads.
    whole: layers of the vision tower that look at a whole page; (): the last one
    """
    processor = build_processor()
    processor.image_processor.size = {"shortest_edge": 28 * 28, "longest_edge": PAGE[0] * PAGE[1]}
    ids = dict(zip(SPECIAL, processor.tokenizer.convert_tokens_to_ids(SPECIAL), strict=True))
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": inner or hidden * 11 // 4,
            "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": key_heads or heads // 4,
            "max_position_embeddings": 32_768, "tie_word_embeddings": tied, "initializer_range": 0.06 if tied else 0.02,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
            "bos_token_id": None, "eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={
            "depth": vision_layers, "hidden_size": vision_hidden,
            "intermediate_size": vision_inner or vision_hidden * 11 // 4,
            "num_heads": vision_hidden // 80, "patch_size": 14, "temporal_patch_size": 2, "spatial_merge_size": 2,
            "window_size": 112, "fullatt_block_indexes": list(whole) or [vision_layers - 1], "out_hidden_size": hidden,
        },
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=tied,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):  # billions of numbers are drawn faster on a GPU
        model = Qwen2_5_VLForConditionalGeneration(config)
    if torch.cuda.is_available():
        model.to(torch.bfloat16)
    model.generation_config.suppress_tokens = [ids[name] for name in SPECIAL if "image" in name or "vi" in name]
    model.generation_config.eos_token_id = ids["<|im_end|>"]
    model.generation_config.pad_token_id = ids["<|endoftext|>"]
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def document_questions(documents: int) -> list[tuple[str, list[bytes]]]:
    """Five questions of each document with five pages each, of eleven that they share."""
    corpus = load_corpus(project_root() / "data/mini/corpus").split("eval")
    rows = zip(corpus.documents["doc_name"], corpus.documents["num_pages"], strict=True)
    places = [(name, page) for name, count in rows for page in range(count)]
    pairs = []
    for d in range(documents):
        pages = [_large(corpus.page_image(*places[d * DOCUMENT_PAGES + k])) for k in range(DOCUMENT_PAGES)]
        for q in range(QUESTIONS):
            shown = [pages[(2 * q + k) % DOCUMENT_PAGES] for k in range(5)]
            pairs.append((f"What was the staff of Orion in {2014 + q} in document {d}?", shown))
    return pairs


def _large(page: Image.Image) -> bytes:
    file = io.BytesIO()
    page.resize(PAGE, Image.Resampling.NEAREST).save(file, "PNG")
    return file.getvalue()


class EndByPrompt(LogitsProcessor):
    """Ends each row after 256 to 372 tokens, a number that follows from its prompt alone, in any batch."""

    def __init__(self, end: int, padding: int):
        self.end, self.padding, self.lengths, self.seen = end, padding, [], 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if len(self.lengths) != len(input_ids) or input_ids.shape[1] != self.seen + 1:  # another batch
            self.width = input_ids.shape[1]
            prompts = [row[row != self.padding].cpu().numpy().tobytes() for row in input_ids]
            self.lengths = [256 + crc32(prompt) % 117 for prompt in prompts]
        self.seen = input_ids.shape[1]
        for row, length in enumerate(self.lengths):
            scores[row, self.end] = torch.inf if input_ids.shape[1] - self.width + 1 >= length else -torch.inf
        return scores
