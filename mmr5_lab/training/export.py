"""A trained model as a folder to keep or publish: merged weights that plain transformers loads, adapter, model card."""

import json
import shutil
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
from huggingface_hub import ModelCardData

from mmr5_lab.files import results
from mmr5_lab.html import html_table
from mmr5_lab.training.adapters import PROBE

STAGES = {"02_sft": "SFT", "03_grpo": "SFT + RL"}  # notebook -> the name of its model in the tables of 05


def export_model(run: str | Path, out: str | Path, evaluation: str | Path | None = None) -> Path:
    """Write the model of a finished run of notebook 02 or 03 to the folder `out`, which must be new or empty.

    evaluation: the run of notebook 05 whose table goes into the card; None: one beside `run` that evaluated this model,
        if there is any

    Raises FileNotFoundError for a run that is not finished, ValueError for another notebook's and for a full `out`.
    """
    run, out = Path(run), Path(out)
    found = results(run)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty: name a new folder, so that no file of another model stays in it")
    card = model_card(run, evaluation or _evaluation_of(run))
    ignore = shutil.ignore_patterns(PROBE, "*.bin")  # training_args.bin is a pickle
    shutil.copytree(found["model"], out, dirs_exist_ok=True, ignore=ignore)
    shutil.copytree(found["adapter"], out / "adapter", ignore=ignore)
    for folder in (out, out / "adapter"):
        (folder / "README.md").write_text(card, encoding="utf-8")
    return out


def model_card(run: str | Path, evaluation: str | Path | None = None) -> str:
    """The card of a run's model, in Markdown: data, parameters and results of every stage that it went through."""
    stages = list(_stages(Path(run)))
    notebook = stages[0][0]["notebook"]
    if notebook not in STAGES:
        raise ValueError(f"{run} is a run of {notebook}, which trains no model")
    base = next(found["base"] for manifest, found in reversed(stages) if manifest["notebook"] in STAGES)
    head = ModelCardData(
        base_model=base if not Path(base).exists() else None,
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["mm-r5", "reranking", "document-retrieval"],
    )
    parts = [
        f"---\n{head.to_yaml()}\n---\n",
        f"# Page reranker ({STAGES[notebook]})\n",
        "Ranks page images by how well they answer a question: it thinks about each page, then writes"
        " `<answer>[ids]</answer>`, best first. Trained with MM-R5 Lab after arXiv 2506.12364 from"
        f" `{base}`. `AutoModelForImageTextToText` and `AutoProcessor` of transformers load this folder as it is;"
        " `adapter/` holds the last stage's LoRA weights alone.\n",
        "```python\nfrom mmr5_lab.reranking.local import Reranker\n\n"
        'reranker = Reranker.from_pretrained("this folder")\n'
        'reranker.rank("What was the revenue in 2015?", ["page1.png", "page2.png"])\n```\n',
    ]
    for manifest, found in reversed(stages):
        parts += [
            f"## {manifest['notebook']}\n",
            f"Run `{manifest['hash']}`, {manifest['started']}, prompts {manifest['prompts']}.\n",
            _table("Parameter", manifest["parameters"]),
            _table("Result", found),
        ]
    if evaluation is not None:
        table = pd.DataFrame.from_dict(results(evaluation)["table"], orient="index")
        parts += ["## Evaluation\n", f"Recall of `{STAGES[notebook]}` beside the others, from `{evaluation}`.\n"]
        parts.append(html_table(table.rename_axis("system"), digits=3))
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl", "peft"))
    parts.append(f"\nWritten with {packages}.\n")
    return "\n".join(parts)


def _stages(run: Path) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Manifest and results of a run and of those that it was made from, newest first."""
    manifest, found = json.loads((run / "manifest.json").read_text()), results(run)
    yield manifest, found
    if parent := found.get("sft_run") or found.get("data_run"):
        yield from _stages(Path(parent))


def _evaluation_of(run: Path) -> Path | None:
    """The newest run of 05 beside `run` that evaluated its model."""
    model = results(run)["model"]
    done = sorted(run.parent.parent.glob("05_evaluation/*/results.json"), key=lambda path: -path.stat().st_mtime)
    for path in done:
        parameters = json.loads((path.parent / "manifest.json").read_text())["parameters"]
        inference = Path(parameters.get("INFERENCE_RUN") or "nowhere") / "results.json"
        if inference.is_file() and model in json.loads(inference.read_text())["models"].values():
            return path.parent
    return None


def _table(kind: str, values: Mapping[str, Any]) -> str:
    told = [value if isinstance(value, float) else str(value) for value in values.values()]
    return html_table(pd.DataFrame({"value": told}, index=pd.Index(list(values), name=kind)))
