"""What a run depends on: the code that its notebook can reach, and the files that its parameters name.

A run is found again by a hash of both (`runs.run_hash`). Hashing the whole package would be safe and wasteful: an edit
of the command line would train all models again. So code is followed from the notebook's own imports.
"""

import ast
import hashlib
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from mmr5_lab.corpus.ids import corpora_named

PACKAGE = Path(__file__).parents[1]
WHOLE_FILE = 64 << 20  # bytes up to which a file is read to its end
SAMPLES, BLOCK = 256, 64 << 10  # of a larger one
NOT_WORK = frozenset({"parameters", "exercise", "solution"})  # tags of cells that change nothing of what a run makes
DYNAMIC = frozenset({"import_module", "__import__", "exec", "run_module", "run_path"})  # may import anything
VECTORS = "vectors/"  # in a corpus's folder, made from it by the first run that needs them (`retrieval.dense`)
RUN_FOLDER = re.compile(r"(^|/)\w+/[0-9a-f]{12}(/|$)")  # <notebook>/<hash>: the hash says what is in there


def code_hash(notebook: Path) -> str:
    """Return twelve hexadecimal digits of a notebook's code cells (but for `NOT_WORK`) and of `reached(notebook)`."""
    stats = [(path, path.stat()) for path in _package_files()]
    return _code_hash_at(notebook, _code_cells(notebook), tuple((p, s.st_size, s.st_mtime_ns) for p, s in stats))


