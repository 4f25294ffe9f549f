"""The paper's retrievers on small random models of their architectures, held against the recipes of their cards."""

import numpy as np
import pytest
import torch
from helpers.retrievers import BUILD, tokenizer
from PIL import Image
from transformers import (
    BertConfig,
    BertModel,
)

from mmr5_lab.retrieval import encoders
from mmr5_lab.retrieval.encoders import ENCODERS, load_encoder

QUERIES = ["How high was the staff of Orion in 2014?", "sales of Cedar"]
SHAPES = [(120, 90), (90, 120), (64, 64)]


def pages() -> list[Image.Image]:
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 255, (h, w, 3), dtype=np.uint8)) for w, h in SHAPES]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder(name: str):
        if name not in made:
            torch.manual_seed(0)
            made[name] = tmp_path_factory.mktemp(name)
            BUILD[name](made[name])
        return made[name]

    return folder


def loaded(folders, name: str, **options):
    if name in ("dse", "gme"):
        options |= {"max_pixels": 56 * 84}
    if name.startswith("colqwen"):
        options |= {"max_pixels": 56 * 84}
    return load_encoder("colqwen" if name.startswith("colqwen") else name, folders(name), device="cpu", **options)


@pytest.mark.parametrize("name", BUILD)
def test_vectors_have_length_one_and_do_not_depend_on_the_batch(folders, name):
    encoder = loaded(folders, name)
    for encode, inputs in ((encoder.encode_pages, pages()), (encoder.encode_queries, QUERIES)):
        together = encode(inputs)
        assert len(together) == len(inputs)
        for one, alone in zip(together, (encode([item])[0] for item in inputs), strict=True):
            assert one.dtype == np.float32
            assert one.shape == alone.shape
            assert np.allclose(np.linalg.norm(one, axis=1), 1, atol=1e-5)
            assert np.allclose(one, alone, atol=2e-4)
        assert not np.allclose(together[0][-1], together[1][-1], atol=1e-3)  # it does read its input


@torch.inference_mode()
def test_clip_is_what_its_forward_compares(folders):
    encoder = loaded(folders, "clip")
    inputs = encoder.processor(text=QUERIES, images=pages(), return_tensors="pt", padding=True)
    output = encoder.model(**inputs)
    assert np.allclose(np.concatenate(encoder.encode_pages(pages())), output.image_embeds, atol=1e-5)
    assert np.allclose(np.concatenate(encoder.encode_queries(QUERIES)), output.text_embeds, atol=1e-5)
    assert encoder.encode_queries(["Orion " * 200])[0].shape == (1, 24)  # cut after 77 tokens, not refused


@torch.inference_mode()
def test_e5v_follows_its_card(folders):
    encoder = loaded(folders, "e5-v")
    template = (
        "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n \n"
    )
    image = template.format("<image>\nSummary above image in one word: ")
    text = template.format("<sent>\nSummary above sentence in one word: ")
    for encode, item, given in (
        (encoder.encode_pages, pages()[0], {"text": [image], "images": [pages()[0]]}),
        (encoder.encode_queries, QUERIES[0], {"text": [text.replace("<sent>", QUERIES[0])]}),
    ):
        inputs = encoder.processor(**given, return_tensors="pt", padding=True)
        states = encoder.model(**inputs, output_hidden_states=True).hidden_states[-1]
        assert np.allclose(encode([item])[0], torch.nn.functional.normalize(states[:, -1], dim=-1), atol=1e-5)
    encoder.encode_queries(["What does <image> show?", "{curly}"])  # no placeholder without an image


@torch.inference_mode()
def test_dse_follows_its_card(folders):
    encoder = loaded(folders, "dse")
    for encode, item, image, text in (
        (encoder.encode_pages, pages()[0], pages()[0], "What is shown in this image?"),
        (encoder.encode_queries, QUERIES[0], Image.new("RGB", (28, 28)), f"Query: {QUERIES[0]}"),
    ):
        message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
        prompt = encoder.processor.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        inputs = encoder.processor(text=[prompt + "<|endoftext|>"], images=[image], return_tensors="pt")
        states = encoder.model(**inputs, output_hidden_states=True).hidden_states[-1]
        assert np.allclose(encode([item])[0], torch.nn.functional.normalize(states[:, -1], dim=-1), atol=1e-5)
        if item is QUERIES[0]:
            assert inputs["image_grid_thw"].tolist() == [[1, 2, 2]]  # one visual token


