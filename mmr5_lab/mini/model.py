"""A tokenizer, a processor and a model of the real Qwen2.5-VL classes, small enough for two CPU cores.

The tokenizer has whole words for the miniature's vocabulary, bytes for everything else, and one token for each
fixed sentence of the released prompt: tokens may span words (as in SuperBPE, arXiv 2503.13423), the text
stays byte for byte the same, and a prompt of five pages takes about 240 tokens instead of 600.
"""

import re

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
)
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

from mmr5_lab.mini.documents import CELL, ENTITIES, FINE_PRINT, HEIGHT, KINDS, MEASURES, QUESTIONS, WIDTH, YEARS
from mmr5_lab.prompting.prompts import build_messages

SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
# Phrases of the model's own language that are one token each (the description of a page, its verdicts).
PHRASES = [
    " (right)", " (wrong)", " It answers the question.", " It does not help.", "Image ", "\nImage ",
    "<think>", "</think>",
    "assistant\n",  # else its line break and a completion's first "Image " would become one token
    "<answer>[", "]</answer>", *(f" a {kind} with" for kind in KINDS), "Describe each image.", "Repeat:",
    " Compare each image with the question.", "Which images show ", "? Answer with their ids.",
    " shows ", ". The other images do not.",
]  # fmt: skip
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def prompt_sentences() -> list[str]:
    """The fixed pieces of the released prompt: what is left when query, numbers and images are cut out."""
    texts = [part["text"] for m in build_messages("QUERY", 2) for part in m["content"] if part["type"] == "text"]
    pieces = [piece for text in texts for piece in re.split(r"QUERY|(?<=[ :])\d(?=[ :,])|(?<=to )\d", text)]
    return sorted({piece for piece in pieces if len(piece) > 8}, key=len, reverse=True)


def build_tokenizer() -> PreTrainedTokenizerFast:
    words = [*ENTITIES, *MEASURES, *(measure.capitalize() for measure in MEASURES), *YEARS, *FINE_PRINT]
    texts = [f" {word}" for word in words] * 20 + words * 20
    texts += [q.format(entity="Orion", measure="staff", year="2014") for q in QUESTIONS] * 20
    texts += [
        "\nsystem\nuser\nassistant\n to in of and with the a no not right wrong: . , [ ] ( ) ?"
        " text table chart figure\n\n"
    ] * 20
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r", (?=\d)| ?\d{4}| ?[A-Za-z]+|\d|\n| ?[^\sA-Za-z\d]|\s"), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=1400, special_tokens=SPECIAL, initial_alphabet=sorted(alphabet), show_progress=False
        ),
    )
    phrases = [AddedToken(text, normalized=False) for text in [*prompt_sentences(), *PHRASES]]
    tokenizer.add_tokens(phrases)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL,
        padding_side="left", clean_up_tokenization_spaces=False, model_max_length=4096,
    )  # fmt: skip


def build_processor() -> Qwen2_5_VLProcessor:
    paper, contrast = [0.95] * 3, [0.25] * 3  # blank paper becomes nearly 0: a tower this small learns twice as fast
    images = Qwen2VLImageProcessor(
        min_pixels=CELL * CELL, max_pixels=WIDTH * HEIGHT, image_mean=paper, image_std=contrast
    )
    return Qwen2_5_VLProcessor(
        image_processor=images,
        tokenizer=build_tokenizer(), video_processor=Qwen2VLVideoProcessor(), chat_template=CHAT_TEMPLATE,
    )  # fmt: skip


def build_model(processor, *, hidden=192, layers=4, vision_hidden=96, vision_layers=2, seed=0):
    """A random ``Qwen2_5_VLForConditionalGeneration``: about 2.7 million parameters, float32."""
    tokenizer = processor.tokenizer
    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(SPECIAL), strict=True))
    half = hidden // 4 // 2  # half a head: what mrope's three sections (time, height, width) must add up to
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": hidden, "intermediate_size": hidden * 8 // 3,
            "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 4,
            "max_position_embeddings": 4096, "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 10000.0,
                "mrope_section": [half - 2 * (half // 3), half // 3, half // 3],
            },
            "initializer_range": 0.06,  # 0.02 suits thousands of dimensions, not hundreds: it starts too slowly
            "bos_token_id": None, "eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={
            "depth": vision_layers, "hidden_size": vision_hidden, "intermediate_size": vision_hidden * 2,
            "num_heads": 4,
            "patch_size": CELL // 2, "temporal_patch_size": 2, "spatial_merge_size": 2, "window_size": 4 * CELL,
            "fullatt_block_indexes": list(range(vision_layers)), "out_hidden_size": hidden,
        },
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = ids["<|im_end|>"]
    model.generation_config.pad_token_id = ids["<|endoftext|>"]
    return model