@lru_cache(maxsize=64)
def _code_hash_at(notebook: Path, cells: tuple[str, ...], _package: tuple) -> str:
    digest = hashlib.sha256("\0".join(cells).encode())
    for path in reached(notebook):
        digest.update(b"\0" + path.relative_to(PACKAGE).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def reached(notebook: Path) -> list[Path]:
    """Return the files of this package that a notebook's code can reach, sorted: imported by it or by those, anywhere.

    Names of the package itself are followed to their homes; its own file, which only tells those, does not count. Files
    that are not Python count with the modules beside them. All files count where the notebook does not exist (a run
    was opened from somewhere else), where a cell is not plain Python (`%matplotlib` apart), and where code takes the
    package as a whole (`import mmr5_lab`) or imports computed names.
    """
    files = _package_files()
    modules = {_module_name(path): path for path in files if path.suffix == ".py"}
    homes = _homes(modules[PACKAGE.name])
    cells = _code_cells(notebook)
    try:
        waiting = _imports("\n".join(cells), modules, homes)
    except SyntaxError:
        return files
    found: set[str] = set()
    while waiting:
        found |= waiting
        texts = [modules[name].read_text(encoding="utf-8") for name in waiting]
        waiting = {name for text in texts for name in _imports(text, modules, homes)} - found
    if not cells or PACKAGE.name in found:
        return files
    folders = {modules[name].parent for name in found}
    return [p for p in files if (_module_name(p) in found if p.suffix == ".py" else p.parent in folders)]


def data_hashes(parameters: Mapping[str, Any], root: Path) -> dict[str, str]:
    """Return hashes of the files and folders that parameters name: parameter -> twelve hexadecimal digits.

    root: what relative paths are relative to

    Runs are left out, since their paths hold a hash already. Of names on the hub it is the revision that the cache has
    (`cache_revisions` asks for it). Of files above 64 MiB, size and 256 blocks spread over
    the file are read, which tells any two corpora or weights apart that were written anew.
    """
    named = {
        name: value if isinstance(value, list) else corpora_named(value, root) if name == "CORPUS" else [value]
        for name, value in parameters.items()
        if isinstance(value, (str, list))
    }
    hashes: dict[str, str] = {}
    for name, values in named.items():
        paths = [root / v for v in values if isinstance(v, str) and v and not RUN_FOLDER.search(v)]
        if existing := [path for path in paths if path.exists()]:
            digest = hashlib.sha256()
            for path in existing:
                _add_content(digest, path)
            hashes[name] = digest.hexdigest()[:12]
    for name, *repository in _on_hub(parameters, root):
        if revision := _revision(*repository):
            hashes[name] = f"{hashes[name]}+{revision}" if name in hashes else revision
    return hashes


def cache_revisions(parameters: Mapping[str, Any], root: Path) -> None:
    """Let the hub's cache have a revision of what parameters name there, as far as the hub can be reached.

    Otherwise a run's hash would change when the run itself downloads them.
    """
    from huggingface_hub import snapshot_download

    for _, kind, name in _on_hub(parameters, root):
        if not _revision(kind, name):
            with suppress(OSError, ValueError, RuntimeError):
                snapshot_download(name, repo_type=kind, allow_patterns=["config.json"])


def _on_hub(parameters: Mapping[str, Any], root: Path) -> Iterator[tuple[str, str, str]]:
    """Yield each parameter that names a repository with its kind ("dataset" or "model") and name."""
    for name in ("CORPUS", "MODEL", "BASE", "ENCODER"):
        value = parameters.get(name)
        if not isinstance(value, str) or not value or (root / value).exists():
            continue
        if name != "CORPUS" and re.fullmatch(r"[\w.-]+/[\w.-]+", value):
            yield name, "model", value
        elif name == "CORPUS" and "mmdocir" in value:
            from mmr5_lab.corpus.mmdocir import REPOSITORIES  # loads pandas

            names = [c for c in corpora_named(value, root) if not (root / c).is_dir()]
            yield from ((name, "dataset", REPOSITORIES[c]) for c in names if c in REPOSITORIES)


def _revision(kind: str, name: str) -> str:
    """Return the commit that the hub's cache has of a repository, 40 hexadecimal digits, or ""."""
    from huggingface_hub.constants import HF_HUB_CACHE

    with suppress(OSError):
        return (Path(HF_HUB_CACHE) / f"{kind}s--{name.replace('/', '--')}" / "refs" / "main").read_text().strip()
    return ""


def _package_files() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*")) if path.is_file() and "__pycache__" not in path.parts]


def _module_name(path: Path) -> str:
    parts = (PACKAGE.name, *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _code_cells(notebook: Path) -> tuple[str, ...]:
    """A notebook's code without its parameters and exercises; () where there is no such notebook."""
    try:
        changed = notebook.stat().st_mtime_ns
    except OSError:
        return ()
    return _cells_at(notebook, changed)


@lru_cache(maxsize=64)
def _cells_at(notebook: Path, _changed: int) -> tuple[str, ...]:
    cells = json.loads(notebook.read_bytes())["cells"]  # nbformat takes a second to import
    return tuple(
        "".join(cell["source"])  # a text, or its lines
        for cell in cells
        if cell["cell_type"] == "code" and NOT_WORK.isdisjoint(cell["metadata"].get("tags", ()))
    )


@lru_cache(maxsize=256)
def _parsed(source: str) -> ast.Module:
    return ast.parse(re.sub(r"(?m)^%matplotlib\b.*$", "", source))


def _imports(source: str, modules: Collection[str], homes: Mapping[str, str]) -> set[str]:
    """The package's modules that code imports, at any place, or starts ("python -m …"), with the rooms they lie in.

    The package itself is among them where code takes it as a whole.
    """
    names = set()
    for node in _nodes(_parsed(source)):
        if isinstance(node, ast.Import):
            # "import a.b" binds a, of which any name can be taken then; "import a.b as x" binds b alone
            names |= {alias.name if alias.asname else alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.module == PACKAGE.name:
                taken = [homes.get(alias.name, alias.name).replace("*", "") for alias in node.names]
                names |= {f"{PACKAGE.name}.{name}".rstrip(".") for name in taken}
            else:
                names |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "." in node.value:
            names.add(node.value)
        elif getattr(node, "id", getattr(node, "attr", "")) in DYNAMIC:
            names.add(PACKAGE.name)
    found = names & set(modules)
    return found | {name.rpartition(".")[0] for name in found if name.count(".") > 1}


def _homes(door: Path) -> dict[str, str]:
    """Name -> module of what the package itself gives, as its `HOMES` spell it out."""
    for node in _parsed(door.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "HOMES":
            return {name: module for module, names in ast.literal_eval(node.value).items() for name in names}
    return {}


def _nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those that only a type checker reads."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            waiting += node.orelse
        else:
            waiting += ast.iter_child_nodes(node)


def _add_content(digest: Any, path: Path) -> None:
    for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
        name = file.relative_to(path).as_posix()
        if name.startswith(VECTORS):
            continue
        stat = file.stat()
        digest.update(f"{name}\0{_content_at(file, stat.st_size, stat.st_mtime_ns)}\0".encode())


@lru_cache(maxsize=4096)
def _content_at(file: Path, size: int, _changed: int) -> str:
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as content:
        for start in _starts(size):
            content.seek(start)
            digest.update(content.read(BLOCK if size > WHOLE_FILE else size))
    return digest.hexdigest()


def _starts(size: int) -> Iterable[int]:
    return [k * (size - BLOCK) // (SAMPLES - 1) for k in range(SAMPLES)] if size > WHOLE_FILE else [0]
