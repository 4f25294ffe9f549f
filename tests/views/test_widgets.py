"""What the browsing widgets hold: rows, filters and rendered details. `tests/ui` clicks through them."""

import base64
import gc
import io
import json
import re
import subprocess
import sys

import ipywidgets
import numpy as np
import pandas as pd
import pytest
import traitlets
from PIL import Image

from mmr5_lab.corpus.documents import load_corpus
from mmr5_lab.corpus.writing import write_corpus
from mmr5_lab.evaluation.robustness import order_audit
from mmr5_lab.html import visible
from mmr5_lab.mini.documents import make_corpus
from mmr5_lab.mini.teacher import evidence_teacher
from mmr5_lab.prompting.answers import parse_ranking
from mmr5_lab.prompting.prompts import build_messages
from mmr5_lab.reranking.ranking import Ranker, Ranking
from mmr5_lab.reranking.whole_runs import rerank_run
from mmr5_lab.retrieval.retrieve import retrieve
from mmr5_lab.traces.construction import make_traces, read_traces, training_candidates
from mmr5_lab.views.browser import Browser
from mmr5_lab.views.thumbnails import thumbnails
from mmr5_lab.views.widgets import completion_viewer, order_browser, reasoning_browser, run_comparison, trace_browser

EVIL = "<script>alert(1)</script><img src=x onerror=alert(1)></textarea>**b** \x1b[31m \u202egnp"


class Writes(Ranker):
    """Ranks as the answer says that `text` writes."""

    def __init__(self, text: str):
        self.text = text

    def rank_each(self, pairs, mode="reason", batch_size=16):
        for i, (_, pages) in enumerate(pairs):
            parsed = parse_ranking(self.text, len(pages))
            yield i, Ranking(list(parsed.order), parsed.think, self.text, parsed.faults, None, 12, 0.25)


LAST = "<think>Image 1: no.\nImage 4: it answers.</think><answer>[4, 1, 2, 3]</answer>"
SAME = "<think>Image 1: it answers.</think><answer>[1, 2, 3, 4]</answer>"
FAULTY = f"<think>Image 2: {EVIL}</think><answer>[2, 2]</answer>"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus"), seed=5, splits={"eval": (3, 3)})


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory):
    folder, first_stage = tmp_path_factory.mktemp("run"), retrieve(corpus, "bm25", top_k=4)
    texts = {"last": LAST, "same": SAME, "faulty": FAULTY}
    return {name: rerank_run(Writes(text), corpus, first_stage, folder, name) for name, text in texts.items()}


def html(browser: Browser, row: int) -> str:
    browser.selected = row
    assert browser.detail["row"] == row
    return browser.detail["html"]


def column(browser: Browser, facet: str) -> list[list[str]]:
    place = browser.facets.index(facet)
    return [row["values"][place] for row in browser.rows]


def test_reasoning_stands_beside_its_page(corpus, runs):
    browser = reasoning_browser(corpus, {"last": runs["last"]})
    assert browser.facets == ["Domain", "Type", "Outcome", "Fault", "Against the retriever"]
    assert [row["label"] for row in browser.rows] == corpus.questions["question"].tolist()
    cards = re.findall(r"<li>.*?</li>", html(browser, 0).split('<ol class="cards">')[1])
    said = [re.search(r"<p[^>]*>(.*?)</p>", card)[1] for card in cards]
    assert said == ["it answers.", "no.", "nothing said of this page", "nothing said of this page"]
    assert "▲ from 4" in cards[0]
    assert "▼ from 1" in cards[1]
    candidates = runs["last"]["candidates"][0]
    assert re.findall(r'data-page="([^"]+)"', "".join(cards)) == [f"eval-000:{candidates[k]}" for k in (3, 0, 1, 2)]
    assert all(url.startswith("data:image/jpeg;base64,") for url in browser.detail["images"].values())
    assert set(browser.detail["images"]) == {f"eval-000:{page}" for page in candidates}


def test_heat_maps_lie_over_the_candidates_to_one_scale(corpus, runs):
    """The encoder finds a word on the first candidate twice as strongly as on the others, at one patch of 2 × 3."""

    class Finds:
        seen = 0

        def heat_map(self, query, page):
            self.seen += 1
            likeness = np.zeros((2, 2, 3))
            likeness[1, 0, 2] = 0.8 if self.seen == 1 else 0.4
            return ["what", "answers"], likeness

    question = html(reasoning_browser(corpus, {"last": runs["last"]}, Finds()), 0)
    fold = re.search(r"<details><summary>Where a late-interaction.*?</details>", question)[0]
    urls = re.findall(r'<img class="heat" alt="" src="data:image/png;base64,([^"]+)"', fold)
    strengths = [np.asarray(Image.open(io.BytesIO(base64.b64decode(url))))[..., 3] for url in urls]
    assert [strength.tolist() for strength in strengths] == [[[0, 0, 200], [0, 0, 0]]] + 3 * [[[0, 0, 100], [0, 0, 0]]]
    assert "heat" not in html(reasoning_browser(corpus, {"last": runs["last"]}), 0)


