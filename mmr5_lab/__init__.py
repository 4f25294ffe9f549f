"""MM-R5 Lab: study, teach and extend multimodal page reranking with reasoning (arXiv 2506.12364)."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmr5_lab.rerank import QueryReranker

__all__ = ["QueryReranker"]


def __getattr__(name: str):
    # Importing the package must not load torch: `mmr5 --help` and the metrics do not need it.
    if name == "QueryReranker":
        from mmr5_lab.rerank import QueryReranker

        return QueryReranker
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
