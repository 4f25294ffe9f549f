"""Tiny models of five real architectures with random weights, saved as `from_pretrained` finds them."""

from pathlib import Path

import torch
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessor,
    Gemma3Processor,
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
)
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

from mmr5_lab.mini.model import CHAT_TEMPLATE, build_model, build_processor

QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


def save(name: str, folder: Path) -> Path:
    """Write a tiny model of an architecture and its processor into `folder`."""
    torch.manual_seed(0)
    model, processor = BUILD[name]()
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _ids(tokenizer) -> dict[str, int]:
    return {
        "image_token_id": tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        "video_token_id": tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        "vision_start_token_id": tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        "vision_end_token_id": tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    }


def _text(tokenizer, **more) -> dict:
    return {
        "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None,
        "initializer_range": 0.3,  # far from uniform, so that greedy decoding has no ties
        **more,
    }  # fmt: skip


def _rope() -> dict:
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}


def _qwen2_5_vl():
    processor = build_processor()
    return build_model(processor, hidden=64, layers=2, vision_hidden=32, vision_layers=1), processor


def _qwen2_vl():
    base = build_processor()
    processor = Qwen2VLProcessor(base.image_processor, base.tokenizer, base.video_processor, CHAT_TEMPLATE)
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 4, "patch_size": 14, "mlp_ratio": 2}
    text = _text(base.tokenizer, rope_parameters=_rope())
    config = Qwen2VLConfig(text_config=text, vision_config=vision, **_ids(base.tokenizer))
    return Qwen2VLForConditionalGeneration(config), processor


def _qwen3_vl():
    base = build_processor()
    processor = Qwen3VLProcessor(base.image_processor, base.tokenizer, Qwen3VLVideoProcessor(), CHAT_TEMPLATE)
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "patch_size": 14,
        "out_hidden_size": 64, "num_position_embeddings": 144, "deepstack_visual_indexes": [0, 1],
    }  # fmt: skip
    text = _text(base.tokenizer, head_dim=16, rope_parameters={**_rope(), "mrope_interleaved": True})
    config = Qwen3VLConfig(text_config=text, vision_config=vision, **_ids(base.tokenizer))
    return Qwen3VLForConditionalGeneration(config), processor


def _renamed(tokens: dict[str, str]) -> PreTrainedTokenizerFast:
    """The miniature's tokenizer with further named special tokens."""
    tokenizer = build_processor().tokenizer
    tokenizer.add_special_tokens(
        {"additional_special_tokens": list(tokens.values())}, replace_extra_special_tokens=False
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        padding_side="left", extra_special_tokens=tokens,
    )  # fmt: skip


def _gemma3():
    names = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    tokenizer = _renamed(names)
    template = CHAT_TEMPLATE.replace(QWEN_IMAGE, "<start_of_image>")
    images = Gemma3ImageProcessor(size={"height": 56, "width": 56})
    processor = Gemma3Processor(images, tokenizer, chat_template=template, image_seq_length=4)
    config = Gemma3Config(
        text_config=_text(tokenizer, head_dim=16, sliding_window=4096),
        vision_config={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
                       "image_size": 56, "patch_size": 14},
        mm_tokens_per_image=4,
        boi_token_index=tokenizer.boi_token_id, eoi_token_index=tokenizer.eoi_token_id,
        image_token_index=tokenizer.image_token_id,
    )  # fmt: skip
    return Gemma3ForConditionalGeneration(config), processor


def _internvl():
    names = {
        "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }  # fmt: skip
    tokenizer = _renamed(names)
    template = CHAT_TEMPLATE.replace(QWEN_IMAGE, "<IMG_CONTEXT>")
    images = GotOcr2ImageProcessor(size={"height": 56, "width": 56}, crop_to_patches=True, min_patches=1, max_patches=2)
    processor = InternVLProcessor(
        images, tokenizer, InternVLVideoProcessor(), image_seq_length=4, chat_template=template
    )
    config = InternVLConfig(
        text_config={"model_type": "qwen2", **_text(tokenizer)},
        vision_config={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
                       "image_size": [56, 56], "patch_size": [14, 14]},
        image_token_id=tokenizer.context_image_token_id, image_seq_length=4, downsample_ratio=0.5,
    )  # fmt: skip
    return InternVLForConditionalGeneration(config), processor


BUILD = {
    "qwen2_vl": _qwen2_vl, "qwen2_5_vl": _qwen2_5_vl, "qwen3_vl": _qwen3_vl, "gemma3": _gemma3, "internvl": _internvl,
}  # fmt: skip
