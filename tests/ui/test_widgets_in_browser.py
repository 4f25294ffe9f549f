"""The widgets in a real browser: notebook 06 run in JupyterLab, and the static exports opened from disk.

Screenshots are kept in `build/screenshots`.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from mmr5_lab.corpus.documents import ANNOTATIONS, load_corpus
from mmr5_lab.experiments.runs import project_root
from mmr5_lab.mini.documents import make_corpus
from mmr5_lab.prompting.answers import parse_ranking
from mmr5_lab.prompting.prompts import build_messages
from mmr5_lab.reranking.ranking import Ranker, Ranking
from mmr5_lab.reranking.whole_runs import rerank_run
from mmr5_lab.retrieval.retrieve import retrieve
from mmr5_lab.views.widgets import completion_viewer, reasoning_browser, run_comparison

axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed").Axe()
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed")

SWITCHES = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
SCREENSHOTS = project_root() / "build" / "screenshots"
DARK = """body {
    --jp-ui-font-color1: #fff; --jp-layout-color0: #111; --jp-layout-color2: #424242; --jp-border-color2: #616161;
}"""  # of JupyterLab's dark theme
EVIL = "<script>alert(1)</script><img src=x onerror=alert(1)></textarea> **bold** [a](b) \x1b[31mred \u202egnp.exe"
SHOWN = r"<script>alert(1)</script><img src=x onerror=alert(1)></textarea> **bold** [a](b) \x1b[31mred \u202egnp.exe"


class Writes(Ranker):
    """Puts the image first that is `first`, and says things that nobody should obey."""

    def __init__(self, first: int):
        self.first = first

    def rank_each(self, pairs, mode="reason", batch_size=16):
        for i, (_, pages) in enumerate(pairs):
            ids = [self.first, *(k for k in range(1, len(pages) + 1) if k != self.first)]
            text = f"<think>Image {self.first}: it answers.\nImage {ids[1]}: {EVIL}</think><answer>{ids}</answer>"
            parsed = parse_ranking(text, len(pages))
            yield i, Ranking(list(parsed.order), parsed.think, text, parsed.faults, None, 12, 0.25)


@pytest.fixture(scope="module")
def project(tiny_model, tmp_path_factory):
    """What notebook 06 needs, in a folder that looks like a checkout: a corpus, and runs of 03 and 04."""
    root = tmp_path_factory.mktemp("project")
    (root / "mmr5_lab").symlink_to(project_root() / "mmr5_lab")
    (root / "notebooks").mkdir()
    (root / "notebooks" / "exercises.py").symlink_to(project_root() / "notebooks" / "exercises.py")
    shutil.copytree(project_root() / "notebooks" / "diagrams", root / "notebooks" / "diagrams")
    make_corpus(root / "corpus", seed=5, splits={"eval": (3, 4)})
    path = root / "corpus" / ANNOTATIONS
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[0]["questions"][0]["Q"] = EVIL
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    corpus = load_corpus(root / "corpus")

    inference = root / "runs" / "04_inference" / "x"
    first_stage = retrieve(corpus, "bm25", top_k=4)
    for name, first in {"SFT": 1, "SFT + RL": 2}.items():
        rerank_run(Writes(first), corpus, first_stage, inference, name)
    models = dict.fromkeys(("SFT", "SFT + RL"), str(tiny_model))
    (inference / "results.json").write_text(json.dumps({"models": models}))
    manifest = {"notebook": "04_inference", "parameters": {"CORPUS": "corpus"}, "started": "2026-11-24T08:35:27+0000"}
    (inference / "manifest.json").write_text(json.dumps(manifest))

    grpo = root / "runs" / "03_grpo" / "x"
    (grpo / "checkpoints" / "completions").mkdir(parents=True)
    (grpo / "manifest.json").write_text(json.dumps({**manifest, "notebook": "03_grpo", "parameters": {}}))
    (grpo / "results.json").write_text("{}")
    completions(corpus).to_parquet(grpo / "checkpoints" / "completions" / "completions_00001.parquet")
    return root


def completions(corpus) -> pd.DataFrame:
    rows = [
        {"step": step, "prompt": build_messages(question, 2), "completion": [{"role": "assistant", "content": EVIL}],
         "rank_reward": reward, "format_reward": 1.0, "advantage": reward - 0.5}
        for step in (1, 2) for question in corpus.questions["question"][1:3] for reward in (0.25, 0.75)
    ]  # fmt: skip
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    with playwright.sync_playwright() as started:
        context = started.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("user"), executable_path=CHROMIUM, args=SWITCHES,
            viewport={"width": 1400, "height": 900},
        )  # fmt: skip
        context.set_default_timeout(60_000)
        yield context
        context.close()


def amiss(page, within: str = "html") -> list[str]:
    """What axe finds wrong by WCAG 2.2 AA: contrast, labels, roles, what a keyboard reaches."""
    rules = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]}
    found = axe.run(page, context=within, options=rules).response["violations"]
    return [f"{v['id']}: {node['html']} {node['failureSummary']}" for v in found for node in v["nodes"][:2]]


class Watched:
    """A page and all that went wrong on it."""

    def __init__(self, page):
        self.page, self.problems = page, []
        page.on("console", lambda message: message.type == "error" and self.problems.append(message.text))
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("dialog", lambda dialog: (self.problems.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: self._asked(request.url))

    def _asked(self, url: str) -> None:
        if not re.match(r"data:|blob:|file:|(?:https?|wss?)://(?:localhost|127\.0\.0\.1)[:/]|about:", url):
            self.problems.append(f"asked for {url}")


@pytest.fixture(scope="module")
def lab(project, chromium, tmp_path_factory):
    """Notebook 06 open in JupyterLab, all its cells run."""
    notebook = json.loads((project_root() / "notebooks" / "06_error_analysis.ipynb").read_text())
    [parameters] = [c for c in notebook["cells"] if "parameters" in c["metadata"].get("tags", ())]
    values = {"CORPUS": '"corpus"', "PROBED": "2", "SHUFFLES": "2", "MAX_NEW_TOKENS": "8", "SAMPLES": "100"}
    for number, line in enumerate(parameters["source"]):
        if (name := line.split(":")[0]) in values:
            parameters["source"][number] = re.sub("= .*?  #", f"= {values[name]}  #", line)
    (project / "notebooks" / "06_error_analysis.ipynb").write_text(json.dumps(notebook))

    home = tmp_path_factory.mktemp("jupyter")
    settings = {
        "notebook-extension/tracker": {"windowingMode": "none"},  # all cells are in the page
        "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    }
    for name, value in settings.items():
        path = home / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value))
    environment = os.environ | {
        "JUPYTER_CONFIG_DIR": str(home),
        "JUPYTER_RUNTIME_DIR": str(home),
        "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"),
        "PYTHONPATH": str(project_root()),
    }
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--ServerApp.root_dir={project}"]
    command += ["--ServerApp.ip=127.0.0.1", "--IdentityProvider.token="]
    with (home / "log.txt").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=project)
    try:
        url = address(home, server)
        watched = Watched(chromium.new_page())
        watched.page.goto(f"{url}lab/tree/notebooks/06_error_analysis.ipynb")
        watched.page.get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=120_000)
        watched.page.locator(".jp-Notebook h1").click()
        watched.page.get_by_role("menuitem", name="Run", exact=True).click()
        watched.page.locator(".lm-Menu-itemLabel", has_text=re.compile("^Run All Cells$")).click()
        failed = watched.page.locator("[data-mime-type='application/vnd.jupyter.error']")
        watched.page.locator(".mmr5").nth(3).or_(failed.first).wait_for(timeout=180_000)
        assert failed.all_inner_texts() == []
        yield watched
    finally:
        chromium.pages[-1].screenshot(path=SCREENSHOTS / "notebook.png")
        server.terminate()
        server.wait(30)


def address(home: Path, server: subprocess.Popen) -> str:
    """Where the server answers, once it says so."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert server.poll() is None, (home / "log.txt").read_text()
        for path in home.glob("jpserver-*.json"):
            try:
                return json.loads(path.read_text())["url"]
            except (ValueError, KeyError):
                pass  # half written
        time.sleep(0.2)
    raise AssertionError((home / "log.txt").read_text())


