"""MM-R5 Lab: study, teach and extend multimodal page reranking with reasoning (arXiv 2506.12364)."""
