"""What the reasoning browser takes of a kernel and of Chromium; `evaluate.py` makes the folder and starts this.

    python benchmarks/browse.py FOLDER

A process of its own, so that its memory is the browser's. FOLDER holds a corpus and `run.generations.parquet`. Prints
JSON: seconds to build the widget and its state as text, seconds until Chromium has drawn it (null without Chromium),
milliseconds of each first switch to a question, memory (MB) after all questions were looked at.
"""

import json
import shutil
import sys
import time
from pathlib import Path

import pandas as pd
import psutil

from mmr5_lab.corpus.documents import load_corpus
from mmr5_lab.views.browser import Browser, StaticExport
from mmr5_lab.views.widgets import reasoning_browser


def drawn(browser: Browser, folder: Path) -> float | None:
    """Seconds until a page with all rows and the first one's detail is drawn, from the start of its loading."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if not chromium:
        return None
    from playwright.sync_api import sync_playwright

    detail = browser.detail
    data = {name: getattr(browser, name) for name in ("title", "heading", "facets", "rows")}
    page = StaticExport(browser.title, {**data, "details": [detail["html"]], "images": detail["images"]}).save(
        folder / "p.html"
    )
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        tab = started.new_page(viewport={"width": 1400, "height": 900})
        tab.goto(page.as_uri())
        tab.wait_for_selector(".pane img[src]")
        frames = (
            "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now()))))"
        )
        milliseconds = tab.evaluate(frames)
        started.close()
    return milliseconds / 1000


def main() -> None:
    folder = Path(sys.argv[1])
    corpus, run = load_corpus(folder), pd.read_parquet(folder / "run.generations.parquet")
    process = psutil.Process()
    before = process.memory_info().rss
    started = time.perf_counter()
    browser = reasoning_browser(corpus, {"run": run})
    json.dumps(browser.get_state(["title", "heading", "facets", "rows", "selected", "detail"]))
    built = time.perf_counter() - started
    paint = drawn(browser, folder)
    switches = []
    for row in range(1, len(browser.rows)):
        started = time.perf_counter()
        browser.selected = row
        json.dumps(browser.detail)
        switches.append(1000 * (time.perf_counter() - started))
    memory = process.memory_info().rss
    result = {"built": built, "drawn": paint, "switches": switches, "before": before / 2**20, "memory": memory / 2**20}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
