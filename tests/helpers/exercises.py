"""What the checks of a notebook that was run have said."""

from pathlib import Path

import nbformat


def verdicts(path: Path) -> list[str]:
    """What the checks of an executed notebook said."""
    cells = nbformat.read(path, as_version=4).cells
    return [cell.outputs[0]["data"]["text/plain"] for cell in cells if cell.source.startswith("check(")]
