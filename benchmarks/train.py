"""Training as `mmr5_lab.training.stages` does it against plain trl with the same arguments.

    python benchmarks/train.py [--quick] [--busy] [--json OUT] [--model FOLDER]

SFT: traces of the miniature, two epochs. GRPO: 8 prompts × 8 completions a step, with a KL term. Baseline and ours
start from the same weights and seeds, so they must log the same losses; the difference is in what is computed twice:
pages (each epoch, each completion) and prompts (each completion); and, on a CPU, in what multiplies matrices
(`mmr5_lab.models.cpu_layers`). `--busy`: ours alone and beside two busy processes instead, where it takes one thread
(`mmr5_lab.models.threads`): two threads that wait for each other get on more slowly than one.
"""

import tempfile
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from common import Peak, Report, arguments, busy_processes, interleaved, model_folder
from transformers import AutoModelForImageTextToText, AutoProcessor, PrinterCallback
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from mmr5_lab.corpus.documents import load_corpus
from mmr5_lab.experiments.runs import project_root
from mmr5_lab.mini.teacher import EvidenceTeacher
from mmr5_lab.models.loading import load_model
from mmr5_lab.models.vision_cache import PageCache
from mmr5_lab.retrieval.retrieve import retrieve
from mmr5_lab.rewards import format_reward, rank_reward
from mmr5_lab.traces.construction import make_traces, rl_dataset, sft_dataset, training_candidates
from mmr5_lab.training.checkpoints import threads_fitted
from mmr5_lab.training.shared_prefix import SharedPrefixGRPOTrainer
from mmr5_lab.training.stages import lora

SAME = {
    "learning_rate": 1e-3, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
    "bf16": False, "gradient_checkpointing": False, "dataloader_pin_memory": False, "seed": 0,
}  # fmt: skip


def candidates_of(split: str):
    corpus = load_corpus(project_root() / "data/mini/corpus").split(split)
    return corpus, training_candidates(corpus, retrieve(corpus, top_k=5))


def trained(trainer, ours: bool) -> tuple[list[float], float, float]:
    """Losses of a run, the seconds that its steps took, and the process's peak memory meanwhile (MB)."""
    trainer.remove_callback(PrinterCallback)
    with Peak() as peak, threads_fitted(trainer) if ours else nullcontext():
        trainer.train()
    log = trainer.state.log_history
    return [row["loss"] for row in log if "loss" in row], log[-1]["train_runtime"], peak.megabytes


def load_plain(model: str) -> tuple[Any, Any]:
    return AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32), AutoProcessor.from_pretrained(model)


def load_ours(model: str) -> tuple[Any, Any]:
    loaded, processor = load_model(model)
    PageCache(loaded)
    return loaded, processor


def sft(model: str, data, folder: Path, ours: bool):
    loaded, processor = load_ours(model) if ours else load_plain(model)
    given = SFTConfig(
        output_dir=str(folder), per_device_train_batch_size=8, num_train_epochs=2, max_length=32_768, **SAME
    )
    trainer = SFTTrainer(
        loaded.train(), args=given, train_dataset=data, processing_class=processor, peft_config=lora(32, 64, 0.0)
    )
    return trained(trainer, ours)


def grpo(model: str, data, folder: Path, ours: bool, steps: int):
    loaded, processor = load_ours(model) if ours else load_plain(model)
    given = GRPOConfig(
        output_dir=str(folder), per_device_train_batch_size=32, gradient_accumulation_steps=2, num_generations=8,
        max_steps=steps, beta=0.04, max_completion_length=220, **SAME,
    )  # fmt: skip
    trainer: Any = (SharedPrefixGRPOTrainer if ours else GRPOTrainer)(
        loaded.train(), reward_funcs=[rank_reward, format_reward], args=given, train_dataset=data,
        processing_class=processor, peft_config=lora(16, 32, 0.0),
    )  # fmt: skip
    return trained(trainer, ours)


def report_on(report: Report, name: str, ways: dict, work: float, unit: str, rounds: int) -> None:
    """Only the steps' own seconds count, not loading and preparing the data."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    peaks: dict[str, float] = {}
    for _ in range(rounds):
        _, results = interleaved(ways, 1)
        for way, (_, took, peak) in results.items():
            seconds[way].append(took)
            peaks[way] = max(peak, peaks.get(way, 0.0))
        difference = max(abs(a - b) for a, b in zip(results["plain"][0], results["ours"][0], strict=True))
        assert difference < 1e-4, f"{name}: losses differ by {difference:g}"
    note = f"losses within {difference:.0e}; peak {peaks['plain']:.0f} MB, {peaks['ours']:.0f} MB"
    report.add(name, seconds["plain"], seconds["ours"], work, unit, note)


def beside_others(report: Report, name: str, ways: dict, work: float, unit: str, rounds: int) -> None:
    """As `report_on`, but ours beside busy processes against ours alone."""
    alone, beside = [], []
    for _ in range(rounds):
        alone.append(ways["ours"]()[1])
        with busy_processes():
            beside.append(ways["ours"]()[1])
    report.add(name, alone, beside, work, unit)


def main() -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)
    given = arguments(__doc__.split("\n")[0], busy=True)
    model, rounds = model_folder(given.model), 1 if given.quick else 3
    traces, steps = (32, 2) if given.quick else (96, 4)
    measure = beside_others if given.busy else report_on
    report = Report("Training beside two busy processes" if given.busy else "Training against plain trl")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus, chosen = candidates_of("sft")
        data = sft_dataset(make_traces(corpus, chosen[:traces], EvidenceTeacher(corpus), folder / "traces.jsonl"))
        base = str(project_root() / "data/mini/base")
        ways = {way: lambda way=way: sft(base, data, folder, way == "ours") for way in ("plain", "ours")}
        measure(report, "SFT, 2 epochs", ways, 2 * len(data), "samples/s", rounds)
        prompts = rl_dataset(*candidates_of("rl"))
        ways = {way: lambda way=way: grpo(model, prompts, folder, way == "ours", steps) for way in ("plain", "ours")}
        measure(report, "GRPO, 64 completions a step", ways, steps, "steps/s", rounds)
    report.finish(given.json)


if __name__ == "__main__":
    main()
