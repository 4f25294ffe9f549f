"""What a corpus's modules share: names of documents, pages and questions, what is a word, the error they raise."""

import difflib
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import quote, unquote


class CorpusError(ValueError):
    """A corpus file, document, question or page that cannot be used; the message names it."""


def page_id(doc_name: str, page: int) -> str:
    """Return a page's name in TREC files, without white space: page 3 of `my report.pdf` is `my%20report.pdf:3`."""
    return f"{quote(doc_name, safe='')}:{page}"


def parse_page_id(identifier: str) -> tuple[str, int]:
    """Return document name and 0-based page of an id made by `page_id`.

    Raises CorpusError if the id does not have that form.
    """
    doc_name, colon, page = identifier.rpartition(":")
    if not (doc_name and colon and page.isascii() and page.isdigit()):
        raise CorpusError(f"{identifier!r} is not a page id of the form DOCUMENT:PAGE")
    return unquote(doc_name), int(page)


def question_id(doc_name: str, number: int) -> str:
    """Return the name of a document's `number`-th question (from 0) in TREC files: `my%20report.pdf:q3`."""
    return f"{quote(doc_name, safe='')}:q{number}"


def name_key(name: str) -> str:
    """Return what all spellings of a document's name share: composed accents, no capitals, no `.pdf` at the end.

    File systems differ in all three: macOS takes names apart (é is e and an accent), Windows ignores capitals.
    """
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold()).removesuffix(".pdf")


def question_key(identifier: str) -> str:
    """Return what the ids of a question share, whatever the spelling of its document's name."""
    doc_name, _, number = identifier.rpartition(":")
    return f"{name_key(unquote(doc_name))}:{number}"


def corpora_named(names: str | Path, root: str | Path = "") -> list[str]:
    """Return the folders and published names in what `load_corpus` takes: one, or several joined by " + "."""
    return [str(names)] if (Path(root) / names).is_dir() else [name.strip() for name in str(names).split(" + ")]


def nearest(name: str, names: Iterable[str]) -> str:
    """Return a remark on the most similar of some names, to be added to a message; "" where none is similar."""
    similar = difflib.get_close_matches(name, list(names), n=1, cutoff=0.75)
    return f" (the nearest name is {similar[0]!r})" if similar else ""


def has_words(text: str) -> bool:
    """Return whether there is a letter or digit."""
    return re.search(r"\w", text) is not None
