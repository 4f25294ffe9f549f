"""A tiny model and what to train it on."""

from dataclasses import dataclass
from pathlib import Path

TINY = {"hidden": 64, "layers": 1, "vision_hidden": 32, "vision_layers": 1}  # options of `build_model`


SFT = {"learning_rate": 1e-2, "epochs": 1, "batch_size": 2, "lora_rank": 4, "lora_alpha": 8, "save_steps": 2}


@dataclass(frozen=True)
class Material:
    """A tiny model's folder and what to train it on; can be sent to another process."""

    model: Path
    folder: Path  # with corpus/ and traces.jsonl

    @property
    def traces(self):
        from mmr5_lab.traces.construction import sft_dataset

        return sft_dataset(self.folder / "traces.jsonl")

    @property
    def prompts(self):
        from mmr5_lab.corpus.documents import load_corpus
        from mmr5_lab.retrieval.retrieve import retrieve
        from mmr5_lab.traces.construction import rl_dataset, training_candidates

        corpus = load_corpus(self.folder / "corpus").split("sft")
        return rl_dataset(corpus, training_candidates(corpus, retrieve(corpus, top_k=5), shuffles=0), seed=0)