@pytest.fixture
def reasoning(lab):
    """The reasoning browser in the notebook, without filters."""
    browser = lab.page.locator(".mmr5").first
    browser.scroll_into_view_if_needed()
    if browser.get_by_role("button", name="Clear filters").is_visible():
        browser.get_by_role("button", name="Clear filters").click()
    return browser


def rows(browser) -> list[str]:
    return browser.locator('[role="option"]:visible .label').all_inner_texts()


def question(browser) -> str:
    return browser.locator(".pane h3").inner_text()


def test_the_notebook_ran_without_an_error(lab):
    prompts = lab.page.locator(".jp-CodeCell .jp-InputPrompt")
    playwright.expect(prompts.last).to_have_text(re.compile(r"\[\d+\]:"), timeout=60_000)  # exercises come last
    assert all(re.fullmatch(r"\[\d+\]:", prompt) for prompt in prompts.all_inner_texts())
    assert lab.page.locator("[data-mime-type='application/vnd.jupyter.error']").count() == 0


def test_a_question_is_looked_at(lab, reasoning):
    third = reasoning.locator('[role="option"]').nth(2)
    third.click()
    expect_text(reasoning.locator(".pane h3"), third.locator(".label").inner_text())
    images = reasoning.locator(".pane .cards img")
    assert images.count() == 4
    assert all(image.evaluate("image => image.complete && image.naturalWidth > 50") for image in images.all())
    assert reasoning.locator(".pane .cards p").first.inner_text() == "it answers."
    reasoning.screenshot(path=SCREENSHOTS / "reasoning.png")


