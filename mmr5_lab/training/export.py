"""Export a trained model to a folder to keep or publish: merged weights for plain transformers, adapter, model card."""

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
from mmr5_lab.models.probe import PROBE

STAGES = {"02_sft": "SFT", "03_grpo": "SFT + RL"}  # notebook -> the name of its model in the tables of 05


def export_model(run: str | Path, out: str | Path, evaluation: str | Path | None = None) -> Path:
    """Write the model of a finished run of notebook 02 or 03 to the folder `out`, which must be new or empty.

    evaluation: the run of notebook 05 whose table goes into the card; None: the newest beside `run` that evaluated this
        model, if there is any

    Raises FileNotFoundError where the run is not finished, ValueError for a run of another notebook and for an `out`
    that is not empty.
    """
    run, out = Path(run), Path(out)
    outcome = results(run)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty: name a new folder, so that no file of another model stays in it")
    card = model_card(run, evaluation or _evaluation_of(run))
    ignore = shutil.ignore_patterns(PROBE, "*.bin")  # training_args.bin is a pickle
    shutil.copytree(outcome["model"], out, dirs_exist_ok=True, ignore=ignore)
    shutil.copytree(outcome["adapter"], out / "adapter", ignore=ignore)
    for folder in (out, out / "adapter"):
        (folder / "README.md").write_text(card, encoding="utf-8")
    return out


def model_card(run: str | Path, evaluation: str | Path | None = None) -> str:
    """Return the card of a run's model, in Markdown: data, parameters and results of each of its stages."""
    stages = list(_stages(Path(run)))
    notebook = stages[0][0]["notebook"]
    if notebook not in STAGES:
        raise ValueError(f"{run} is a run of {notebook}, which trains no model")
    base = next(outcome["base"] for manifest, outcome in reversed(stages) if manifest["notebook"] in STAGES)
    head = ModelCardData(
        base_model=base if not Path(base).exists() else None,
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["mm-r5", "reranking", "document-retrieval"],
    )
    parts = [
        f"---\n{head.to_yaml()}\n---\n",
        f"# Page reranker ({STAGES[notebook]})\n",
        "This model ranks page images by how well they answer a question: it reasons about each page, then writes"
        f" `<answer>[ids]</answer>`, best first. It was trained from `{base}` with MM-R5 Lab, after arXiv 2506.12364."
        " `AutoModelForImageTextToText` and `AutoProcessor` of transformers load this folder; `adapter/` holds the LoRA"
        " weights of the last stage alone.\n",
        "```python\nfrom mmr5_lab import Reranker\n\n"
        'reranker = Reranker.from_pretrained("this folder")\n'
        'reranker.rank("What was the revenue in 2015?", ["page1.png", "page2.png"])\n```\n',
    ]
    for manifest, outcome in reversed(stages):
        parts += [
            f"## {manifest['notebook']}\n",
            f"Run `{manifest['hash']}`, {manifest['started']}, prompts {manifest['prompts']}.\n",
            _table("Parameter", manifest["parameters"]),
            _table("Result", outcome),
        ]
    if evaluation is not None:
        table = pd.DataFrame.from_dict(results(evaluation)["table"], orient="index")
        parts += ["## Evaluation\n", f"Recall of `{STAGES[notebook]}` beside the others, from `{evaluation}`.\n"]
        parts.append(html_table(table.rename_axis("system"), digits=3))
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl", "peft"))
    parts.append(f"\nWritten with {packages}.\n")
    return "\n".join(parts)


def _stages(run: Path) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield manifest and results of a run and of those that it was made from, newest first."""
    manifest, outcome = json.loads((run / "manifest.json").read_text()), results(run)
    yield manifest, outcome
    if parent := outcome.get("sft_run") or outcome.get("data_run"):
        yield from _stages(Path(parent))


def _evaluation_of(run: Path) -> Path | None:
    """Return the newest run of 05 beside `run` that evaluated its model, or None."""
    model = results(run)["model"]
    done = sorted(run.parent.parent.glob("05_evaluation/*/results.json"), key=lambda path: -path.stat().st_mtime)
    for path in done:
        parameters = json.loads((path.parent / "manifest.json").read_text())["parameters"]
        inference = Path(parameters.get("INFERENCE_RUN") or "nowhere") / "results.json"
        if inference.is_file() and model in json.loads(inference.read_text())["models"].values():
            return path.parent
    return None


def _table(kind: str, values: Mapping[str, Any]) -> str:
    cells = [value if isinstance(value, float) else str(value) for value in values.values()]
    return html_table(pd.DataFrame({"value": cells}, index=pd.Index(list(values), name=kind)))
