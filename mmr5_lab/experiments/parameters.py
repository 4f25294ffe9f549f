"""The `parameters` cell of a notebook, and what may be given in its place: names, types, choices, ranges.

Everything that sets parameters (profiles, grids, papermill, JupyterLab) is checked here before any work starts.
"""

import ast
import json
import math
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

# Written out, so that a check does not import every room; a test compares them with what the rooms take.
CHOICES = {
    "METHOD": ("bm25", "clip", "e5-v", "dse", "gme", "colqwen", "dense"),
    "RETRIEVER": ("", "bm25", "clip", "e5-v", "dse", "gme", "colqwen", "dense"),
    "EXPORT": ("swift", "swift-reranker", "vlm-r1", "trl", "datasets"),
    "TRACKER": ("", "trackio", "tensorboard", "wandb", "mlflow"),
    "SFT_ADAPTER": ("merge", "continue"),
    "SELECTION": ("all", "balanced", "pass_rate"),
    "SCHEDULE": ("cosine", "linear", "constant", "constant_with_warmup"),
    "IMPORTANCE_SAMPLING_LEVEL": ("token", "sequence"),
    "REWARDS": ("strict", "ndcg", "released", "direct"),
    "LABELS": ("gold", "samples"),
    "CHANNEL": ("image", "text", "both"),
    "MODE": ("reason", "direct", "score", "pointwise"),
    "SYSTEMS": ("base", "SFT", "SFT + RL", "RL only"),
}
LEAST = {
    **dict.fromkeys(
        ("SEED", "SHUFFLES", "MAX_PIXELS", "MAX_QUESTIONS", "SHOWN", "PRICE_IN", "PRICE_OUT", "BUDGET", "WARMUP",
         "TEMPERATURE", "BETA", "LORA_DROPOUT", "WEIGHT_DECAY", "ADAM_BETA2", "WORKERS", "SAMPLE_TOP_K",
         "EPSILON_HIGH", "STOP_MARGIN", "MAX_PER_DOMAIN", "WINDOW", "PAD_TO"), 0),
    **dict.fromkeys(
        ("TOP_K", "NUM_CANDIDATES", "CANDIDATES", "MAX_TRACES", "CONCURRENCY", "MAX_WORDS", "BATCH_SIZE",
         "ACCUMULATION", "LORA_RANK", "LORA_ALPHA", "MAX_LENGTH", "SAVE_STEPS", "PROBES", "MAX_PROMPTS", "ITERATIONS",
         "MAX_COMPLETION", "MAX_NEW_TOKENS", "FRONTIER", "SAMPLES", "PROBED", "MAX_COMPLETIONS", "CORES", "SIZE"), 1),
    "GENERATIONS": 2,  # an advantage compares completions of one prompt
    "MAX_STEPS": -1,  # one pass over the prompts
}  # fmt: skip
POSITIVE = ("LEARNING_RATE", "LORAPLUS_RATIO", "EPOCHS", "TOP_ENTROPY")
SHARES = ("WARMUP", "TOP_ENTROPY", "LORA_DROPOUT", "ADAM_BETA2")  # at most 1


class NotebookError(ValueError):
    """Parameters that a notebook does not have, or values that it cannot take."""


def default_parameters(notebook: Path) -> dict[str, Any]:
    """Return names and default values of a notebook's `parameters` cell.

    Raises FileNotFoundError, or NotebookError for a default that is not a plain value.
    """
    if not notebook.is_file():
        raise FileNotFoundError(f"there is no notebook {notebook}")
    return dict(_defaults_at(notebook, notebook.stat().st_mtime_ns))


@lru_cache(maxsize=64)
def _defaults_at(notebook: Path, _changed: int) -> dict[str, Any]:
    cells = json.loads(notebook.read_bytes())["cells"]  # nbformat takes a second to import
    tagged = [cell["source"] for cell in cells if "parameters" in cell["metadata"].get("tags", ())]
    defaults = {}
    for node in ast.parse("".join("".join(source) + "\n" for source in tagged)).body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            try:
                defaults[ast.unparse(target)] = ast.literal_eval(node.value)
            except ValueError:
                shown = f"the default of {ast.unparse(target)}, {ast.unparse(node.value)},"
                raise NotebookError(f"{notebook.name}: {shown} is not a plain value") from None
    return defaults


