"""BM25 over the words of pages."""

import bm25s
import numpy as np


def bm25_scores(texts: list[str], queries: list[str], stopwords: str | list[str] = "en") -> np.ndarray | None:
    r"""BM25 of each text for each query, shape (queries, texts); None if no text has a word.

    Words are `\w+`, lower case, without stemming; `stopwords` is a list of words to leave out, or "en" for
    bm25s's English list. Lucene's variant with k1 = 1.5, b = 0.75, as bm25s computes it
    (https://arxiv.org/abs/2407.03618): a word w of the query adds, with N texts of which n hold w,

        ln(1 + (N - n + .5) / (n + .5)) · tf / (tf + k1 · (1 - b + b · length / mean length))
    """
    words = content_words(texts, stopwords)
    if not any(words):
        return None  # bm25s cannot index this
    index = bm25s.BM25(k1=1.5, b=0.75, method="lucene")
    index.index(words, show_progress=False)
    scores = np.zeros((len(queries), len(texts)), dtype=np.float32)
    for row, query in zip(scores, content_words(queries, stopwords), strict=True):
        if query:
            row[:] = index.get_scores(query)
    return scores


def content_words(texts: list[str], stopwords: str | list[str] = "en") -> list[list[str]]:
    """The words of each text as BM25 counts them: lower case, without stop words."""
    return bm25s.tokenize(texts, token_pattern=r"\w+", stopwords=stopwords, return_ids=False, show_progress=False)
