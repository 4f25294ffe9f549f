"""`mmr5 serve`: a real process on a real port, asked as clients ask it."""

import base64
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest
from helpers.servers import Server, pages

from mmr5_lab.reranking.local import Reranker
from mmr5_lab.reranking.pages import TextPage
from mmr5_lab.reranking.ranking import Ranking, RemoteError, relevance
from mmr5_lab.reranking.remote import RemoteReranker

QUERY = "How high was the revenue of Vega?"


@contextmanager
def serving(model, *options: str, **variables: str):
    """The address of `mmr5 serve` and its process."""
    command = [sys.executable, "-m", "mmr5_lab.cli", "serve", "--model", str(model), "--port", "0", *options]
    environment = {**os.environ, **variables}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        try:
            lines = []
            for line in process.stderr:
                lines.append(line)
                if found := re.search(r"running on (http://[\d.:]+)", line):
                    yield found[1], process
                    return
            raise AssertionError("".join(lines))
        finally:
            process.kill()


def encoded(image, kind: str = "PNG") -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of pages, and a file beside it."""
    place = tmp_path_factory.mktemp("served")
    (place / "pages").mkdir()
    for i, page in enumerate(pages(4)):
        page.save(place / "pages" / f"{i}.png")
    (place / "secret.png").write_bytes((place / "pages" / "0.png").read_bytes())
    return place / "pages"


@pytest.fixture(scope="module")
def served(tiny_model, folder):
    with serving(tiny_model, "--mode", "score", "--images", str(folder), "--waiting", "40") as (address, _):
        yield address


def post(address: str, body, path: str = "/v1/rerank", **options):
    options = {"json": body} | options if not isinstance(body, bytes) else {"content": body} | options
    return httpx.post(f"{address}{path}", timeout=60, **options)


def message(response) -> str:
    return response.json()["error"]["message"]


def test_the_three_interfaces_rank_as_rank_does(served, tiny_model):
    """Jina's documents, vLLM's, and a data: URL; the scores are the softmax of the model's log-probabilities."""
    images = pages(3)
    local = Reranker.from_pretrained(tiny_model).rank(QUERY, images, mode="score")
    urls = [f"data:image/png;base64,{encoded(image)}" for image in images]
    forms = [
        [{"image": encoded(image)} for image in images],
        [{"content": [{"type": "image_url", "image_url": {"url": url}}]} for url in urls],
        urls,
    ]
    for path, documents in zip(("/v1/rerank", "/rerank", "/v2/rerank"), forms, strict=True):
        answer = post(served, {"query": QUERY, "documents": documents}, path).json()
        assert [result["index"] for result in answer["results"]] == local.order
        scores = relevance(local, "score")
        assert [result["relevance_score"] for result in answer["results"]] == pytest.approx(
            [scores[i] for i in local.order], abs=1e-5
        )
    assert sum(scores) == pytest.approx(1)


def test_texts_are_ranked_beside_images(served, tiny_model):
    images = pages(1)
    local = Reranker.from_pretrained(tiny_model).rank(
        QUERY, [TextPage("Revenue."), TextPage("Costs."), images[0]], mode="score"
    )
    documents = ["Revenue.", {"text": "Costs."}, {"image": encoded(images[0])}]
    answer = post(served, {"query": QUERY, "documents": documents}).json()
    assert [result["index"] for result in answer["results"]] == local.order


