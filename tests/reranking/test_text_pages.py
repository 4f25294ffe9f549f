"""Pages that are shown by their text, alone or with their images: here, on a server, and in whole runs."""

import pytest
from helpers.servers import Server, pages

from mmr5_lab.corpus.rankings import Rankings
from mmr5_lab.mini.documents import make_corpus
from mmr5_lab.prompting.prompts import build_messages
from mmr5_lab.reranking.local import Reranker
from mmr5_lab.reranking.pages import TextPage
from mmr5_lab.reranking.remote import RemoteReranker
from mmr5_lab.reranking.whole_runs import LONGEST_TEXT, rerank_run

QUERY = "What was the revenue?"


def parts(messages) -> list[str]:
    return [part.get("text", "<picture>").strip() for part in messages[1]["content"]][1:]


def test_a_text_stands_under_the_name_of_its_image_and_special_tokens_lose_their_meaning():
    shown = [("Revenue <|im_end|> rose.", False), ("Costs.", True), ("", True), (" ", False)]
    assert parts(build_messages(QUERY, 4, shown)) == [
        "Image 1:", "Revenue < |im_end|> rose.", "Image 2:", "<picture>", "Costs.", "Image 3:", "<picture>",
        "Image 4:", "",
    ]  # fmt: skip
    assert build_messages(QUERY, 2, [("", True)] * 2) == build_messages(QUERY, 2)
    assert parts(build_messages(QUERY, 1, [("", False)])) == ["Image 1:", "(a page without text)"]


@pytest.mark.parametrize("cache", [0, 1 << 28])
def test_texts_images_and_both_rank_alike_alone_and_in_a_batch(tiny_model, cache):
    """One batch holds a prompt of texts, one of images and texts, one of images, one of a text and an image."""
    images = pages(3)
    texts = [TextPage(f"Revenue of {year}.") for year in (2015, 2016, 2017)]
    both = [TextPage(text.text, image) for text, image in zip(texts, images, strict=True)]
    pairs = [(QUERY, texts), (QUERY, both), (QUERY, images), (QUERY, [texts[0], images[1]])]
    reranker = Reranker.from_pretrained(tiny_model, page_cache_bytes=cache)
    together = reranker.rank_many(pairs, mode="score")
    for (query, shown), ranking in zip(pairs, together, strict=True):
        assert ranking.scores == pytest.approx(reranker.rank(query, shown, mode="score").scores, abs=1e-4)
    assert len({tuple(ranking.scores[:2]) for ranking in together}) == 4  # what is shown makes a difference


def test_modes_that_need_images_say_so(tiny_model):
    with pytest.raises(ValueError, match="'pointwise' was made for page images"):
        Reranker.from_pretrained(tiny_model).rank(QUERY, [TextPage("a"), TextPage("b")], mode="pointwise")
    with pytest.raises(ValueError, match="calibration shows the model blank page images"):
        Reranker.from_pretrained(tiny_model, calibrate=True).rank(QUERY, [TextPage("a"), TextPage("b")], mode="score")


def test_a_server_is_sent_texts_and_images_in_their_places():
    with Server({}) as server:
        remote = RemoteReranker(server.url, "m")
        assert remote.rank(QUERY, [TextPage("Revenue."), TextPage("Costs.", pages(1)[0])]).order == [1, 0]
        [body] = server.bodies
    kinds = [part.get("text", part["type"]).strip() for part in body["messages"][1]["content"]][1:]
    assert kinds == ["Image 1:", "Revenue.", "Image 2:", "image_url", "Costs."]


def test_a_run_over_another_channel_is_another_run(tmp_path):
    corpus = make_corpus(tmp_path / "corpus", 3, {"dev": (1, 5)})
    question = corpus.questions.iloc[0]
    run = Rankings({question["question_id"]: [0, 1]})
    with Server({}) as server:
        remote = RemoteReranker(server.url, "m")
        rerank_run(remote, corpus, run, tmp_path, "text", channel="text")
        with pytest.raises(ValueError, match="channel"):
            rerank_run(remote, corpus, run, tmp_path, "text", channel="both")
        with pytest.raises(ValueError, match="unknown channel 'sound': choose one of image, text, both"):
            rerank_run(remote, corpus, run, tmp_path, "sound", channel="sound")
        [body] = server.bodies
    texts = [part["text"] for part in body["messages"][1]["content"] if part["type"] == "text"]
    shown = corpus.page_text(question["doc_name"], 0)[:LONGEST_TEXT]
    assert shown in texts
    assert not [part for part in body["messages"][1]["content"] if part["type"] == "image_url"]
