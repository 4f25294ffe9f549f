"""MM-R5 Lab: study, teach and extend multimodal page reranking with reasoning (arXiv 2506.12364).

Everything that notebooks and documents use is imported from here:

    from mmr5_lab import Reranker, evaluate, load_corpus

A name is loaded when it is first asked for, so importing the package loads neither PyTorch nor pandas.
"""

import importlib
import os
from typing import Any

# Read when PyTorch is loaded, so it stands before anything that loads it. Threads that spin while they wait for others
# make a small model ten times slower beside any other work on the machine (docs/log.md, 2026-11-26).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

HOMES = {  # module -> the names it gives; a module that gives its own name is meant itself
    "files": ["results"],
    "html": ["escape_html", "visible"],
    "corpus.ids": ["CorpusError"],
    "corpus.documents": ["load_corpus"],
    "corpus.ingest": ["build_corpus"],
    "corpus.rankings": ["Rankings", "read_trec", "write_trec"],
    "retrieval.encoders": ["load_encoder"],
    "retrieval.fusion": ["fuse"],
    "retrieval.retrieve": ["retrieve"],
    "prompting.prompts": ["build_messages"],
    "prompting.answers": ["parse_ranking"],
    "prompting.reasons": ["reasons_in_order"],
    "rewards": [
        "REWARD_SETS",
        "format_reward",
        "ndcg_reward",
        "rank_reward",
        "released_format_reward",
        "released_rank_reward",
    ],
    "models.memory": ["patch_grid"],
    "reranking.pages": ["TextPage"],
    "reranking.frameworks": ["ListwiseCrossEncoder", "MtebReranker", "export_cross_encoder"],
    "reranking.ranking": ["MODES"],
    "reranking.local": ["QueryReranker", "Reranker"],
    "reranking.remote": ["RemoteReranker"],
    "reranking.strategies": ["Consensus", "Windows"],
    "reranking.whole_runs": ["rerank_run", "sample_answers"],
    "traces.construction": [
        "make_traces",
        "read_traces",
        "rejected_path",
        "rl_dataset",
        "sft_dataset",
        "training_candidates",
        "within_quota",
    ],
    "traces.formats": ["export_traces", "import_traces"],
    "traces.quality": ["quality"],
    "traces.teachers": ["open_teacher"],
    "training.monitoring": ["monitoring"],
    "training.reward_lab": ["reward_lab"],
    "training.scorer": ["first_shares", "train_scorer"],
    "training.stages": ["train_grpo", "train_sft"],
    "evaluation.comparison": ["compare", "comparison"],
    "evaluation.errors": ["errors"],
    "evaluation.metrics": ["breakdown", "candidate_ceiling", "evaluate", "recall_at_k"],
    "evaluation.robustness": ["robustness"],
    "evaluation.tradeoffs": ["compare_modes"],
    "experiments.grids": ["grids"],
    "experiments.history": ["history"],
    "experiments.launch": ["corpus_of", "grpo_material"],
    "experiments.runs": ["RUN_OF_SYSTEM", "enter_project", "inside_project", "latest", "open_run"],
    "experiments.scheduler": ["scheduler"],
    "views.annotator": ["Annotator"],
    "views.live_view": ["LiveView"],
    "views.plots": ["plots"],
    "views.widgets": ["reasoning_browser", "trace_browser", "widgets"],
    "mini.teacher": ["evidence_teacher"],
}
_HOME = {name: module for module, names in HOMES.items() for name in names}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_HOME[name]}")
    # A few names are modules of their own: `from mmr5_lab import plots`.
    value = module if _HOME[name].endswith(f".{name}") and not hasattr(module, name) else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