def expect_text(locator, text: str) -> None:
    playwright.expect(locator).to_have_text(text)


def test_arrow_keys_walk_through_the_list(lab, reasoning):
    reasoning.locator('[role="option"]').first.click()
    listbox = reasoning.get_by_role("listbox")
    listbox.focus()
    for key, place in (("ArrowDown", 1), ("ArrowDown", 2), ("ArrowUp", 1), ("End", 11), ("Home", 0)):
        listbox.press(key)
        expect_text(reasoning.locator(".pane h3"), rows(reasoning)[place])
        assert reasoning.locator('[aria-selected="true"] .label').all_inner_texts() == [rows(reasoning)[place]]
    assert reasoning.locator(".pane").get_attribute("aria-busy") == "false"


def test_filters_leave_what_fits(lab, reasoning):
    everything = rows(reasoning)
    assert len(everything) == 12
    domain = reasoning.get_by_label("Domain")
    value = domain.locator("option").nth(1).get_attribute("value")
    domain.select_option(value)
    some = rows(reasoning)
    assert 0 < len(some) < 12
    assert all(value in note for note in reasoning.locator('[role="option"]:visible .note').all_inner_texts())
    expect_text(reasoning.locator(".count"), f"{len(some)} of 12 rowsClear filters")
    expect_text(reasoning.locator(".pane h3"), some[0])
    reasoning.get_by_role("searchbox").fill("no such words")
    assert rows(reasoning) == []
    assert "No row fits" in reasoning.locator(".pane").inner_text()
    reasoning.get_by_role("button", name="Clear filters").click()
    assert rows(reasoning) == everything


def test_a_page_is_enlarged(lab, reasoning):
    reasoning.locator('[role="option"]').nth(1).click()
    expect_text(reasoning.locator(".pane h3"), rows(reasoning)[1])
    page = reasoning.locator(".pane .cards button.page").nth(1)
    small = page.locator("img").bounding_box()["width"]
    page.click()
    dialog = reasoning.get_by_role("dialog")
    expect_text(dialog.locator("h3"), page.get_attribute("data-title"))
    image = dialog.locator("img")
    image.evaluate("image => image.decode()")
    assert image.bounding_box()["width"] > 2 * small
    lab.page.wait_for_function("image => image.src.length > 100", arg=image.element_handle())
    lab.page.screenshot(path=SCREENSHOTS / "enlarged.png")
    dialog.press("ArrowRight")
    expect_text(dialog.locator("h3"), reasoning.locator(".pane .cards button.page").nth(2).get_attribute("data-title"))
    lab.page.keyboard.press("Escape")
    playwright.expect(dialog).to_be_hidden()
    assert reasoning.locator(".pane .cards button.page").nth(2).evaluate("node => node === document.activeElement")