def checked_parameters(notebook: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a notebook's defaults overridden by `values`.

    Raises NotebookError for a name that the notebook does not have, and as `checked_values` does.
    """
    defaults = default_parameters(notebook)
    if unknown := sorted(set(values) - set(defaults)):
        raise NotebookError(
            f"{notebook.name} has no parameter {', '.join(unknown)}; it has {', '.join(sorted(defaults))}"
        )
    return {**defaults, **checked_values(notebook, values)}


def checked_values(notebook: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values, whole numbers as floats where the default is one, so that 2 and 2.0 name the same run.

    Raises NotebookError for another type than the default's, an unknown choice, or a number out of its range.
    """
    defaults = default_parameters(notebook)
    checked = {}
    for name, value in values.items():
        default = defaults[name]
        try:
            checked[name] = _of_type(value, default)
            for part in checked[name] if isinstance(default, list) else [checked[name]]:
                _check_value(name, part)
        except NotebookError as error:
            raise NotebookError(f"{notebook.name}: {name} = {value!r} {error}") from None
    return checked


def _of_type(value: Any, default: Any) -> Any:
    if isinstance(default, float) and type(value) is int:
        return float(value)
    if type(value) is not type(default):
        advice = ""
        if isinstance(value, str) and isinstance(default, list):
            advice = f' (write a list, as YAML [{value.strip("[]")}]; papermill takes one by -y "NAME: [...]")'
        elif isinstance(value, str) and isinstance(default, float) and re.fullmatch(r"-?\d+e[+-]?\d+", value):
            advice = " (YAML takes 1e-3 for a text: write 1.0e-3)"
        raise NotebookError(f"is a {type(value).__name__}, expected {type(default).__name__}{advice}")
    if isinstance(default, list) and default:
        return [_of_type(part, default[0]) for part in value]
    return value


def _check_value(name: str, value: Any) -> None:
    if name in CHOICES and value not in CHOICES[name]:
        raise NotebookError(f"is not one of {', '.join(choice or repr(choice) for choice in CHOICES[name])}")
    if not isinstance(value, (int, float)):
        return
    if not math.isfinite(value):
        raise NotebookError("is not a finite number")
    if name in POSITIVE and value <= 0:
        raise NotebookError("must be above 0")
    if value < LEAST.get(name, value):
        raise NotebookError(f"must be at least {LEAST[name]}")
    if name in SHARES and value > 1:
        raise NotebookError("is a share: it must be at most 1")


def read_profile(path: Path) -> dict[str, dict[str, Any]]:
    """Read a profile file, notebook name -> parameters. Raises NotebookError where it is not that."""
    profile = read_yaml(path, "profile") or {}
    if not isinstance(profile, dict) or not all(isinstance(part, dict) for part in profile.values()):
        raise NotebookError(f"{path} must map notebook names to parameters")
    return profile


def read_yaml(path: Path, what: str) -> Any:
    """Read a YAML file. Raises NotebookError where it is missing, no YAML, or names something twice.

    what: for the message: "profile", "grid file"
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8-sig"), _UniqueKeys)
    except FileNotFoundError:
        raise NotebookError(f"there is no {what} {path}") from None
    except UnicodeDecodeError:
        raise NotebookError(f"{path} is not in UTF-8: save it as UTF-8") from None
    except yaml.YAMLError as error:
        raise NotebookError(f"{path} is not YAML: {error}") from None


class _UniqueKeys(yaml.SafeLoader):
    """Refuses what YAML itself takes in silence: a name that stands twice, of which the last would count."""

    def construct_mapping(self, node, deep=False):
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} stands twice", key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else "")
        return super().construct_mapping(node, deep)
