"""The tables and figures of docs/study.md, from the runs of its sweeps.

    mmr5 sweep notebooks/sweeps/study.yaml       # and rewards.yaml, refined.yaml, ten_candidates.yaml
    python benchmarks/study.py [--runs FOLDER] [--figures FOLDER]

It reads every finished run of 04_inference under the folder on the study's corpus, one system and seed each.
A system's name lists the settings in which its lineage differs from the main study. Seeds are averaged question by
question.
"""

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

import pandas as pd

from mmr5_lab.corpus.documents import load_corpus
from mmr5_lab.corpus.rankings import read_trec
from mmr5_lab.evaluation.comparison import compare
from mmr5_lab.evaluation.gold_ranks import PagesByQuestion
from mmr5_lab.evaluation.metrics import evaluate
from mmr5_lab.experiments.history import parents_of, read_runs, settings_of
from mmr5_lab.files import results
from mmr5_lab.views import plots

CORPUS = "data/mini/corpus"
USUAL = {  # settings of the main study; a system's name lists those of its runs that differ
    "04_inference.MODE": "reason", "04_inference.NUM_CANDIDATES": 5, "04_inference.TEMPERATURE": 0.3,
    "03_grpo.REWARDS": "strict", "01_data_construction.REFINED": False, "02_sft.EPOCHS": 0.6, "02_sft.REASONING": True,
    "03_grpo.MAX_STEPS": 60, "01_data_construction.SHUFFLES": 4,
}  # fmt: skip
SHOWN = ["seeds", "macro R@1", "micro R@1", "micro R@3", "micro R@5", "sd", "low", "high", "valid"]


def name_of(system: str, settings: dict[str, Any]) -> str:
    other = [
        f"{key.partition('.')[2].lower()} {settings[key]}"
        for key, usual in USUAL.items()
        if key in settings and settings[key] != usual
    ]
    return ", ".join([system, *other])


def collected(root: Path):
    """Return the rankings of each system, a list of its seeds; its shares of valid answers; and the corpus."""
    runs: dict[str, dict[int, PagesByQuestion]] = defaultdict(dict)
    valid: dict[str, list[float]] = defaultdict(list)
    corpus: Any = None
    for record in read_runs(root, "04_inference"):
        settings, parameters = settings_of(record), record.manifest["parameters"]
        if not record.done or parameters["CORPUS"] != CORPUS:  # the tables' runs rank longer documents
            continue
        corpus = corpus or load_corpus(CORPUS).split(parameters["SPLIT"])
        for system, share in results(record.folder)["valid"].items():
            name = name_of(system, settings)
            seed = settings.get("03_grpo.SEED", settings.get("02_sft.SEED", 0))
            runs[name][seed] = read_trec(record.folder / f"{system}.trec", corpus).pages
            valid[name].append(share)
        first = read_trec(parents_of(record)["DATA_RUN"] / f"{parameters['SPLIT']}.trec", corpus).pages
        shown = parameters["NUM_CANDIDATES"]
        name = name_of("BM25", {"04_inference.NUM_CANDIDATES": shown})
        runs[name][0] = {question: pages[:shown] for question, pages in first.items()}
    return {name: list(seeds.values()) for name, seeds in runs.items()}, valid, corpus


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=Path, default=Path("runs"), metavar="FOLDER", help="default: runs")
    parser.add_argument("--figures", type=Path, metavar="FOLDER", help="also draw the seeds of each system")
    arguments = parser.parse_args()
    runs, valid, corpus = collected(arguments.runs)
    table = compare(runs, corpus, baseline="BM25")
    table["valid"] = pd.Series({name: sum(shares) / len(shares) for name, shares in valid.items()})
    print(table[SHOWN].round(3).to_string(), "\n")
    tests = [
        (a, b)
        for a, b in [("SFT", "BM25"), ("SFT + RL", "BM25"), ("SFT + RL", "SFT"), ("SFT + RL", "RL only")]
        + [(name, name.split(",")[0]) for name in sorted(runs) if name.startswith(("SFT,", "SFT + RL,"))]
        + [(name, "BM25") for name in sorted(runs) if name.startswith(("SFT,", "SFT + RL,"))]
        if a in runs and b in runs
    ]
    rows = [compare({b: runs[b], a: runs[a]}, corpus, baseline=b).loc[a] for a, b in tests]
    columns = ["difference", "difference low", "difference high", "p"]
    differences = pd.DataFrame(rows)[columns].set_axis([f"{a} against {b}" for a, b in tests])
    print(differences.round(4).to_string())
    print(table.attrs["note"])
    if arguments.figures:
        seeds = {
            name: [evaluate(run, corpus).loc["micro", "R@1"] for run in each]
            for name, each in runs.items()
            if len(each) > 1
        }
        arguments.figures.mkdir(parents=True, exist_ok=True)
        main = {name: each for name, each in seeds.items() if "," not in name}
        plots.seed_spread(main).savefig(arguments.figures / "study_seeds.png", dpi=150)
        plots.seed_spread(dict(sorted(seeds.items()))).savefig(arguments.figures / "study_ablations.png", dpi=150)


if __name__ == "__main__":
    main()
