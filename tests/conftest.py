"""What several test files need: the smallest model of the real class, with random weights."""

from pathlib import Path

import pytest

from mmr5_lab.mini.model import build_model, build_processor

TINY = {"hidden": 64, "layers": 1, "vision_hidden": 32, "vision_layers": 1}  # options of `build_model`


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny_model")
    processor = build_processor()
    build_model(processor, **TINY).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
