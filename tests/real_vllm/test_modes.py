"""The miniature's base through a real vLLM on the CPU gives what it gives here. `make test-vllm` sets vLLM up."""

import os
from pathlib import Path

import pytest
from helpers.servers import started

from mmr5_lab import RemoteReranker, load_corpus, retrieve
from mmr5_lab.cli import main
from mmr5_lab.reranking.local import Reranker
from mmr5_lab.reranking.ranking import RemoteError
from mmr5_lab.reranking.whole_runs import pair_of

if "MMR5_VLLM" not in os.environ:
    pytest.skip("vLLM is tested by `make test-vllm`", allow_module_level=True)

MINI = Path(__file__).parents[2] / "data" / "mini"
QUESTIONS = 120
VLLM = ["-m", "vllm.entrypoints.openai.api_server", "--model", MINI / "base", "--served-model-name", "mini", "--dtype",
        "float32", "--max-model-len", "2048", "--limit-mm-per-prompt", '{"image": 20, "video": 0}', "--enforce-eager",
        "--host", "127.0.0.1"]  # fmt: skip
QUIET = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    python = Path(os.environ["MMR5_VLLM"]).absolute() / "bin" / "python"
    with started([python, *VLLM], tmp_path_factory.mktemp("vllm") / "log", seconds=600, **QUIET) as address:
        yield address


@pytest.fixture(scope="module")
def local():
    return Reranker.from_pretrained(MINI / "base", max_new_tokens=400)


@pytest.fixture(scope="module")
def corpus():
    return load_corpus(MINI / "corpus")


def asked(corpus, count: int, candidates: int) -> list:
    """Questions spread over the corpus, each with the first pages that BM25 finds."""
    pages = retrieve(corpus, top_k=candidates).pages
    chosen = list(pages)[:: len(pages) // count][:count]
    return [pair_of(corpus, corpus.by_id[question], pages[question]) for question in chosen]


def test_every_reasoned_text_is_the_local_one(url, local, corpus):
    pairs = asked(corpus, QUESTIONS, 5)
    served = RemoteReranker(url, "mini", max_new_tokens=400).rank_many(pairs)
    expected = local.rank_many(pairs)
    assert [(r.text, r.order, r.faults, r.tokens) for r in served] == [
        (r.text, r.order, r.faults, r.tokens) for r in expected
    ]
    assert sum(bool(r.reasoning) for r in served) > 100


@pytest.mark.parametrize("mode", ["direct", "score", "calibrated", "pointwise"])
@pytest.mark.parametrize(("count", "candidates"), [(QUESTIONS, 5), (12, 12)])
def test_each_mode_gives_the_local_orders_and_scores(url, local, corpus, mode, count, candidates):
    """With 12 candidates, ids begin alike and are several tokens."""
    calibrate, mode = mode == "calibrated", mode.replace("calibrated", "score")
    pairs = asked(corpus, count // 3 if mode == "pointwise" else count, candidates)
    served = RemoteReranker(url, "mini", calibrate=calibrate).rank_many(pairs, mode)
    expected = Reranker(local.model, local.processor, calibrate=calibrate).rank_many(pairs, mode)
    assert [(r.order, r.text, r.tokens) for r in served] == [(r.order, r.text, r.tokens) for r in expected]
    assert [r.scores for r in served] == [r.scores and pytest.approx(r.scores, abs=1e-3) for r in expected]


def test_parity_says_that_all_is_alike(url, capsys, monkeypatch):
    monkeypatch.chdir(MINI.parents[1])
    code = main(["parity", str(MINI / "base"), "--server", url, "--served-as", "mini", "--questions=6"])
    out = capsys.readouterr().out
    assert code == 0, out
    assert "prompts: 6 of 6 have as many tokens" in out
    assert "reason: 6 of 6 orders alike, 6 texts alike" in out


@pytest.mark.parametrize(("count", "said"), [(21, "At most 20 image"), (3, "maximum context length is 2048 tokens")])
def test_too_much_is_refused_with_what_to_lower(url, corpus, count, said):
    [(query, pages)] = asked(corpus, 1, 1)
    question = query if count > 20 else f"{query} " * 300
    advice = r"lower the pixels of a page \(max_pixels\), the pages shown at once \(candidates, window\) or .*"
    with pytest.raises(RemoteError, match=advice + said):
        RemoteReranker(url, "mini").rank(question, pages * count)
