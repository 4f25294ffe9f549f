"""The page cache changes nothing but the work: same answers, pages encoded once, memory bounded."""

import pytest
import torch
from architectures import BUILD, save
from PIL import Image

from mmr5_lab.page_cache import PageCache
from mmr5_lab.rerank import Reranker


@pytest.fixture(scope="module", params=BUILD)
def reranker(request, tmp_path_factory):
    return Reranker.from_pretrained(
        save(request.param, tmp_path_factory.mktemp(request.param)), max_new_tokens=8, page_cache_bytes=0
    )


def page(shade: int, size=(140, 168)) -> Image.Image:
    image = Image.new("RGB", size, (shade, 90, 200))
    image.paste((255 - shade, 10, 10), (shade % 100, 20, 139, 60))
    return image


PAGES = [page(20), page(90), page(200, (112, 140)), page(250)]
PAIRS = [("Which page?", PAGES[:3]), ("What was the staff?", [PAGES[1], PAGES[0]]), ("Where?", [PAGES[2], PAGES[3]])]


@pytest.mark.parametrize("mode", ["reason", "score"])
def test_cached_pages_give_the_same_rankings(reranker, mode):
    plain = reranker.rank_many(PAIRS, mode, batch_size=2)
    cache = PageCache(reranker.model)
    try:
        first = reranker.rank_many(PAIRS, mode, batch_size=2)
        seen = cache.misses
        again = reranker.rank_many(PAIRS, mode, batch_size=2)
    finally:
        cache.remove()
    assert cache.misses == seen, "the second time nothing is encoded"
    assert cache.hits > 0
    for cached in (first, again):
        assert [r.text for r in cached] == [r.text for r in plain]
        assert [r.order for r in cached] == [r.order for r in plain]
        if mode == "score":
            assert torch.allclose(
                torch.tensor([r.scores for r in cached[1:]]), torch.tensor([r.scores for r in plain[1:]]), atol=1e-4
            )


def test_removed_the_model_encodes_for_itself(reranker):
    cache = PageCache(reranker.model)
    with pytest.raises(ValueError, match="has a page cache already"):
        PageCache(reranker.model)
    cache.remove()
    reranker.rank_many(PAIRS, "score")
    assert (cache.hits, cache.misses, cache.bytes) == (0, 0, 0)


@pytest.fixture
def small(tiny_model):
    reranker = Reranker.from_pretrained(tiny_model, max_new_tokens=4, page_cache_bytes=0)
    yield reranker
    cache = getattr(reranker.model.model.get_image_features, "page_cache", None)
    if cache:
        cache.remove()


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
    assert cache.hit_rate == 0.2


def test_a_page_larger_than_the_bound_is_used_and_not_kept(small):
    cache = PageCache(small.model, max_bytes=100)
    assert small.rank("q", [page(1), page(2)], "score").order in ([0, 1], [1, 0])
    assert cache.bytes == 0


def test_a_tower_in_training_is_refused(small):
    PageCache(small.model)
    images = small.processor.image_processor(images=[page(1)], return_tensors="pt")
    with pytest.raises(ValueError, match="vision tower is being trained"):
        small.model.model.get_image_features(**images)


def test_a_model_without_images_is_refused():
    with pytest.raises(TypeError, match="Linear has no get_image_features"):
        PageCache(torch.nn.Linear(2, 2))