def test_gold_pages_and_their_evidence_are_marked(corpus, runs):
    browser = reasoning_browser(corpus, {"same": runs["same"]})
    for row, (question, candidates) in enumerate(
        zip(runs["same"]["question_id"], runs["same"]["candidates"], strict=True)
    ):
        gold = [page for page in candidates if page in corpus.by_id[question]["gold_pages"]]
        assert html(browser, row).count('class="page gold"') == 2 * len(gold), "among the candidates and in the order"
        boxes = [box for box in corpus.by_id[question]["boxes"] if box["page"] in gold]
        assert html(browser, row).count('class="box"') == 2 * len(boxes)
    question = corpus.by_id[runs["same"]["question_id"][0]]
    box, *_ = question["boxes"]
    left = 100 * box["bbox"][0] / box["page_size"][0]
    assert f'style="left: {left:.2f}%; top: ' in html(browser, 0)


def test_outcomes_faults_rewards_and_cost_are_told(corpus, runs):
    browser = reasoning_browser(corpus, {"faulty": runs["faulty"]})
    assert column(browser, "Fault") == [["duplicate", "missing"]] * len(browser.rows)
    assert {row["word"] for row in browser.rows} <= {"hit", "inversion", "candidate miss"}
    row = next(k for k, reward in enumerate(runs["faulty"]["rank_reward"]) if pd.notna(reward))
    reward = runs["faulty"]["rank_reward"][row]
    assert f"rank reward {reward:.2f} " in html(browser, row)
    assert "12 tokens · 0.25 s · faults: duplicate, missing" in html(browser, row)
    assert {word for [word] in column(browser, "Against the retriever")} <= {"gain", "loss", "the same"}


def test_two_runs_stand_side_by_side(corpus, runs):
    browser = reasoning_browser(corpus, {"last": runs["last"], "same": runs["same"]})
    assert html(browser, 1).count('<ol class="cards">') == 2
    assert html(browser, 1).count("Candidates in the retriever&#x27;s order") == 1
    other = runs["same"].assign(
        candidates=[list(c)[::-1] for c in runs["same"]["candidates"]],
    )  # another retriever
    browser = reasoning_browser(corpus, {"last": runs["last"], "same": other})
    assert html(browser, 1).count("Candidates in the retriever&#x27;s order") == 2
    assert "last: outcome" in browser.facets


def test_runs_are_compared_against_a_baseline(corpus, runs):
    browser = run_comparison(corpus, {"same": runs["same"], "last": runs["last"]}, samples=100)
    assert browser.facets == ["Domain", "Type", "last against same"]
    gold = [set(corpus.by_id[q]["gold_pages"]) for q in runs["same"]["question_id"]]
    right = {
        name: [pages[0] in g for pages, g in zip(runs[name]["pages"], gold, strict=True)] for name in ("same", "last")
    }
    expected = [
        "better" if b > a else "worse" if b < a else "the same"
        for a, b in zip(right["same"], right["last"], strict=True)
    ]
    assert column(browser, "last against same") == [[word] for word in expected]
    both = sum(a and b for a, b in zip(right["same"], right["last"], strict=True))
    assert f'<th scope="row">same right</th><td>{both}</td>' in browser.heading
    assert "documents resampled" in browser.heading
    with pytest.raises(ValueError, match="needs two runs"):
        run_comparison(corpus, {"same": runs["same"]})
    with pytest.raises(ValueError, match="a baseline among them: 'same', 'last'"):
        run_comparison(corpus, {"same": runs["same"], "last": runs["last"]}, "x")


def test_one_document_is_compared_without_intervals(corpus, runs):
    part = {name: runs[name].head(3) for name in ("same", "last")}
    heading = run_comparison(corpus, part, samples=10).heading
    assert "3 questions of 1 documents" in heading
    assert "<td>–</td>" in heading


