"""A stand-in for the Hugging Face hub: a cache in the hub's own layout, under the published names, with small content.

`build_hub` writes MMDocIR's evaluation and training files with the published columns, drawn as those of the
miniature, and small models of the real classes. With `environment` the documented commands run on it without a network.
"""

import hashlib
import json
import os
import random
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from helpers import architectures, retrievers

from mmr5_lab.corpus.documents import LAYOUTS
from mmr5_lab.corpus.mmdocir import EVALUATION, SUBSETS, TRAINING
from mmr5_lab.corpus.writing import write_corpus
from mmr5_lab.mini.documents import DOMAINS, make_document
from mmr5_lab.retrieval.encoders import ENCODERS

BASE = Path(__file__).resolve().parents[2] / "data" / "mini" / "base"
RERANKERS = ("Qwen/Qwen2.5-VL-7B-Instruct", "Qwen/Qwen2.5-VL-3B-Instruct", "i2vec/MM-R5")
OTHERS = {"Qwen/Qwen2.5-VL-32B-Instruct": "qwen2_5_vl", "google/gemma-3-12b-it": "gemma3"}  # random weights
RETRIEVERS = {"clip": "clip", "e5-v": "e5-v", "dse": "dse", "gme": "gme", "colqwen": "colqwen2"}
QUESTION_KEYS = ("Q", "A", "page_id", "type", "layout_mapping")  # as published: no facts, no page content
LAYOUT = pa.struct([("type", pa.string()), ("bbox", pa.list_(pa.float64()))])
TRAINING_PAGES = pa.schema([
    ("file_name", pa.string()), ("page", pa.int64()), ("image", pa.binary()), ("page_size", pa.list_(pa.float64())),
    ("layouts", pa.list_(LAYOUT)), ("domain", pa.string()),
])  # fmt: skip


def build_hub(cache: Path, base: Path = BASE, documents: int = 2, questions: int = 2) -> Path:
    """Write the stand-in into `cache` and return it: so many documents a domain or subset, and questions each.

    base: the folder of the model that stands for Qwen2.5-VL-7B and 3B and MM-R5
    """
    rng = random.Random(0)
    write_evaluation(_snapshot(cache, "datasets", EVALUATION), documents, questions, rng)
    training = _snapshot(cache, "datasets", TRAINING)
    for subset, stems in SUBSETS.items():
        write_subset(training, subset, stems[-1], documents + 2, questions, rng)
    for name in RERANKERS:
        shutil.copytree(base, _snapshot(cache, "models", name), dirs_exist_ok=True)
    for name, kind in OTHERS.items():
        architectures.save(kind, _snapshot(cache, "models", name))
    for method, model in RETRIEVERS.items():
        retrievers.BUILD[model](_snapshot(cache, "models", ENCODERS[method][1]))
    return cache


def environment(cache: Path) -> dict[str, str]:
    """Return the environment in which the hub is this cache and nothing else."""
    ours = {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return {name: value for name, value in os.environ.items() if name != "OPENAI_API_KEY"} | ours


def write_evaluation(folder: Path, documents: int, questions: int, rng: random.Random) -> None:
    """Write annotations, pages and layouts as MMDocIR_Evaluation_Dataset has them."""
    annotations, pages, layouts = [], [], []
    for k in range(documents):
        name = f"stand in {k}.pdf"  # a space, as in some published names
        annotation, rows = make_document(name, list(DOMAINS)[k % len(DOMAINS)], "eval", questions, rng)
        first = len(layouts)
        for page, row in enumerate(rows):
            layouts.append({
                "doc_name": name, "layout_id": page, "page_id": page, "type": "text", "bbox": [0.0, 0.0, 140.0, 168.0],
                "page_size": [140.0, 168.0], "image_binary": None, "text": row["ocr_text"], "ocr_text": "",
                "vlm_text": "",
            })  # fmt: skip
        pages += rows
        annotations.append({
            "doc_name": name, "domain": annotation["domain"], "layout_indices": [first, len(layouts) - 1],
            "questions": [{key: asked[key] for key in QUESTION_KEYS} for asked in annotation["questions"]],
        })  # fmt: skip
    write_corpus(folder, annotations, pages)
    pq.write_table(pa.Table.from_pylist(layouts), folder / LAYOUTS)


def write_subset(folder: Path, subset: str, stem: str, documents: int, questions: int, rng: random.Random) -> None:
    """Write a training subset's two files as MMDocIR_Train_Dataset has them: no text, rows of a document apart.

    Each document of Wiki-SS is one page.
    """
    pages, lines = [], []
    for k in range(documents):
        name = f"{stem}-{k}"
        annotation, rows = make_document(name, next(iter(DOMAINS)), "train", questions, rng)
        alone = subset == "Wiki-SS"
        stands = [
            {"doc_name": f"{name}.{page}" if alone else name, "page_id": 0 if alone else page}
            for page in range(len(rows))
        ]
        pages += [
            {
                "file_name": stands[page]["doc_name"], "page": stands[page]["page_id"], "image": row["image_binary"],
                "page_size": [140.0, 168.0],
                "layouts": [{"type": "text", "bbox": [0.0, 0.0, 140.0, 168.0]}], "domain": subset,
            }
            for page, row in enumerate(rows)
        ]  # fmt: skip
        for number, asked in enumerate(annotation["questions"]):
            right = asked["page_id"]
            wrong = next(page for page in range(len(rows)) if page not in right)
            lines.append({
                "query_id": f"{name}-{number}", "query": asked["Q"],
                "positive_passages": [stands[page] for page in right],
                "negative_passages": [stands[wrong]],
            })  # fmt: skip
    rng.shuffle(pages)
    for part in ("parquet", "annotations_top1_negative"):
        (folder / part).mkdir(exist_ok=True)
    table = pa.Table.from_pylist(pages, TRAINING_PAGES)
    pq.write_table(table, folder / "parquet" / f"{stem}_filter.parquet", row_group_size=8)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "annotations_top1_negative" / f"{stem}_train.jsonl").write_text(text, encoding="utf-8")


def _snapshot(cache: Path, kind: str, name: str) -> Path:
    """Make a repository in the hub cache's layout and return the folder of its one revision."""
    repository = cache / f"{kind}--{name.replace('/', '--')}"
    revision = hashlib.sha1(name.encode()).hexdigest()
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    folder = repository / "snapshots" / revision
    folder.mkdir(parents=True)
    return folder
