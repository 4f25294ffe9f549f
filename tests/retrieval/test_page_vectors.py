"""Page vectors on disk and MaxSim."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmr5_lab.retrieval import page_vectors
from mmr5_lab.retrieval.page_vectors import PageVectors, VectorsError

ABOUT = {"model": "toy"}


def unit(generator: np.random.Generator, *shape: int) -> np.ndarray:
    array = generator.standard_normal(shape).astype(np.float32)
    return array / np.linalg.norm(array, axis=-1, keepdims=True)


def plain(query: np.ndarray, page: np.ndarray) -> float:
    """MaxSim as it is defined."""
    return float(np.einsum("qd,pd->qp", query, page.astype(np.float32)).max(1).sum())


def test_maxsim_by_hand(tmp_path):
    store = PageVectors(tmp_path, ABOUT)
    store.append([7, 3], [np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([[0.5, 0.5]])])
    # (3, 4): 3 with the first axis, 4 with the second; each query vector takes the best
    queries = [np.array([[3.0, 4.0]]), np.array([[3.0, 4.0], [1.0, 0.0]])]
    assert store.maxsim(queries).tolist() == [[4.0, 3.5], [5.0, 4.0]]
    assert store.maxsim(queries, [3, 7]).tolist() == [[3.5, 4.0], [4.0, 5.0]]
    assert store.maxsim([], [3]).shape == (0, 1)
    assert store.maxsim(queries, []).shape == (2, 0)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_blocks_give_what_the_definition_gives(tmp_path_factory, data):
    """Blocks of 8 vectors and passes of 5 query vectors cut pages and queries in every way."""
    generator = np.random.default_rng(data.draw(st.integers(0, 1000)))
    counts = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=9))
    queries = [unit(generator, n, 4) for n in data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))]
    pages = [unit(generator, n, 4).astype(np.float16) for n in counts]
    store = PageVectors(tmp_path_factory.mktemp("vectors"), ABOUT)
    store.append(range(len(pages)), pages)
    rows = data.draw(st.lists(st.sampled_from(range(len(pages))), unique=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page_vectors, "_BLOCK", 8)
        patch.setattr(page_vectors, "_QUERY_VECTORS", 5)
        scores = store.maxsim(queries, rows)
    assert np.allclose(scores, [[plain(q, pages[row]) for row in rows] for q in queries], atol=1e-5)


def test_pages_are_kept_and_mapped_from_disk(tmp_path):
    generator = np.random.default_rng(0)
    pages = [unit(generator, 3, 8), unit(generator, 1, 8), unit(generator, 5, 8)]
    PageVectors(tmp_path, ABOUT).append([0, 1], pages[:2])
    store = PageVectors(tmp_path, ABOUT)
    assert store.missing([0, 1, 2]) == [2]
    store.append([2], pages[2:])
    store = PageVectors(tmp_path, ABOUT)
    assert (len(store), store.dimensions, store.starts.tolist()) == (3, 8, [0, 3, 4, 9])
    assert isinstance(store.page(2), np.memmap)
    for row, page in enumerate(pages):
        assert np.array_equal(store.page(row), page.astype(np.float16))


@pytest.mark.parametrize("there", [(), ("vectors.f16",)])
def test_what_ended_before_its_first_page_is_begun_anew(tmp_path, there):
    """`about.json` is written first, then the vectors."""
    PageVectors(tmp_path, {"model": "m"}).append([3], [np.ones((2, 4))])
    for file in {"vectors.f16", "pages.i32"} - set(there):
        (tmp_path / file).unlink()
    store = PageVectors(tmp_path, {"model": "m"})
    assert store.missing([3]) == [3]
    store.append([3], [np.ones((2, 4))])
    assert PageVectors(tmp_path, {"model": "m"}).missing([3]) == []


@pytest.mark.parametrize("cut", ["vectors.f16", "pages.i32"])
@pytest.mark.parametrize("lost", [1, 9, 17])
def test_what_an_interruption_cut_off_is_made_again(tmp_path, cut, lost):
    """Three pages of one 8-byte vector each; the last 1, 9 or 17 bytes of either file are lost."""
    pages = [np.full((1, 4), n, dtype=np.float16) for n in range(3)]
    PageVectors(tmp_path, ABOUT).append([0, 1, 2], pages)
    data = (tmp_path / cut).read_bytes()
    (tmp_path / cut).write_bytes(data[:-lost])
    store = PageVectors(tmp_path, ABOUT)
    left = store.missing([0, 1, 2])
    assert left == [2, 1, 0][: (lost + 7) // 8][::-1]
    store.append(left, [pages[row] for row in left])
    store = PageVectors(tmp_path, ABOUT)
    assert [store.page(row).tolist() for row in range(3)] == [page.tolist() for page in pages]


def test_vectors_of_something_else_are_refused(tmp_path):
    PageVectors(tmp_path, ABOUT).append([0], [np.ones((1, 4))])
    with pytest.raises(VectorsError, match="has other vectors \\(model 'toy', now 'other'\\)"):
        PageVectors(tmp_path, {"model": "other"})
    assert json.loads((tmp_path / "about.json").read_text()) == {"model": "toy", "dimensions": 4}


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.ones((1, 3)), r"shape \(1, 3\) do not go with 4 dimensions"),
        (np.ones(4), r"shape \(4,\)"),
        (np.ones((0, 4)), r"shape \(0, 4\)"),
        (np.full((1, 4), np.nan), "row 5: a vector is not finite"),
    ],
)
def test_vectors_that_do_not_fit_are_refused_and_nothing_is_written(tmp_path, array, message):
    store = PageVectors(tmp_path, ABOUT)
    store.append([0], [np.ones((1, 4))])
    with pytest.raises(VectorsError, match=message):
        store.append([5], [array])
    assert len(PageVectors(tmp_path, ABOUT)) == 1


def test_unknown_pages_and_other_dimensions_are_named(tmp_path):
    store = PageVectors(tmp_path, ABOUT)
    store.append([0], [np.ones((1, 4))])
    with pytest.raises(VectorsError, match="no vectors of 2 pages, the first is row 8"):
        store.maxsim([np.ones((1, 4))], [0, 8, 9])
    with pytest.raises(VectorsError, match="no vectors of row 8"):
        store.page(8)
    with pytest.raises(VectorsError, match=r"query of shape \(1, 3\) does not go with 4 dimensions"):
        store.maxsim([np.ones((1, 3))])


def test_torch_keeps_its_threads(tmp_path):
    store = PageVectors(tmp_path, ABOUT)
    store.append([0], [np.ones((1, 4))])
    before = torch.get_num_threads()
    store.maxsim([np.ones((1, 4))])
    assert torch.get_num_threads() == before
