"""The miniature's tokenizer."""

import pytest

from mmr5_lab.mini.documents import ENTITIES, MEASURES, YEARS
from mmr5_lab.mini.model import build_processor


@pytest.fixture(scope="module")
def tokenizer():
    return build_processor().tokenizer


def test_every_word_of_the_vocabulary_is_one_token(tokenizer):
    for word in (*ENTITIES, *MEASURES, *YEARS):
        assert len(tokenizer(f" {word}")["input_ids"]) == 1, word


def test_any_text_survives_the_tokenizer(tokenizer):
    for text in ("Käse, 東京 🙂\n\ttab", "<think>Image 1: a</think><answer>[2, 1]</answer>", "assistant\nassistant"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
