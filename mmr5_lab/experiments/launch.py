"""Train what notebook 02 or 03 trains, on several GPUs, into the run folder that the notebook will have.

    accelerate launch --config_file notebooks/accelerate/ddp.yaml -m mmr5_lab.experiments.launch 02_sft \
        --profile notebooks/profiles/paper.yaml --runs runs/paper

The notebook, run afterwards, finds the training done (docs/full_size.md).
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import datasets
from accelerate import PartialState

from mmr5_lab.corpus.documents import Corpus, load_corpus
from mmr5_lab.corpus.rankings import read_trec
from mmr5_lab.experiments.notebooks import chain_run
from mmr5_lab.experiments.runs import FOLDER, inside_project, open_run, project_root
from mmr5_lab.files import results
from mmr5_lab.models.loading import best_device
from mmr5_lab.traces.construction import rl_dataset, sft_dataset, training_candidates
from mmr5_lab.training.adapters import starting_point
from mmr5_lab.training.prompt_selection import select_prompts
from mmr5_lab.training.stages import train_grpo, train_sft

PROMPT_SPLIT = "rl"  # the documents of RL's prompts
# Parameters of notebooks 02 and 03 that say what is trained on, or what the notebook does besides training. All others
# are keyword arguments of `train_sft` and `train_grpo`, in capitals.
NOT_OF_TRAINING = {
    "DATA_RUN", "SFT_RUN", "MODEL", "SFT_ADAPTER", "NUM_CANDIDATES", "SELECTION", "MAX_PROMPTS", "PROBES",
    "REASONING", "RUN",
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Train what notebook 02 or 03 trains, in the run folder that the notebook will have. For `accelerate launch`."""
    parser = argparse.ArgumentParser(prog="accelerate launch -m mmr5_lab.experiments.launch", description=main.__doc__)
    parser.add_argument("notebook", choices=["02_sft", "03_grpo"])
    parser.add_argument("--profile", type=Path, required=True, metavar="FILE", help="parameters of every notebook")
    parser.add_argument("--runs", default="runs", metavar="FOLDER", help="where runs are kept (default: runs)")
    options = parser.parse_args(argv)
    try:
        parameters, folder = chain_run(options.notebook, options.profile, options.runs)
    except (ValueError, OSError) as error:  # an unknown parameter, a missing run
        print(f"mmr5_lab.experiments.launch: error: {error}", file=sys.stderr)
        return 2
    # Without `cpu` each of several processes on CPUs would train alone. The others wait while one merges, for hours.
    devices = PartialState(cpu=best_device() == "cpu", timeout=timedelta(hours=6))
    if devices.is_main_process:
        open_run(options.notebook, {**parameters, FOLDER: str(inside_project(folder))})
    devices.wait_for_everyone()
    settings = training_settings(parameters)
    if options.notebook == "02_sft":
        data = sft_dataset(Path(parameters["DATA_RUN"]) / "traces.jsonl", parameters["REASONING"])
        train_sft(parameters["MODEL"], data, folder, **settings)
    else:
        model, adapter, prompts = grpo_material(parameters, folder)
        train_grpo(model, prompts, folder, adapter=adapter, **settings)
    if devices.is_main_process:
        count = f"{devices.num_processes} processes ({devices.backend})" if devices.num_processes > 1 else "one process"
        print(f"{options.notebook} is trained, by {count}, in {inside_project(folder)}")
    return 0


def training_settings(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of `train_sft` or `train_grpo` among a notebook's parameters."""
    return {name.lower(): value for name, value in parameters.items() if name not in NOT_OF_TRAINING}


def corpus_of(data_run: str | Path) -> Corpus:
    """Return the corpus that a finished run of 01 was made from."""
    made = results(data_run)
    return load_corpus(made["corpus"], root=project_root(), pad_to=made.get("pad_to", 0))


def grpo_material(parameters: Mapping[str, Any], folder: Path) -> tuple[str, str | None, datasets.Dataset]:
    """Return what notebook 03 trains on: the model to start from, an adapter to continue or None, and the prompts."""
    model, adapter = parameters["MODEL"], None
    if not model:
        model, adapter = starting_point(parameters["SFT_RUN"], parameters["SFT_ADAPTER"])
    corpus = corpus_of(parameters["DATA_RUN"]).split(PROMPT_SPLIT)
    ranking = read_trec(Path(parameters["DATA_RUN"]) / f"{PROMPT_SPLIT}.trec", corpus)
    candidates = training_candidates(corpus, ranking, parameters["NUM_CANDIDATES"], shuffles=0)
    prompts = select_prompts(
        candidates, corpus, parameters["SELECTION"], parameters["MAX_PROMPTS"], folder, model, adapter=adapter,
        temperature=parameters["TEMPERATURE"], sample_top_k=parameters["SAMPLE_TOP_K"],
        max_completion=parameters["MAX_COMPLETION"], max_pixels=parameters["MAX_PIXELS"], seed=parameters["SEED"],
    )  # fmt: skip
    return model, adapter, rl_dataset(corpus, prompts, parameters["SEED"])


if __name__ == "__main__":
    sys.exit(main())