def test_our_client_asks_rerankers_that_have_this_interface(served, tiny_model):
    """Mode "rerank": order and scores are those of the model behind the server; texts, images and both are sent."""
    images = pages(2)
    shown = [*images, TextPage("Revenue."), TextPage("Costs.", images[0])]
    local = Reranker.from_pretrained(tiny_model).rank(QUERY, shown, mode="score")
    remote = RemoteReranker(f"{served}/v1", tiny_model.name, concurrency=2)
    [ranking] = remote.rank_many([(QUERY, shown)], mode="rerank")
    assert ranking.order == local.order
    assert ranking.scores == pytest.approx(relevance(local, "score"), abs=1e-5)
    assert (ranking.text, ranking.faults) == ("", frozenset())


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (
            b'{"results": [{"index": 0, "relevance_score": 1}]}',
            r"scores of documents \[0\] where 2 were sent",
        ),
        (b'{"results": [{"index": 0}, {"index": 1}]}', "no list of results with index"),
        (
            b'{"results": [{"index": 0, "relevance_score": 1}, {"index": 1, "relevance_score": NaN}]}',
            "unreadable.*scores",
        ),
        (b"<html>", "unreadable"),
    ],
)
def test_scores_that_are_missing_are_named_and_asked_for_again(answer, said):
    good = b'{"results": [{"index": 1, "relevance_score": 0.75}, {"index": 0, "relevance_score": 0.5}]}'
    with Server({"again": [answer, good], "never": [answer] * 3}) as server:
        remote = RemoteReranker(server.url, "m", retries=2, pause=0.01)
        [ranking] = remote.rank_many([("again", pages(2))], mode="rerank")
        assert (ranking.order, ranking.scores) == ([1, 0], [0.5, 0.75])
        with pytest.raises(RemoteError, match=said):
            remote.rank_many([("never", pages(2))], mode="rerank")


def test_the_best_pages_are_returned_with_their_documents(served):
    documents = [{"image": f"{i}.png"} for i in (2, 0, 1, 3)]
    whole = post(served, {"query": {"text": QUERY}, "documents": documents}).json()["results"]
    best = post(served, {"query": QUERY, "documents": documents, "top_n": 2, "return_documents": True}).json()[
        "results"
    ]
    assert [result["index"] for result in best] == [result["index"] for result in whole[:2]]
    assert [result["document"] for result in best] == [documents[result["index"]] for result in best]
    assert len(post(served, {"query": QUERY, "documents": documents, "top_n": 0}).json()["results"]) == 4


