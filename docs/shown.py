"""What README and notebook 00 show, taken from finished runs: `python docs/shown.py runs`.

Copies the small files of the newest runs of 02 to 05 to `data/mini/tour`, runs notebook 00 on them, draws README's
picture of a reranked question and, for its table, makes a thumbnail of a figure of each notebook that has a finished
run.
"""

import argparse
import base64
import io
import shutil
import sys
from pathlib import Path

import nbformat
import pandas as pd
from IPython.core.pylabtools import print_figure
from PIL import Image
from playwright.sync_api import sync_playwright

from mmr5_lab.corpus.documents import load_corpus
from mmr5_lab.experiments.notebooks import run_notebook
from mmr5_lab.experiments.runs import latest
from mmr5_lab.prompting.reasons import reasons_in_order
from mmr5_lab.views import plots
from mmr5_lab.views.widgets import reasoning_browser

ROOT = Path(__file__).resolve().parents[1]
IMAGES, TOUR = ROOT / "docs" / "images", ROOT / "data" / "mini" / "tour"
SHIPPED = {  # notebook -> its files that notebook 00 reads, beside its manifest and results
    "02_sft": ["log.csv"],
    "03_grpo": ["log.csv"],
    "04_inference": ["*.generations.parquet"],
    "05_evaluation": [],
}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
THUMBNAIL = (200, 150)  # pixels at most
# words in the description of the figure that stands for a notebook; the last figure where it has none such
CHOSEN = {
    "00_tour": "Candidate pages",
    "01_data_construction": "Candidate pages",
    "03_grpo": "rank reward",
    "04_inference": "Recall@1 against",
    "05_evaluation": "Micro recall",
    "06_error_analysis": "by group",
    "10_fast_scorer": "Recall@1 against",
}


def ship(runs: Path, tour: Path = TOUR) -> None:
    """Copy the files of the newest finished runs, in the folders of their names, in place of what was there."""
    newest = {notebook: latest(notebook, runs) for notebook in SHIPPED}
    shutil.rmtree(tour, ignore_errors=True)
    for notebook, folder in newest.items():
        (place := tour / notebook / folder.name).mkdir(parents=True)
        for pattern in ("manifest.json", "results.json", *SHIPPED[notebook]):
            for path in folder.glob(pattern):
                shutil.copy(path, place)


def reranked(tour: Path = TOUR) -> plots.Figure:
    """The first evaluation question whose right page BM25 does not rank first and the last system does."""
    corpus = load_corpus(ROOT / "data" / "mini" / "corpus")
    written = pd.read_parquet(latest("04_inference", tour) / "SFT + RL.generations.parquet")
    for row in written.to_dict("records"):
        question, pages = corpus.by_id[row["question_id"]], row["candidates"]
        gold = [k for k, page in enumerate(pages) if page in question["gold_pages"]]
        if gold and gold[0] > 0 and row["order"][0] in gold:
            break
    images = [corpus.page_image(question["doc_name"], page) for page in pages]
    orders = {"BM25": range(len(pages)), "SFT + RL": row["order"]}
    said = reasons_in_order(row["think"], row["order"])
    return plots.before_after(images, orders, gold, question["question"], {"SFT + RL": said})


def picture(notebook: Path, words: str = "") -> Image.Image | None:
    """The last figure of an executed notebook with `words` in its description, or else the last; None for no figure."""
    cells = nbformat.read(notebook, as_version=4).cells
    outputs = [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]
    figures = [output for output in outputs if "image/png" in output.get("data", ())]
    if not figures:
        return None
    fitting = [output for output in figures if words in output.metadata.get("image/png", {}).get("alt", "")]
    return Image.open(io.BytesIO(base64.b64decode((fitting or figures)[-1].data["image/png"]))).convert("RGB")


def projected(tour: Path = TOUR) -> Image.Image:
    """What notebook 09 shows: the browser of what the last system wrote, small."""
    written = pd.read_parquet(latest("04_inference", tour) / "SFT + RL.generations.parquet")
    corpus = load_corpus(ROOT / "data" / "mini" / "corpus")
    page = reasoning_browser(corpus, {"SFT + RL": written.head(20)}).static_export().html
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        tab = browser.new_page(viewport={"width": 800, "height": 600})
        tab.set_content(page)
        image = Image.open(io.BytesIO(tab.screenshot())).convert("RGB")
        browser.close()
    image.thumbnail(THUMBNAIL, Image.Resampling.LANCZOS)
    return image


def save(image: Image.Image, path: Path) -> None:
    """As a small file: few colours do for a drawing."""
    image.quantize(128).save(path, optimize=True)
    print(path.relative_to(ROOT))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, help="folder of finished runs, such as runs")
    runs = parser.parse_args().runs
    try:
        ship(runs)
    except FileNotFoundError as missing:
        sys.exit(str(missing))
    run_notebook("00_tour", {}, runs)
    figure = reranked()
    save(Image.open(io.BytesIO(print_figure(figure, "png", dpi=110))).convert("RGB"), IMAGES / "reranked.png")
    print(f"its description: {figure.alt}")
    for path in sorted((ROOT / "notebooks").glob("[01][0-8]_*.ipynb")):
        try:
            executed = latest(path.stem, runs, holding="notebook.ipynb") / "notebook.ipynb"
            image = picture(executed, CHOSEN.get(path.stem, ""))
        except FileNotFoundError as missing:
            print(f"no thumbnail: {missing}")
        else:
            if image:
                if path.stem == "10_fast_scorer":
                    save(image, IMAGES / "frontier.png")
                image.thumbnail(THUMBNAIL, Image.Resampling.LANCZOS)
                save(image, IMAGES / "notebooks" / f"{path.stem}.png")
    if CHROMIUM:
        save(projected(), IMAGES / "notebooks" / "09_browse.png")
    else:
        print("no thumbnail of 09_browse: no Chromium is installed")
