"""docs/upstream.md lists every private name of other libraries that the package uses."""

import ast

from mmr5_lab.experiments.runs import project_root

NAMED_TUPLE = {"_replace", "_asdict", "_fields", "_make"}  # public, in spite of their underscore
PACKAGE = project_root() / "mmr5_lab"


def private_names() -> set[tuple[str, str]]:
    """Return (file, name) for each name with an underscore that is read from an object and defined nowhere here."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")}
    nodes = [(path, node) for path, tree in trees.items() for node in ast.walk(tree)]
    own = {node.name for _, node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
    own |= {node.attr for _, node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
    own |= {node.id for _, node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    read = [(path, node.attr) for path, node in nodes if isinstance(node, ast.Attribute)]
    read += [(path, name.name) for path, node in nodes if isinstance(node, ast.ImportFrom) for name in node.names]
    return {
        (path.relative_to(PACKAGE).as_posix(), name)
        for path, name in read
        if name.startswith("_") and not name.startswith("__") and name not in own | NAMED_TUPLE
    }


def test_every_private_name_is_listed_with_its_file():
    rows = (project_root() / "docs" / "upstream.md").read_text(encoding="utf-8").splitlines()
    used = private_names()
    assert ("models/memory.py", "_get_num_multimodal_tokens") in used
    missing = [
        f"{file}: {name}"
        for file, name in sorted(used)
        if not any(row.startswith(f"| `{file}`") and name in row for row in rows)
    ]
    assert missing == [], "add a row to docs/upstream.md, or do without"


def test_no_test_double_is_used_by_the_package():
    assert [path.name for path in PACKAGE.rglob("*.py") if "unittest" in path.read_text(encoding="utf-8")] == []