@pytest.mark.parametrize(
    ("change", "status", "said"),
    [
        ({"query": " "}, 400, "'query' must be a text"),
        ({"documents": []}, 400, "at least one page"),
        ({"documents": [{"image": "0.png"}] * 101}, 400, "101 documents are too many: send 100 at most"),
        ({"documents": [{"title": "words"}]}, 400, "documents[0] has neither an image nor a text"),
        ({"documents": [{"image": "0.png"}, {"image": "../secret.png"}]}, 403, "documents[1] is outside the folder"),
        ({"documents": [{"image": "/etc/passwd"}]}, 403, "documents[0] is outside the folder"),
        ({"documents": [{"image": "none.png"}]}, 400, "documents[0] is neither base64 nor a page"),
        ({"documents": [{"image": "bm8gaW1hZ2U="}]}, 400, "documents[0] is not a readable image"),
        ({"documents": [{"image": "http://127.0.0.1:1/x.png"}]}, 400, "this server fetches none"),
        ({"top_n": -1}, 400, "'top_n' is -1"),
        ({"model": "rerank-v3.5"}, 404, "there is no model 'rerank-v3.5' here"),
        ({"query": "x" * 400_000}, 400, "tokens"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(served, change, status, said):
    response = post(served, {"query": QUERY, "documents": [{"image": "0.png"}, {"image": "1.png"}], **change})
    assert (response.status_code, said in message(response)) == (status, True), message(response)


@pytest.mark.parametrize(("body", "said"), [(b"{", "is not JSON"), (b"[]", "not a JSON object"), (b"\xff", "not JSON")])
def test_a_body_that_is_no_request_is_refused(served, body, said):
    response = post(served, body)
    assert response.status_code == 400
    assert said in message(response)


def test_a_link_does_not_lead_out_of_the_folder(served, folder):
    (folder / "link.png").symlink_to(folder.parent / "secret.png")
    assert post(served, {"query": QUERY, "documents": [{"image": "link.png"}]}).status_code == 403


def test_many_clients_at_once_get_their_own_answers_beside_faults(served, tiny_model):
    """60 requests, 32 at once: every tenth has a broken page and every tenth hangs up."""
    images = pages(4)
    shown = [[images[(i + k) % 4] for k in range(2 + i % 3)] for i in range(60)]
    local = Reranker.from_pretrained(tiny_model).rank_many([(QUERY, each) for each in shown], mode="score")

    def ask(i: int):
        body = {"query": QUERY, "documents": [{"image": encoded(image)} for image in shown[i]]}
        if i % 10 == 3:
            body["documents"][0]["image"] = "AAAA"
        try:
            return httpx.post(f"{served}/v1/rerank", json=body, timeout=0.01 if i % 10 == 7 else 60)
        except httpx.TimeoutException:
            return None

    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(ask, range(60)))
    for i, answer in enumerate(answers):
        if i % 10 == 3:
            assert answer.status_code == 400
        elif i % 10 != 7:
            assert [result["index"] for result in answer.json()["results"]] == local[i].order
    assert httpx.get(f"{served}/health").json() == {
        "status": "ok", "model": tiny_model.name, "mode": "score", "waiting": 0
    }  # fmt: skip


def test_a_full_queue_and_a_slow_server_are_told_and_what_was_begun_is_finished(folder):
    """A chat server behind it that takes a second an answer; one request at work, one waiting, no room for a third."""
    with Server({}, delay=1.0) as chat:
        options = ["--server", chat.url, "--images", str(folder), "--waiting", "1", "--timeout", "5"]
        with serving("m", *options) as (address, process):
            body = {"query": QUERY, "documents": [{"image": "0.png"}, {"image": "1.png"}], "return_reasoning": True}
            with ThreadPoolExecutor(24) as pool:
                answers = list(pool.map(lambda _: post(address, body), range(24)))
            kinds = [answer.status_code for answer in answers]
            assert set(kinds) == {200, 429}
            assert next(a for a in answers if a.status_code == 429).headers["Retry-After"] == "1"
            answered = next(a for a in answers if a.status_code == 200).json()
            assert [result["index"] for result in answered["results"]] == [1, 0]
            assert [result["relevance_score"] for result in answered["results"]] == [1, 0.5]
            assert (answered["reasoning"], answered["faults"]) == ("Image 2 fits.", [])
            with ThreadPoolExecutor(1) as pool:
                last = pool.submit(post, address, body)
                time.sleep(0.3)
                process.send_signal(signal.SIGTERM)  # it ends after the request at work
                assert last.result().status_code == 200
                assert process.wait(20) in (0, -signal.SIGTERM)


def test_a_failing_server_behind_it_costs_only_its_request_and_a_hanging_one_its_time(folder):
    turns = {"fails": [400] * 9, "hangs": ["hang"] * 9}
    with Server(turns) as chat:
        options = ["--server", chat.url, "--images", str(folder), "--timeout", "2"]
        with serving("m", *options) as (address, _):
            answers = {}
            for query in ("fails", "hangs", "works"):
                body = {"query": query, "documents": [{"image": "0.png"}, {"image": "1.png"}]}
                answers[query] = post(address, body)
            assert {query: answer.status_code for query, answer in answers.items()} == {
                "fails": 502, "hangs": 504, "works": 200
            }  # fmt: skip
            assert "the model's server failed" in message(answers["fails"])
            assert "no answer within 2 seconds" in message(answers["hangs"])


def test_a_key_is_asked_for_and_never_written(tiny_model, folder):
    body = {"query": QUERY, "documents": [{"image": "0.png"}]}
    with serving(tiny_model, "--mode", "score", "--images", str(folder), MMR5_SERVE_KEY="s3cret") as (address, process):
        assert post(address, body).status_code == 401
        assert post(address, body, headers={"Authorization": "Bearer wrong"}).status_code == 401
        assert post(address, body, headers={"Authorization": "Bearer s3cret"}).status_code == 200
        assert httpx.get(f"{address}/health").status_code == 200
        process.terminate()
        assert "s3cret" not in process.stderr.read()


def test_scores_fall_along_the_ranking():
    written = Ranking([2, 0, 1], "…", "…", frozenset(), None, 5, 0.1)
    assert relevance(written, "reason") == [1 / 2, 1 / 3, 1]
    scored = Ranking([1, 0], None, "", frozenset(), [-2.0, -1.0], 1, 0.1)
    assert relevance(scored, "score") == pytest.approx([0.2689, 0.7311], abs=1e-4)
    assert json.dumps(relevance(scored, "score"))
    assert relevance(scored, "rerank") == [-2.0, -1.0], "as the reranking server gave them"
