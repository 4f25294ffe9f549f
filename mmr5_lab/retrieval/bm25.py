"""BM25 over the words of pages, in any script."""

import os
import unicodedata

import numpy as np
import regex

# Where JAX is installed, bm25s starts it when it is imported, and JAX would take three quarters of a GPU's memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
import bm25s

# Scripts that do not separate words by spaces, and Korean, whose words take endings.
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}ー\p{Hangul}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_RUN = regex.compile(rf"(?P<unspaced>[{_UNSPACED}]+)|[^\W{_UNSPACED}]+")


def bm25_scores(texts: list[str], queries: list[str]) -> np.ndarray | None:
    r"""Return BM25 of each text for each query, shape (queries, texts); None if no text has a word.

    Lucene's variant with k1 = 1.5, b = 0.75, as bm25s computes it (https://arxiv.org/abs/2407.03618): a word w of the
    query (`content_words`) adds, with N texts of which n hold w,

        ln(1 + (N - n + .5) / (n + .5)) · tf / (tf + k1 · (1 - b + b · length / mean length))
    """
    words = content_words(texts)
    if not any(words):
        return None  # bm25s cannot index this
    index = bm25s.BM25(k1=1.5, b=0.75, method="lucene")
    index.index(words, show_progress=False)
    scores = np.zeros((len(queries), len(texts)), dtype=np.float32)
    for row, query in zip(scores, content_words(queries), strict=True):
        if query:
            row[:] = index.get_scores(query)
    return scores


def content_words(texts: list[str], stopwords: str | list[str] = "en") -> list[list[str]]:
    r"""Return the words of each text as BM25 counts them, lower case, in compatibility form (NFKC: "ﬁ" is "fi").

    Words are `\w+`, without stemming; where a script has no spaces between words, pairs of neighbouring characters.
    stopwords: words to leave out, or "en" for bm25s's English list
    """
    spaced = [" ".join(_words(unicodedata.normalize("NFKC", text).casefold())) for text in texts]
    options = {"token_pattern": r"\S+", "lower": False, "return_ids": False, "show_progress": False}
    return bm25s.tokenize(spaced, stopwords=stopwords, **options)


def _words(text: str) -> list[str]:
    words = []
    for run in _RUN.finditer(text):
        characters = run["unspaced"]
        if characters and len(characters) > 2:
            words += [characters[k : k + 2] for k in range(len(characters) - 1)]
        else:
            words.append(run[0])
    return words
