"""What a run depends on: the code that its notebook can reach, and the files that its parameters name.

A run is found again by a hash of both (`runs.run_hash`). Hashing the whole package would be safe and wasteful: an edit
of the command line would train all models again. So code is followed from the notebook's own imports, and where it
cannot be followed for certain, the whole package counts.
"""

import ast
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[1]
WHOLE_FILE = 64 << 20  # bytes up to which a file is read to its end
SAMPLES, BLOCK = 256, 64 << 10  # of a larger one
NOT_WORK = frozenset({"parameters", "exercise", "solution"})  # tags of cells that change nothing of what a run makes
RUN_FOLDER = re.compile(r"(^|/)\w+/[0-9a-f]{12}(/|$)")  # <notebook>/<hash>: the hash says what is in there
DYNAMIC = {"import_module", "__import__", "exec", "eval", "run_module", "run_path", "spec_from_file_location"}

Import = tuple[str, bool]  # a module, and whether names are taken from it; if not, only what runs at import counts


class _UnknownImportsError(Exception):
    """Code that may import what its text does not name."""


def code_hash(notebook: Path) -> str:
    """Twelve hexadecimal digits of a notebook's code cells (but those of `NOT_WORK`) and of `reached(notebook)`."""
    stats = [(path, path.stat()) for path in _package_files()]
    return _code_hash_at(notebook, _code_cells(notebook), tuple((p, s.st_size, s.st_mtime_ns) for p, s in stats))


@lru_cache(maxsize=64)
def _code_hash_at(notebook: Path, cells: tuple[str, ...], _package: tuple) -> str:
    digest = hashlib.sha256("\0".join(cells).encode())
    for path in reached(notebook):
        digest.update(b"\0" + path.relative_to(PACKAGE).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def reached(notebook: Path) -> list[Path]:
    """The files of this package that a notebook's code can reach, sorted: imported by it, or by those, at any place.

    Files that are not Python count where a module that is reached has their name in its text, or no module has. All
    files count where the notebook does not exist (a run was opened from somewhere else), where a cell is not plain
    Python (`%matplotlib` apart), and where code that is reached imports or runs other code by a computed name.
    """
    files = _package_files()
    modules = {_module_name(path): path for path in files if path.suffix == ".py"}
    cells = _code_cells(notebook)
    found: set[Import] = set()
    try:
        waiting = set(_imports(_parsed("\n".join(cells)), "", True, modules))
        while waiting:
            found |= waiting
            waiting = {further for name, taken in waiting for further in _imports_of(name, taken, modules)} - found
    except (SyntaxError, _UnknownImportsError):
        return files
    if not cells:
        return files
    imported = {modules[name] for name, _ in found}
    texts = {path: path.read_text(encoding="utf-8") for path in modules.values()}

    def counts(path: Path) -> bool:
        naming = {module for module, text in texts.items() if path.name in text}
        return path in imported or (path.suffix != ".py" and (not naming or bool(naming & imported)))

    return [path for path in files if counts(path)]


def data_hashes(parameters: Mapping[str, Any], root: Path) -> dict[str, str]:
    """Hashes of the files and folders that parameters name: parameter -> twelve hexadecimal digits.

    root: what relative paths are relative to

    Runs are left out, since their paths hold a hash already. Of files above 64 MiB, size and 256 blocks spread over
    the file are read, which tells any two corpora or weights apart that were written anew.
    """
    named = {
        name: [value] if isinstance(value, str) else value
        for name, value in parameters.items()
        if isinstance(value, (str, list))
    }
    found = {}
    for name, values in named.items():
        paths = [root / v for v in values if isinstance(v, str) and v and not RUN_FOLDER.search(v)]
        if existing := [path for path in paths if path.exists()]:
            digest = hashlib.sha256()
            for path in existing:
                _add_content(digest, path)
            found[name] = digest.hexdigest()[:12]
    return found


def _package_files() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*")) if path.is_file() and "__pycache__" not in path.parts]


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


def _imports(tree: ast.Module, home: str, taken: bool, modules: Mapping[str, Path]) -> Iterator[Import]:
    """The package's modules that code imports, with the packages that they lie in.

    home: the package that relative imports start from
    taken: look into functions too
    """
    for node in _nodes(tree, taken):
        if isinstance(node, ast.Import):
            for alias in node.names:
                # "import a.b" binds a, of which any name can be taken then; "import a.b as x" binds b alone
                yield from _with_packages(alias.name, alias.asname is None, modules)
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                parts = home.split(".")
                source = ".".join([*parts[: len(parts) - node.level + 1], *filter(None, [source])])
            for alias in node.names:
                module = f"{source}.{alias.name}"
                if module in modules:
                    yield from _with_packages(module, False, modules)
                elif source == PACKAGE.name and alias.name in (homes := _homes(modules[source])):
                    yield source, False
                    yield from _with_packages(f"{source}.{homes[alias.name]}", False, modules)
                elif source in modules:
                    yield from _with_packages(source, False, modules)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            named = node.value if "." in node.value else f"{node.value}.__main__"
            if named in modules:  # as in [python, "-m", "mmr5_lab.cli"]
                yield from _with_packages(named, False, modules)
        elif getattr(node, "id", getattr(node, "attr", "")) in DYNAMIC and not _is_method(node):
            raise _UnknownImportsError


def _imports_of(name: str, taken: bool, modules: Mapping[str, Path]) -> Iterator[Import]:
    """What one module imports. The package itself imports by computed names, all of which its `HOMES` spells out."""
    if name == PACKAGE.name:
        for home in set(_homes(modules[name]).values()) if taken else ():
            yield from _with_packages(f"{name}.{home}", False, modules)
    else:
        yield from _imports(_parsed(modules[name].read_text(encoding="utf-8")), _home(name, modules), taken, modules)


def _homes(package: Path) -> dict[str, str]:
    """Name -> module of what the package itself gives, by computed imports that its `HOMES` spells out."""
    for node in _parsed(package.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "HOMES":
            return {name: module for module, names in ast.literal_eval(node.value).items() for name in names}
    return {}


def _nodes(tree: ast.AST, functions: bool) -> Iterator[ast.AST]:
    """All nodes, but for what only a type checker reads, and functions' bodies if `functions` is false."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            waiting += node.orelse
        elif functions or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            waiting += ast.iter_child_nodes(node)


def _is_method(node: ast.AST) -> bool:
    """`model.eval()` is no `eval()`."""
    return isinstance(node, ast.Attribute) and node.attr in ("eval", "exec")


def _with_packages(name: str, bound: bool, modules: Mapping[str, Path]) -> Iterator[Import]:
    parts = name.split(".")
    for k in range(1, len(parts) + 1):
        prefix = ".".join(parts[:k])
        if prefix in modules:
            yield prefix, bound or k == len(parts)


def _module_name(path: Path) -> str:
    parts = (PACKAGE.name, *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _home(name: str, modules: Mapping[str, Path]) -> str:
    return name if modules[name].name == "__init__.py" else name.rpartition(".")[0]


def _add_content(digest: Any, path: Path) -> None:
    for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
        stat = file.stat()
        name = file.relative_to(path).as_posix()
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