def test_the_browser_is_reached_by_keyboard(lab, reasoning):
    """Tab goes through all that can be operated, each with a name and a visible focus."""
    reasoning.get_by_role("searchbox").focus()
    reached = []
    for _ in range(10):
        reached.append(
            lab.page.evaluate(
                """() => {
                    const node = document.activeElement, style = getComputedStyle(node);
                    return [node.tagName, node.getAttribute("aria-label") ?? "", style.outlineStyle];
                }"""
            )
        )
        lab.page.keyboard.press("Tab")
    tags = [tag for tag, _, _ in reached]
    assert tags == ["INPUT", *["SELECT"] * 5, "DIV", "DIV", "BUTTON", "BUTTON"]  # search, filters, list, details, pages
    assert all(name for _, name, _ in reached)
    assert {outline for _, _, outline in reached} == {"solid"}
    assert amiss(lab.page, ".mmr5") == []


def test_runs_are_compared(lab):
    comparison = lab.page.locator(".mmr5").nth(1)
    comparison.scroll_into_view_if_needed()
    assert "documents resampled" in comparison.locator(".heading").inner_text()
    comparison.get_by_role("combobox", name="SFT + RL against SFT").select_option("better")
    better = rows(comparison)
    assert len(better) == int(comparison.locator(".heading tr", has_text="SFT wrong").locator("td").first.inner_text())
    assert comparison.locator(".pane .runs section").count() == 2
    comparison.screenshot(path=SCREENSHOTS / "comparison.png")


def test_orders_and_completions_are_browsed(lab):
    orders, sampled = lab.page.locator(".mmr5").nth(2), lab.page.locator(".mmr5").nth(3)
    orders.scroll_into_view_if_needed()
    assert orders.locator(".pane .strip").count() == 2
    assert orders.locator(".heading img").get_attribute("alt").startswith("Position bias")
    orders.screenshot(path=SCREENSHOTS / "orders.png")
    sampled.scroll_into_view_if_needed()
    sampled.get_by_label("Step").select_option("2")
    assert len(rows(sampled)) == 2
    sampled.screenshot(path=SCREENSHOTS / "completions.png")


def is_text_only(browser) -> None:
    """What was written to do harm stands there, letter by letter, and is nothing but text."""
    playwright.expect(browser.locator(".pane")).to_contain_text(SHOWN)
    assert browser.locator("script, [onerror], textarea, b, a").count() == 0
    assert not re.search("[\x1b\u202e]", browser.inner_text())


def test_unkind_texts_are_text(lab, reasoning):
    reasoning.locator('[role="option"]').first.click()
    expect_text(reasoning.locator(".pane h3"), SHOWN)
    assert rows(reasoning)[0] == SHOWN
    is_text_only(reasoning)
    for place in (1, 3):
        is_text_only(lab.page.locator(".mmr5").nth(place))


def test_nothing_went_wrong_in_the_notebook(lab):
    """Last of the tests of the notebook: what happened in all of them."""
    assert lab.problems == []


@pytest.mark.parametrize("name", ["reasoning", "comparison", "completions"])
@pytest.mark.parametrize("width", [1400, 800])
def test_static_exports_work_from_a_file(project, chromium, tmp_path, name, width):
    corpus = load_corpus(project / "corpus")
    runs = {
        n: pd.read_parquet(project / "runs/04_inference/x" / f"{n}.generations.parquet") for n in ("SFT", "SFT + RL")
    }
    browser = {
        "reasoning": lambda: reasoning_browser(corpus, runs),
        "comparison": lambda: run_comparison(corpus, runs, samples=100),
        "completions": lambda: completion_viewer(completions(corpus)),
    }[name]()
    watched = Watched(chromium.new_page())
    watched.page.set_viewport_size({"width": width, "height": 900})
    watched.page.goto(browser.static_export().save(tmp_path / "look.html").as_uri())
    shown = watched.page.locator(".mmr5")
    is_text_only(shown)
    assert watched.page.evaluate("document.documentElement.scrollWidth") <= width, "nothing is wider than the window"
    listbox = shown.get_by_role("listbox")
    listbox.press("ArrowDown")
    expect_text(shown.locator(".pane h3"), rows(shown)[1])
    if name != "completions":
        shown.locator("button.page").first.click()
        assert shown.get_by_role("dialog").locator("img").evaluate("image => image.naturalWidth") > 50
        watched.page.keyboard.press("Escape")
    watched.page.screenshot(path=SCREENSHOTS / f"static-{name}-{width}.png")
    assert amiss(watched.page) == []
    watched.page.add_style_tag(content=DARK)
    watched.page.evaluate("document.body.dataset.jpThemeLight = false")
    assert amiss(watched.page) == []
    watched.page.screenshot(path=SCREENSHOTS / f"static-{name}-{width}-dark.png")
    assert watched.problems == []
    watched.page.close()