def test_orders_are_shown_as_they_were(corpus, tmp_path):
    orders = order_audit(Writes(LAST), corpus, retrieve(corpus, "bm25", top_k=4), tmp_path, shuffles=3)
    browser = order_browser(corpus, orders)
    assert html(browser, 0).count('<ol class="strip">') == 3
    first = orders[orders["question_id"] == corpus.questions["question_id"][0]]
    shown = re.findall(r'data-page="eval-000:(\d+)"', html(browser, 0))
    assert list(map(int, shown)) == [page for pages in first["candidates"] for page in pages]
    assert re.findall(r'<span class="rank">(\d)</span>', html(browser, 0)) == ["2", "3", "4", "1"] * 3
    tops = [len({pages[0] for pages in group["pages"]}) for _, group in orders.groupby("question_id", sort=False)]
    expected = ["the same in all orders" if n == 1 else f"{n} different" for n in tops]
    assert column(browser, "Top page") == [[word] for word in expected]


def test_completions_are_grouped_by_step_and_prompt():
    prompts = [build_messages(f"question {k}", 2) for k in range(2)]
    rows = [
        {"step": step, "prompt": prompts[k], "completion": [{"role": "assistant", "content": text}],
         "rank_reward": reward, "format_reward": 1.0, "advantage": reward - 0.5}
        for step in (1, 2) for k in (0, 1) for text, reward in ((SAME, 0.25), (FAULTY, 0.25 + 0.5 * k))
    ]  # fmt: skip
    browser = completion_viewer(pd.DataFrame(rows))
    assert [row["label"] for row in browser.rows] == ["question 0", "question 1"] * 2
    assert column(browser, "Step") == [["1"], ["1"], ["2"], ["2"]]
    assert column(browser, "Rewards") == [["all equal"], ["differ"]] * 2
    assert browser.rows[1]["note"] == "rank 0.50, format 1.00"
    shown = html(browser, 1)
    assert shown.index("advantage +0.25") < shown.index("advantage −0.25"), "best first"
    assert "<script" not in shown
    assert "&lt;script&gt;" in shown
    with pytest.raises(ValueError, match="no completions"):
        completion_viewer(pd.DataFrame(rows).head(0))


@pytest.fixture(scope="module")
def evil(tmp_path_factory):
    """A corpus in which question, answer, document and domain names, and boxes were written by somebody unkind."""
    folder = tmp_path_factory.mktemp("evil")
    image = make_corpus(folder / "mini", seed=5, splits={"eval": (1, 1)}).page_bytes("eval-000", 0)
    boxes = [
        {"page": 0, "page_size": [1, 1], "bbox": [0, 0, 1, 1]},
        {"page": 0, "page_size": [0, 1], "bbox": "x"},
        {EVIL: 1},
    ]
    asked = {"Q": EVIL, "A": EVIL, "page_id": [0], "type": EVIL, "layout_mapping": boxes}
    pages = [{"doc_name": EVIL, "image_binary": data} for data in (image, b"broken", image)]
    write_corpus(folder / "c", [{"doc_name": EVIL, "domain": EVIL, "questions": [asked, asked]}], pages)
    return load_corpus(folder / "c")


@pytest.fixture(scope="module")
def evil_run(evil, tmp_path_factory):
    candidates = {question: [1, 0, 2] for question in evil.questions["question_id"]}
    rows = []
    for question, pages in candidates.items():
        parsed = parse_ranking(FAULTY, 3)
        rows.append({"question_id": question, "candidates": pages, "pages": [pages[k] for k in parsed.order],
                     "text": FAULTY, "think": parsed.think, "faults": [EVIL]})  # fmt: skip
    return pd.DataFrame(rows)


def test_texts_of_others_are_never_html(evil, evil_run):
    browsers = [
        reasoning_browser(evil, {EVIL: evil_run}),
        run_comparison(evil, {EVIL: evil_run, "b": evil_run}),
        order_browser(evil, pd.concat([evil_run.assign(turn=0), evil_run.assign(turn=1)])),
    ]
    for browser in browsers:
        shown = html(browser, 0) + browser.heading
        assert not re.search(r"<script|<img src=x|</textarea|[\x1b\u202e]", shown)
        assert "&lt;script&gt;" in shown
        assert not re.search("[\x1b\u202e]", json.dumps(browser.rows, ensure_ascii=False) + browser.title)
        page = browser.static_export().html
        assert page.count("<script") == page.count("</script>") == 2, "the data and the one script"
        assert not re.search("[\x1b\u202e]", page)


