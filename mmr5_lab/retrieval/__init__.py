"""First stage: BM25, page encoders, page vectors."""
