"""Retrieval by vectors: encoding a corpus, ranking within documents."""

import io
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from helpers.retrievers import clip
from PIL import Image

from mmr5_lab.corpus.documents import load_corpus
from mmr5_lab.corpus.ids import CorpusError
from mmr5_lab.corpus.writing import write_corpus
from mmr5_lab.retrieval.dense import encode_corpus, rank_documents
from mmr5_lab.retrieval.encoders import load_encoder
from mmr5_lab.retrieval.page_vectors import VectorsError
from mmr5_lab.retrieval.retrieve import retrieve


class Greys:
    """A page of grey g stands at the angle g degrees, a question says which angle it wants."""

    reads = "image"

    def __init__(self, model: str = "greys"):
        self.about = {"method": "greys", "model": model}
        self.pages: list[int] = []

    @staticmethod
    def vector(degrees: float) -> np.ndarray:
        return np.array([[np.cos(np.radians(degrees)), np.sin(np.radians(degrees))]], dtype=np.float32)

    def encode_pages(self, pages) -> list[np.ndarray]:
        greys = [page.getpixel((0, 0))[0] for page in pages]
        self.pages += greys
        return [self.vector(grey) for grey in greys]

    def encode_queries(self, queries) -> list[np.ndarray]:
        return [self.vector(float(query)) for query in queries]


def picture(grey: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (60, 80), grey).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Pages of 10, 40, 70 and 20, 80 degrees; questions that want 65 and 25."""

    def asked(text, gold):
        return {"Q": text, "A": "", "page_id": gold, "type": "text-only", "layout_mapping": []}

    write_corpus(
        tmp_path / "corpus",
        [
            {"doc_name": "a.pdf", "domain": "Laws", "questions": [asked("65", [2])]},
            {"doc_name": "b.pdf", "domain": "News", "split": "rl", "questions": [asked("25", [0])]},
        ],
        [{"doc_name": "a.pdf", "image_binary": picture(grey), "ocr_text": f"grey {grey}"} for grey in (10, 40, 70)]
        + [{"doc_name": "b.pdf", "image_binary": picture(grey), "ocr_text": ""} for grey in (20, 80)],
    )
    return tmp_path / "corpus"


def test_who_comes_second_waits_and_encodes_nothing(folder):
    """Two sweeps that need the same vectors; the second one begins in the middle of the first."""
    corpus, first, second = load_corpus(folder), Greys(), Greys()
    begun, go_on = threading.Event(), threading.Event()
    encode = first.encode_pages

    def slowly(pages):
        begun.set()
        assert go_on.wait(30)
        return encode(pages)

    first.encode_pages = slowly
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(encode_corpus, corpus, first, batch_size=2)
        assert begun.wait(30)
        other = pool.submit(encode_corpus, load_corpus(folder), second, batch_size=2)
        with pytest.raises(TimeoutError):
            other.result(0.2)
        go_on.set()
        assert len(one.result(30)) == len(other.result(30)) == 5
    assert (sorted(first.pages), second.pages) == ([10, 20, 40, 70, 80], [])


def test_pages_are_ranked_within_their_document(folder):
    corpus, encoder = load_corpus(folder), Greys()
    run = rank_documents(corpus, encoder, encode_corpus(corpus, encoder), top_k=2)
    assert run.pages == {"a.pdf:q0": [2, 1], "b.pdf:q0": [0, 1]}
    # cosines of the angles between
    assert np.allclose(run.scores["a.pdf:q0"], np.cos(np.radians([5, 25])), atol=1e-3)


def test_encoding_goes_on_where_it_was_interrupted(folder):
    corpus = load_corpus(folder)

    class Interrupted(Greys):
        def encode_pages(self, pages):
            if len(self.pages) == 2:
                raise KeyboardInterrupt
            return super().encode_pages(pages)

    first = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        encode_corpus(corpus, first, batch_size=2)
    assert first.pages == [10, 40]
    second = Greys()
    assert len(encode_corpus(corpus, second, batch_size=2)) == 5
    assert second.pages == [70, 20, 80]
    third = Greys()
    encode_corpus(corpus, third)
    assert third.pages == []


def test_a_view_encodes_its_own_pages_and_shares_them(folder):
    corpus = load_corpus(folder)
    part, whole = Greys(), Greys()
    encode_corpus(corpus.split("rl"), part)
    encode_corpus(corpus, whole)
    assert (part.pages, whole.pages) == ([20, 80], [10, 40, 70])
    run = rank_documents(corpus, whole, encode_corpus(corpus, whole))
    assert run.pages == {"a.pdf:q0": [2, 1, 0], "b.pdf:q0": [0, 1]}


def test_vectors_of_other_pages_or_models_are_not_taken(folder, tmp_path):
    corpus = load_corpus(folder)
    encode_corpus(corpus, Greys(), tmp_path / "vectors")
    with pytest.raises(VectorsError, match="model 'greys', now 'other'"):
        encode_corpus(corpus, Greys("other"), tmp_path / "vectors")
    pages = [{"doc_name": name, "image_binary": picture(0)} for name in ("a.pdf",) * 3 + ("b.pdf",) * 2]
    write_corpus(folder, [{"doc_name": n, "domain": "x", "questions": []} for n in ("a.pdf", "b.pdf")], pages)
    with pytest.raises(VectorsError, match="pages"):
        encode_corpus(load_corpus(folder), Greys(), tmp_path / "vectors")
    encode_corpus(load_corpus(folder), Greys())  # a folder of its own


def test_a_corpus_without_pages_is_told(folder):
    (folder / "MMDocIR_pages.parquet").unlink()
    with pytest.raises(CorpusError, match="has no page file"):
        encode_corpus(load_corpus(folder), Greys())


def test_a_real_model_ranks_the_pages_that_it_compares_best(folder, tmp_path):
    """CLIP of random weights, from its folder to a run, against its own similarities."""
    clip(tmp_path / "clip")
    corpus = load_corpus(folder)
    run = retrieve(corpus, "clip", model=tmp_path / "clip", device="cpu")
    encoder = load_encoder("clip", tmp_path / "clip", device="cpu")
    pages = np.concatenate(encoder.encode_pages([corpus.page_image("a.pdf", page) for page in range(3)]))
    similar = pages @ encoder.encode_queries(["65"])[0][0]
    assert run.pages["a.pdf:q0"] == np.argsort(-similar).tolist()
    assert np.allclose(run.scores["a.pdf:q0"], np.sort(similar)[::-1], atol=1e-3)
    [vectors] = (folder / "vectors").iterdir()
    assert vectors.name.startswith("clip_")