def test_what_cannot_be_shown_is_said_and_costs_nothing_else(evil, evil_run):
    browser = reasoning_browser(evil, {"run": evil_run})
    images = list(browser.detail["images"].values())
    assert [bool(url) for url in images] == [False, True, True], "the middle page is broken"
    assert html(browser, 0).count('class="box"') == 2, "one of the three boxes is one"
    sent = []
    browser.send = sent.append
    broken, whole, _ = browser.detail["images"]
    for message in ({"page": whole}, {"page": broken}, {"page": "nothing:9"}, {"page": 3}, "text", {}):
        browser._answer(browser, message, [])
    assert [set(message) for message in sent] == [{"page", "src"}, *[{"page", "problem"}] * 3]
    assert "not a readable image" in sent[1]["problem"]
    assert "has no document 'nothing'" in sent[2]["problem"]


def test_runs_that_do_not_fit_are_named(corpus, runs):
    last = runs["last"]
    with pytest.raises(ValueError, match="there are no runs"):
        reasoning_browser(corpus, {})
    with pytest.raises(ValueError, match=r"run 'a': .*lack the columns text"):
        reasoning_browser(corpus, {"a": last.drop(columns="text")})
    with pytest.raises(ValueError, match=r"run 'a': the generations are empty"):
        reasoning_browser(corpus, {"a": last.head(0)})
    with pytest.raises(ValueError, match=r"run 'a': .*has no question 'z'"):
        reasoning_browser(corpus, {"a": last.assign(question_id=["z", *last["question_id"][1:]])})
    with pytest.raises(ValueError, match="only one of 'a' and 'b' has the questions eval-002:q2"):
        reasoning_browser(corpus, {"a": last, "b": last.head(8)})


def test_rows_that_do_not_exist_are_refused(corpus, runs):
    browser = reasoning_browser(corpus, {"last": runs["last"]})
    with pytest.raises(traitlets.TraitError, match="there is no row 9: the list has 9 rows"):
        browser.selected = 9
    assert browser.detail["row"] == 0


def test_thumbnails_are_made_once(corpus, runs, monkeypatch):
    read = []
    original = type(corpus).page_bytes
    monkeypatch.setattr(type(corpus), "page_bytes", lambda self, *page: read.append(page) or original(self, *page))
    browser = reasoning_browser(corpus, {"last": runs["last"]})
    for row in (1, 2, 0, 1):
        browser.selected = row
    assert len(read) == len(set(read)), "no page is read twice"


def test_thumbnails_take_bounded_memory(corpus, monkeypatch):
    monkeypatch.setattr("mmr5_lab.views.thumbnails.KEPT", 1)
    url = thumbnails(corpus)
    first, second = url("eval-000:0"), url("eval-000:1")
    assert first != second
    assert (url("eval-000:0"), url("eval-000:99")) == (first, "")
    assert url.cache_info().currsize == 1


