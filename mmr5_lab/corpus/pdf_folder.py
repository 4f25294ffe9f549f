"""The PDFs of a folder and of its subfolders, and what else lies there."""

import os
import re
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class FolderContents:
    """What a folder holds, by document name: the path from the folder, with "/" and composed accents.

    pdfs: name -> path; unusable: name -> why it cannot be read; others: names of files that are no PDFs
    """

    pdfs: dict[str, Path] = field(default_factory=dict)
    unusable: dict[str, str] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)


def list_pdfs(folder: Path, without: Path) -> FolderContents:
    """Return what a folder and its subfolders hold, sorted by name; hidden files and the folder `without` are left out.

    A file is a PDF if its name ends in .pdf, in any case, or has no ending and begins like one.
    """
    contents = FolderContents()
    visited = set()

    def not_listed(error: OSError) -> None:
        contents.unusable[_name(Path(error.filename), folder)] = f"it cannot be opened: {error.strerror}"

    for root, folders, files in os.walk(folder, followlinks=True, onerror=not_listed):
        if (real := os.path.realpath(root)) in visited or real == os.path.realpath(without):
            folders.clear()  # a link to a folder above would never end
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in sorted(Path(root) / name for name in files if not name.startswith(".")):
            name = _name(path, folder)
            if path.is_symlink() and not path.exists():
                contents.unusable[name] = f"it is a link to {os.readlink(path)!r}, which does not exist"
            elif not _looks_like_pdf(path):
                contents.others.append(name)
            elif not path.is_file():
                contents.unusable[name] = "it is not a regular file"
            elif name in contents.pdfs:
                contents.unusable[f"{name} (2)"] = "another file has this name, with its accents written otherwise"
            else:
                contents.pdfs[name] = path
    contents.pdfs = dict(sorted(contents.pdfs.items()))
    return contents


def _looks_like_pdf(path: Path) -> bool:
    if path.suffix.lower() == ".pdf":
        return True
    if re.search(r"\.[A-Za-z]\w*$", path.name) or not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            return file.read(5) == b"%PDF-"
    except OSError:
        return False


def _name(path: Path, folder: Path) -> str:
    # A name in another encoding would make a text that no file can hold.
    text = os.fsencode(path.relative_to(folder).as_posix()).decode("utf-8", "backslashreplace")
    return unicodedata.normalize("NFC", text)