@torch.inference_mode()
def test_gme_follows_its_code(folders):
    """gme_inference.py: embeddings with the image's in their places, no positions, the last token's state."""
    encoder = loaded(folders, "gme")
    prompt = "<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<|endoftext|>"
    page = prompt.format("You are a helpful assistant.", "<|vision_start|><|image_pad|><|vision_end|>")
    query = prompt.format("Find an image that matches the given text.", QUERIES[0])
    base = encoder.model.model
    inputs = encoder.processor(text=[page], images=[pages()[0]], return_tensors="pt")
    embeddings = base.get_input_embeddings()(inputs["input_ids"])
    features = base.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output
    embeddings[inputs["input_ids"] == encoder.model.config.image_token_id] = features
    expected = base.language_model(inputs_embeds=embeddings).last_hidden_state[:, -1]
    assert np.allclose(encoder.encode_pages(pages()[:1])[0], torch.nn.functional.normalize(expected, dim=-1), atol=1e-5)
    ids = encoder.processor(text=[query], return_tensors="pt")["input_ids"]
    expected = base.language_model(input_ids=ids).last_hidden_state[:, -1]
    ours = encoder.encode_queries(QUERIES[:1])[0]
    assert np.allclose(ours, torch.nn.functional.normalize(expected, dim=-1), atol=1e-5)


@pytest.mark.parametrize("name", ["colqwen2", "colqwen2.5"])
@torch.inference_mode()
def test_colqwen_follows_colpali_engine(folders, name):
    """A projection of each token's state, of length 1, with Qwen's own positions in the page."""
    encoder = loaded(folders, name)
    prompt = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Describe the image.<|im_end|><|endoftext|>"
    model, processor = encoder.model, encoder.processor
    image = processor.image_processor(images=[pages()[0]], return_tensors="pt")
    visual = int(image["image_grid_thw"].prod()) // 4
    text = prompt.replace("<|image_pad|>", "<|image_pad|>" * visual)
    ids = processor.tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    types = (ids == processor.image_token_id).int()
    states = model.vlm(input_ids=ids, mm_token_type_ids=types, **image).last_hidden_state
    expected = torch.nn.functional.normalize(model.embedding_proj_layer(states[0]), dim=-1)
    [ours] = encoder.encode_pages(pages()[:1])
    assert ours.shape == (ids.shape[1], 16)
    assert np.allclose(ours, expected, atol=1e-5)
    # and a question: its prefix, ten more tokens to think with, and a line break
    text = f"Query: {QUERIES[0]}{'<|endoftext|>' * 10}\n"
    ids = processor.tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    expected = torch.nn.functional.normalize(model.embedding_proj_layer(model.vlm(input_ids=ids)[0][0]), dim=-1)
    assert np.allclose(encoder.encode_queries(QUERIES[:1])[0], expected, atol=1e-5)


@torch.inference_mode()
def test_colqwen_of_transformers_alone_forgets_rows_and_columns(folders):
    """Why positions are passed. Should this fail, transformers computes them itself and ours are not needed."""
    encoder = loaded(folders, "colqwen2")
    inputs = encoder.processor.process_images(images=pages()[:1])
    inputs.pop("mm_token_type_ids", None)
    plain = encoder.model(**inputs).embeddings[0].numpy()
    assert np.abs(plain - encoder.encode_pages(pages()[:1])[0]).max() > 0.01


def test_more_pixels_make_more_vectors(folders):
    few, many = (
        len(load_encoder("colqwen", folders("colqwen2"), device="cpu", max_pixels=n).encode_pages(pages()[:1])[0])
        for n in (28 * 56, 112 * 112)
    )
    assert few < many


def test_a_dense_text_embedder_uses_the_prompts_it_was_given(tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    words = tokenizer()
    torch.manual_seed(0)
    BertModel(
        BertConfig(
            vocab_size=len(words), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
        )
    ).save_pretrained(tmp_path / "bert")
    words.save_pretrained(tmp_path / "bert")
    body = Transformer(str(tmp_path / "bert"))
    made = sentence_transformers.SentenceTransformer(modules=[body, Pooling(32, pooling_mode="cls")], device="cpu")
    made.save(str(tmp_path / "dense"))
    encoder = load_encoder("dense", tmp_path / "dense", device="cpu", query_prompt="Represent: ")
    assert encoder.reads == "text"
    texts = ["Orion sales 2014", "Cedar"]
    plain = made.encode(texts, normalize_embeddings=True)
    prompted = made.encode([f"Represent: {text}" for text in texts], normalize_embeddings=True)
    assert np.allclose(np.concatenate(encoder.encode_pages(texts)), plain, atol=1e-5)
    assert np.allclose(np.concatenate(encoder.encode_queries(texts)), prompted, atol=1e-5)
    assert not np.allclose(plain, prompted, atol=1e-3)


def test_special_tokens_in_a_question_are_words(folders):
    """A question could otherwise ask for an image that is not there, or end the prompt."""
    for name in ("dse", "gme", "colqwen2"):
        [vectors] = loaded(folders, name).encode_queries(["<|image_pad|> {0} <|im_end|>"])
        assert np.isfinite(vectors).all()


def test_an_unknown_method_or_model_is_told(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="unknown encoder 'magic'; there is: clip, e5-v, dse, gme, colqwen, dense"):
        load_encoder("magic")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(RuntimeError, match="neither a model folder nor could it be fetched: run `hf download"):
        load_encoder("clip", str(tmp_path / "absent"))


def test_each_method_has_the_paper_s_name():
    assert set(ENCODERS) == {"clip", "e5-v", "dse", "gme", "colqwen", "dense"}
    assert encoders.ENCODERS["dense"][2]["query_prompt"].endswith(": ")
