"""Small random models of the paper's retrievers, saved as `from_pretrained` finds them."""

from helpers import architectures
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    PreTrainedTokenizerFast,
)

from mmr5_lab.mini import retrievers
from mmr5_lab.mini.model import build_processor


def tokenizer(*special: str) -> PreTrainedTokenizerFast:
    fast = build_processor().tokenizer
    fast.add_special_tokens({"additional_special_tokens": list(special)}, replace_extra_special_tokens=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=fast.backend_tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        bos_token="<|im_end|>",
    )


def clip(folder):
    words = tokenizer()
    config = CLIPConfig(
        text_config={
            "vocab_size": len(words), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "max_position_embeddings": 77, "eos_token_id": words.eos_token_id,
            "pad_token_id": words.pad_token_id,
        },
        vision_config={
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "image_size": 56, "patch_size": 14,
        },
        projection_dim=24,
    )  # fmt: skip
    images = CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    CLIPModel(config).save_pretrained(folder)
    CLIPProcessor(images, words).save_pretrained(folder)


def e5v(folder):
    words = tokenizer("<image>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    text = LlamaConfig(
        vocab_size=len(words), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, initializer_range=0.3,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=56, patch_size=14
    )
    pinpoints = [[56, 112], [112, 56], [112, 112]]
    image_token = words.convert_tokens_to_ids("<image>")
    config = LlavaNextConfig(
        vision_config=vision, text_config=text, image_token_index=image_token, image_grid_pinpoints=pinpoints,
        vision_feature_layer=-1,
    )  # fmt: skip
    images = LlavaNextImageProcessor(
        size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, image_grid_pinpoints=pinpoints
    )
    LlavaNextForConditionalGeneration(config).save_pretrained(folder)
    LlavaNextProcessor(
        images, words, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1
    ).save_pretrained(folder)


def colqwen(folder, backbone: str):
    for part in retrievers.colqwen(*architectures.BUILD[backbone](), 16):
        part.save_pretrained(folder)


BUILD = {
    "clip": clip,
    "e5-v": e5v,
    "dse": lambda folder: architectures.save("qwen2_vl", folder),
    "gme": lambda folder: architectures.save("qwen2_vl", folder),
    "colqwen2": lambda folder: colqwen(folder, "qwen2_vl"),
    "colqwen2.5": lambda folder: colqwen(folder, "qwen2_5_vl"),
}
