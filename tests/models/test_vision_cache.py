"""The page cache changes nothing but the work: same answers, pages encoded once, memory bounded."""

import io

import pytest
import torch
from helpers.architectures import save
from PIL import Image

import mmr5_lab.reranking.pages as pages_module
from mmr5_lab.models import vision_cache
from mmr5_lab.models.vision_cache import PageCache
from mmr5_lab.reranking.inputs import model_inputs, prompts_of
from mmr5_lab.reranking.local import Reranker
from mmr5_lab.reranking.pages import Pages


def page(shade: int, size=(140, 168)) -> Image.Image:
    image = Image.new("RGB", size, (shade, 90, 200))
    image.paste((255 - shade, 10, 10), (shade % 100, 20, 139, 60))
    return image


def encoded_page(shade: int) -> bytes:
    buffer = io.BytesIO()
    page(shade).save(buffer, "PNG")
    return buffer.getvalue()


PAGES = [page(20), page(90), page(200, (112, 140)), page(250)]
PAIRS = [("Which page?", PAGES[:3]), ("What was the staff?", [PAGES[1], PAGES[0]]), ("Where?", [PAGES[2], PAGES[3]])]


@pytest.mark.parametrize("by_file", [False, True])
@pytest.mark.parametrize("mode", ["reason", "direct", "score"])
def test_cached_pages_give_the_same_rankings(architecture, mode, by_file):
    plain = architecture.rank_many(PAIRS, mode, batch_size=2)
    cache = PageCache(architecture.model)
    reranker = Reranker(
        architecture.model, architecture.processor, max_new_tokens=12, page_cache=cache if by_file else None
    )
    try:
        first = reranker.rank_many(PAIRS, mode, batch_size=2)
        seen = cache.misses
        again = reranker.rank_many(PAIRS, mode, batch_size=2)
    finally:
        del cache._module.get_image_features
    assert cache.misses == seen, "the second time nothing is encoded"
    assert cache.hits > 0
    for cached in (first, again):
        assert [r.text for r in cached] == [r.text for r in plain]
        assert [r.order for r in cached] == [r.order for r in plain]
        if mode == "score":
            assert torch.allclose(
                torch.tensor([r.scores for r in cached[1:]]), torch.tensor([r.scores for r in plain[1:]]), atol=1e-4
            )


def test_what_the_model_is_given_is_what_the_processor_makes(architecture):
    """Prompts of several lengths, pages of several sizes and one twice: ids, masks, grids and features."""
    known = Pages(PAIRS)
    model, processor = architecture.model, architecture.processor
    prompts = prompts_of(PAIRS, known, "reason", model, processor, 12)
    plain = model_inputs(prompts, known, model, processor, None)
    cache = PageCache(architecture.model)
    try:
        inputs = model_inputs(prompts, known, model, processor, cache)
    finally:
        del cache._module.get_image_features
    features = inputs.pop("mm_encoder_outputs")["image"]
    with torch.no_grad():
        grid = {"image_grid_thw": plain["image_grid_thw"]} if "image_grid_thw" in plain else {}
        expected = architecture.model.model.get_image_features(plain.pop("pixel_values"), **grid, return_dict=True)
    assert inputs.keys() == plain.keys()
    for name, values in plain.items():
        assert torch.equal(inputs[name], values), name
    for name in ("pooler_output", "deepstack_features"):
        for mine, theirs in zip(getattr(features, name, ()), getattr(expected, name, ()), strict=True):
            together = [
                torch.cat(list(given)) if isinstance(given, tuple | list) else given for given in (mine, theirs)
            ]
            assert torch.allclose(*together, atol=1e-5), name


def _one(features) -> torch.Tensor:
    return features if isinstance(features, torch.Tensor) else torch.cat(list(features))


def test_pages_cut_into_crops_are_kept_whole(tmp_path):
    """Gemma 3 may show a page in several crops, each with tokens of its own."""
    reranker = Reranker.from_pretrained(save("gemma3", tmp_path), max_new_tokens=4, page_cache_bytes=0)
    images = reranker.processor.image_processor
    images.do_pan_and_scan, images.pan_and_scan_min_crop_size = True, 28
    images.pan_and_scan_max_num_crops, images.pan_and_scan_min_ratio_to_activate = 4, 1.2
    pairs = [("Which page?", [page(20, (280, 90)), page(90)]), ("Where?", [page(30, (90, 400)), page(20, (280, 90))])]
    plain = reranker.rank_many(pairs, "score", 2)
    reranker.page_cache = PageCache(reranker.model)
    for _ in range(2):
        for mine, theirs in zip(reranker.rank_many(pairs, "score", 2), plain, strict=True):
            assert mine.scores == pytest.approx(theirs.scores, abs=1e-4)
    assert (reranker.page_cache.misses, reranker.page_cache.hits) == (3, 5)