def test_a_static_export_runs_in_a_notebooks_page(project, chromium, tmp_path):
    """As executed notebooks and the report hold it: in a frame of its own."""
    corpus = load_corpus(project / "corpus")
    run = pd.read_parquet(project / "runs/04_inference/x/SFT.generations.parquet")
    (tmp_path / "page.html").write_text(
        f"<!doctype html>{reasoning_browser(corpus, {'SFT': run}).static_export()._repr_html_()}"
    )
    watched = Watched(chromium.new_page())
    watched.page.goto((tmp_path / "page.html").as_uri())
    shown = watched.page.frame_locator("iframe").locator(".mmr5")
    expect_text(shown.locator(".pane h3"), SHOWN)
    is_text_only(shown)
    shown.locator('[role="option"]').nth(3).click()
    assert shown.locator(".pane .cards img").first.evaluate("image => image.naturalWidth") > 50
    assert watched.problems == []
    watched.page.close()


def test_a_policy_stops_what_escaping_would_miss(project, chromium, tmp_path):
    """A static export whose detail holds live HTML, as it must never be: the page's policy does not run it."""
    corpus = load_corpus(project / "corpus")
    export = completion_viewer(completions(corpus)).static_export()
    export.data["details"][0] = "<h3>x</h3><img src=x onerror=alert(1)><a href=# onclick=alert(1)>a</a>"
    watched = Watched(chromium.new_page())
    watched.page.goto(export.save(tmp_path / "look.html").as_uri())
    watched.page.locator(".pane a").click()
    assert not [problem for problem in watched.problems if problem.startswith("dialog")]
    assert any("Content Security Policy" in problem for problem in watched.problems)
    watched.page.close()


@pytest.fixture
def voila(project, tmp_path):
    """Notebook 09 as Voilà serves it: its address."""
    shutil.copy(project_root() / "notebooks" / "09_browse.ipynb", project / "notebooks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "voila", "notebooks/09_browse.ipynb", "--no-browser", f"--port={port}"]
    environment = os.environ | {"JUPYTER_CONFIG_DIR": str(tmp_path), "PYTHONPATH": str(project_root())}
    with (tmp_path / "log.txt").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=project)
    try:
        deadline = time.monotonic() + 60
        while socket.socket().connect_ex(("127.0.0.1", port)):
            assert server.poll() is None, (tmp_path / "log.txt").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.terminate()
        server.wait(30)


def test_a_run_is_looked_at_on_a_projector(voila, chromium):
    """No code, large type, no scrolling to reach the browser; another run is a choice away."""
    watched = Watched(chromium.new_page())
    watched.page.route("https://**", lambda route: route.abort())  # Voilà asks for icons, and does without them
    watched.page.set_viewport_size({"width": 1280, "height": 720})
    watched.page.goto(voila)
    shown = watched.page.locator(".mmr5")
    expect_text(shown.locator(".pane h3"), SHOWN)
    is_text_only(shown)
    assert shown.locator(".pane .cards p").first.evaluate("node => parseFloat(getComputedStyle(node).fontSize)") >= 18
    box = shown.bounding_box()
    assert box["y"] > 0
    assert box["y"] + box["height"] <= 720
    assert watched.page.get_by_text("import").count() == 0
    assert amiss(watched.page, ".mmr5") == []
    watched.page.screenshot(path=SCREENSHOTS / "projector.png")
    watched.page.get_by_label("Model and run").select_option(label="SFT · runs/04_inference/x")
    expect_text(shown.locator(".title"), "Reasoning of SFT")
    assert shown.count() == 1
    assert [text for text in watched.problems if not re.search("fontawesome|Failed to load resource", text)] == []
    watched.page.close()