def test_looking_takes_no_model_and_little_memory(tmp_path):
    """In a process of its own: 100 questions on 160 pages of a size as scans have them, all looked at."""
    file = io.BytesIO()
    Image.effect_noise((1000, 1294), 60).save(file, "JPEG", quality=60)
    asked = [{"Q": f"question {k}", "page_id": [k], "type": "[]"} for k in range(5)]
    documents = [{"doc_name": f"{k}.pdf", "domain": "scans", "questions": asked} for k in range(20)]
    pages = ({"doc_name": f"{k}.pdf", "image_binary": file.getvalue()} for k in range(20) for _ in range(8))
    write_corpus(tmp_path, documents, pages)
    code = """
import sys
import pandas as pd, psutil
from mmr5_lab.corpus.documents import load_corpus
from mmr5_lab.views.widgets import reasoning_browser
corpus = load_corpus(sys.argv[1])
order = list(range(8))
rows = [{"question_id": q, "candidates": order, "pages": order, "text": "", "faults": []} for q in corpus.by_id]
browser = reasoning_browser(corpus, {"run": pd.DataFrame(rows)})
seen = set()
for browser.selected in range(100):
    seen |= set(browser.detail["images"])
print(len(seen), [name for name in ("torch", "transformers", "sklearn", "scipy", "matplotlib") if name in sys.modules])
print(psutil.Process().memory_info().rss / 2**20)
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    loaded, megabytes = done.stdout.splitlines()
    assert loaded == "160 []"
    assert float(megabytes) < 350


def test_closed_widgets_leave_nothing_behind(corpus, runs):
    def live() -> int:
        gc.collect()
        return len(ipywidgets.widgets.widget._instances)

    before = live()
    for _ in range(3):
        browser = reasoning_browser(corpus, {"last": runs["last"]})
        browser.selected = 2
        assert live() == before + 2, "the model and its layout"
        browser.close()
    assert live() == before


def test_a_static_export_holds_some_rows_each_page_once(corpus, runs, tmp_path):
    browser = reasoning_browser(corpus, {"last": runs["last"]})
    path = browser.static_export(most=3).save(tmp_path / "look.html")
    data = json.loads(re.search(r'id="data">(.*?)</script>', path.read_text(), re.DOTALL)[1])
    assert [row["label"] for row in data["rows"]] == [browser.rows[k]["label"] for k in (0, 3, 6)]
    assert data["title"] == "Reasoning of last (3 of 9 rows)"
    assert len(data["details"]) == 3
    shown = {
        (q.split(":")[0], page)
        for q, pages in zip(runs["last"]["question_id"][::3], runs["last"]["candidates"][::3], strict=True)
        for page in pages
    }
    assert set(data["images"]) == {f"{name}:{page}" for name, page in shown}
    assert (
        len(json.loads(re.search(r'id="data">(.*?)</script>', browser.static_export(0).html, re.DOTALL)[1])["rows"])
        == 9
    )


def test_a_static_export_may_run_its_own_script_only_and_load_nothing(corpus, runs):
    import base64
    import hashlib

    page = reasoning_browser(corpus, {"last": runs["last"]}).static_export().html
    script = re.search(r'<script type="module">(.*?)</script>', page, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in page
    assert not re.search(r"https?://|\bsrc=\"(?!data:)", page)


def test_a_text_without_reasoning_among_others_is_shown(corpus, runs, tmp_path):
    mixed = runs["last"].copy()
    mixed["think"], mixed["text"] = [None, *mixed["think"][1:]], ["", *mixed["text"][1:]]
    mixed.to_parquet(tmp_path / "mixed.parquet")
    for frame in (mixed, pd.read_parquet(tmp_path / "mixed.parquet")):  # None, and the NaN that a table makes of it
        browser = reasoning_browser(corpus, {"mixed": frame})
        assert ["it answers." in html(browser, k) for k in range(9)].count(False) == 1


def test_an_empty_list_is_a_browser_too():
    browser = Browser("nothing", ["Domain"], [], lambda row: "")
    assert browser.detail == {"row": -1}
    assert json.loads(re.search(r'id="data">(.*?)</script>', browser.static_export().html)[1])["details"] == []


def test_scores_without_text_are_shown(corpus, runs):
    scored = runs["last"].assign(text="", think=None, faults=[[]] * 9, scores=[np.arange(4.0)] * 9)
    assert "ranked by scores, without text" in html(reasoning_browser(corpus, {"score": scored}), 4)


def test_a_trace_stands_beside_its_pages_in_the_student_s_order(corpus, tmp_path):
    candidates = training_candidates(corpus, retrieve(corpus, "bm25", top_k=4), 4)
    path = make_traces(corpus, candidates, evidence_teacher(corpus), tmp_path / "t.jsonl")
    accepted = read_traces(path)
    evil = {**accepted[0], "faults": ["label_leaked", EVIL], "repeats": EVIL, "teacher": EVIL}
    evil["messages"] = [*evil["messages"][:2], {"content": f"<think>Image 2: {EVIL}</think><answer>[2]</answer>"}]
    browser = trace_browser(corpus, accepted, [evil])
    assert column(browser, "Checks") == [["accepted"]] * len(accepted) + [["label_leaked", visible(EVIL)]]
    assert [row["mark"] for row in browser.rows] == ["good"] * len(accepted) + ["bad"]
    cards = re.findall(r"<li>.*?</li>", html(browser, 0).split('<ol class="cards">')[1])
    pages = [f"{accepted[0]['doc_name']}:{page}" for page in accepted[0]["candidates"]]
    assert [re.search(r'data-page="([^"]+)"', card)[1] for card in cards] == pages
    assert ["gold</span>" in card for card in cards] == [k in accepted[0]["positive_ids"] for k in (1, 2, 3, 4)]
    assert all("a " in re.search(r"<p>(.*?)</p>", card)[1] for card in cards)
    shown = html(browser, len(accepted))
    assert "<script" not in shown
    assert "the label is named as such" in shown
    assert "nothing said of this page" in shown
    assert "<script>alert" not in browser.static_export().html
    with pytest.raises(ValueError, match="no traces"):
        trace_browser(corpus, [])
    with pytest.raises(ValueError, match="has no question 'x:q0'"):
        trace_browser(corpus, [{**accepted[0], "query_id": "x:q0"}])