def test_a_page_is_known_by_its_file_and_not_processed_again(tiny_model, tmp_path, monkeypatch):
    page(7).save(tmp_path / "a.png")
    page(7).save(tmp_path / "b.png")  # the same bytes
    page(9).save(tmp_path / "c.png")
    data = (tmp_path / "a.png").read_bytes()
    reranker = Reranker.from_pretrained(tiny_model, max_new_tokens=2)
    seen = []
    processed = reranker.processor._process_images
    monkeypatch.setattr(
        reranker.processor,
        "_process_images",
        lambda images, **options: seen.append(len(images)) or processed(images, **options),
    )
    reranker.rank("q", [tmp_path / "a.png", tmp_path / "b.png", data, tmp_path / "c.png"], "score")
    assert (seen, reranker.page_cache.misses, reranker.page_cache.hits) == ([2], 2, 2)
    monkeypatch.setattr(pages_module, "open_page", lambda *given: pytest.fail("decoded again"))
    reranker.rank("r", [data, tmp_path / "c.png"])
    assert seen == [2]
    monkeypatch.undo()
    (tmp_path / "c.png").write_bytes(encoded_page(11))  # another page in the same place
    reranker.rank("q", [tmp_path / "c.png"], "score")
    assert reranker.page_cache.misses == 3
    reranker.processor.image_processor.size = {"shortest_edge": 784, "longest_edge": 7840}
    reranker.rank("q", [tmp_path / "c.png"], "score")
    assert reranker.page_cache.misses == 4, "scaled otherwise, it is another page"


@pytest.fixture
def small(tiny_model):
    reranker = Reranker.from_pretrained(tiny_model, max_new_tokens=4, page_cache_bytes=0)
    yield reranker
    vars(reranker.model.model).pop("get_image_features", None)


def test_pages_are_counted_and_forgotten_oldest_first(small):
    one = 30 * 64 * 4  # bytes: 10 × 12 patches in groups of four, 64 numbers of 4 bytes
    cache = PageCache(small.model, max_bytes=2 * one)
    for shade in (1, 2, 3):
        small.rank("q", [page(shade)], "score")
    assert (cache.misses, cache.hits, cache.bytes) == (3, 0, 2 * one)
    small.rank("q", [page(3)], "score")
    assert (cache.misses, cache.hits) == (3, 1)
    small.rank("q", [page(1)], "score")
    assert (cache.misses, cache.hits) == (4, 1), "the first page was forgotten"


def test_pages_are_encoded_in_groups_of_bounded_size(small, monkeypatch):
    monkeypatch.setattr(vision_cache, "PIXELS_AT_ONCE", 3 * 140 * 168)
    cache = PageCache(small.model)
    reranker = Reranker(small.model, small.processor, page_cache=cache)
    pairs = [("q", [page(shade) for shade in range(1, 8)]), ("r", [page(7), page(8)])]
    passes = []
    tower = cache._tower
    monkeypatch.setattr(
        cache,
        "_tower",
        lambda *args, **options: passes.append(len(options["image_grid_thw"])) or tower(*args, **options),
    )
    by_file = reranker.rank_many(pairs, "score", 2)
    assert passes == [3, 3, 2], "eight pages"
    cache.clear()
    by_pixels = small.rank_many(pairs, "score", 2)
    assert passes == [3, 3, 2] * 2
    del cache._module.get_image_features
    for alone in (by_file, by_pixels):
        for ours, plain in zip(alone, small.rank_many(pairs, "score", 2), strict=True):
            assert ours.scores == pytest.approx(plain.scores, abs=1e-4)


def test_pages_encoded_before_a_failure_are_kept(small, monkeypatch):
    monkeypatch.setattr(vision_cache, "PIXELS_AT_ONCE", 1)
    cache = PageCache(small.model)

    def encode(places):
        if places == [1]:
            raise MemoryError("no room")
        return [{"pooler_output": torch.ones(1)} for _ in places]

    with pytest.raises(MemoryError, match="no room"):
        cache._lookup([b"a", b"b"], [5, 5], encode)
    cache._lookup([b"a"], [5], lambda places: pytest.fail("encoded twice"))
    [found] = cache._lookup([b"b"], [5], lambda places: [{"pooler_output": torch.zeros(1)}])
    assert found["pooler_output"] == 0


def test_a_page_larger_than_the_bound_is_used_and_not_kept(small):
    cache = PageCache(small.model, max_bytes=100)
    assert small.rank("q", [page(1), page(2)], "score").order in ([0, 1], [1, 0])
    assert cache.bytes == 0


def test_a_tower_in_training_is_refused(small):
    PageCache(small.model)
    images = small.processor.image_processor(images=[page(1)], return_tensors="pt")
    with pytest.raises(ValueError, match="vision tower is being trained"):
        small.model.model.get_image_features(**images)
