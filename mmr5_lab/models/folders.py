"""Model and adapter folders: which folder is meant, and what is wrong with it, before transformers reads it."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

ADAPTER = "adapter_config.json"
LFS_POINTER = b"version https://git-lfs"
TOKENIZERS = ("tokenizer.json", "vocab.json", "tokenizer.model")
PROCESSORS = ("preprocessor_config.json", "processor_config.json")


def model_source(model: str | Path, weights: bool = True) -> str | Path:
    """Return where a model is loaded from: a checked folder, or a name on the Hugging Face hub as it is.

    The folder of a finished run of notebook 02 or 03 stands for its `model/`.
    weights: whether they are needed and checked

    Raises FileNotFoundError for a folder that is missing or incomplete, ValueError for an adapter and for damaged
    files; messages say what to do.
    """
    path = _local(model, "model", "config.json")
    if path is None:
        return model
    if not (path / "config.json").is_file():
        if (path / ADAPTER).is_file():
            base = _read_json(path / ADAPTER).get("base_model_name_or_path") or "its base"
            raise ValueError(
                f"{path} is a LoRA adapter, not a model: load {base} as the model and this folder as the adapter"
            )
        raise FileNotFoundError(f"{path} is not a model folder: config.json is missing")
    _check_files(path, "model" if weights else None)
    for what, names in (("tokenizer", TOKENIZERS), ("image processor", PROCESSORS)):
        if not any((path / name).is_file() for name in names):
            raise FileNotFoundError(
                f"{path} has no {what} ({' or '.join(names)}): copy the files of the model that it was trained from"
            )
    return path


def adapter_folder(adapter: str | Path) -> str | Path:
    """Return where an adapter is loaded from: a checked folder, or a name on the Hugging Face hub as it is.

    The folder of a finished run or of an export stands for its `adapter/`. Raises as `model_source`.
    """
    path = _local(adapter, "adapter", ADAPTER)
    if path is None:
        return adapter
    if not (path / ADAPTER).is_file():
        kind = "a model" if (path / "config.json").is_file() else "not an adapter folder"
        raise FileNotFoundError(f"{path} is {kind}: an adapter's {ADAPTER} is missing")
    _check_files(path, "adapter_model")
    return path


def _local(name: str | Path, part: str, config: str) -> Path | None:
    """Return the folder of a model or an adapter, `part` of it where it is that of a run or an export; None: a name."""
    path = Path(name).expanduser()
    if not path.exists():
        if str(name).startswith((".", "/", "~", "runs/", "data/")):
            raise FileNotFoundError(f"{part} folder {path} does not exist")
        return None
    if not path.is_dir():
        raise ValueError(f"{path} is a file: name the {part}'s folder, which holds {config}")
    if (path / config).is_file():
        return path
    if (path / part).is_dir() and ((path / "log.csv").is_file() or part == "adapter"):
        return path / part
    if (path / "checkpoints").is_dir() or (path / "manifest.json").is_file():
        raise FileNotFoundError(f"{path} is a run without a trained {part}: name a finished run of 02_sft or 03_grpo")
    return path


def _check_files(folder: Path, weights: str | None) -> None:
    """Raise FileNotFoundError for weights that are missing, ValueError for files that are damaged or cut short."""
    for path in sorted(folder.glob("*.json")):
        _read_json(path)
    if weights is None:
        return
    index = folder / f"{weights}.safetensors.index.json"
    names = set(_read_json(index)["weight_map"].values()) if index.is_file() else {f"{weights}.safetensors"}
    missing = sorted(name for name in names if not (folder / name).is_file())
    if missing and any(folder.glob("*.bin")):
        raise ValueError(
            f"{folder} holds its weights as pickles (.bin), which can run code: convert them to safetensors"
        )
    if missing:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}: download or copy the weights again")
    for name in sorted(names):
        try:
            with safe_open(folder / name, "pt"):  # compares the file's size with its header
                pass
        except SafetensorError as error:
            raise _damaged(folder / name, error) from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> ValueError:
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            return ValueError(
                f"{path} is a Git-LFS pointer, not the file itself: run `git lfs pull` in its repository, or download"
                " the model with `hf download`"
            )
    return ValueError(f"{path} is damaged or cut short ({error}): download or copy it again")
