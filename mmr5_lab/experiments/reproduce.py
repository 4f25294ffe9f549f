"""The paper's tables at full size: what a run will take, what stands in its way, and the run itself.

    mmr5 reproduce released --dry-run      # GB, hours, calls and money, and what is there already
    mmr5 reproduce released                # checks first, then the notebooks, then the tables

Each target is a profile of the notebooks. `released` and `baselines` run notebooks 04 and 05 once for each row of the
paper's tables; `paper`, `recommended` and `small` are the whole chain. Figures are estimates (`data/full_size.yaml`).
"""

import importlib.metadata
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from transformers.utils import is_bitsandbytes_available, is_flash_attn_2_available
from transformers.utils.versions import require_version

from mmr5_lab.corpus.documents import Corpus, load_corpus
from mmr5_lab.corpus.mmdocir import ALL, EVALUATION, TRAINING, fetch
from mmr5_lab.corpus.rankings import Rankings, write_trec
from mmr5_lab.evaluation.paper_tables import RERANKERS, as_text, find_runs, paper_tables, run_name
from mmr5_lab.experiments.chain import run_demo
from mmr5_lab.experiments.notebooks import chain_run, is_done, run_folder, run_notebook
from mmr5_lab.experiments.parameters import checked_parameters, read_profile
from mmr5_lab.experiments.runs import CHAIN, parents, project_root, source_of
from mmr5_lab.models.chat import Chat
from mmr5_lab.models.memory import BANDWIDTH, LATENCY, OPERATIONS
from mmr5_lab.retrieval.encoders import ENCODERS

TARGETS = ("released", "baselines", "paper", "recommended", "small")
RETRIEVERS = ("CLIP", "E5-V", "DSE", "GME", "ColQwen")
PAPERS_BASE = "Qwen/Qwen2.5-VL-7B-Instruct"
TRAINED = {"base": "Qwen2.5-VL-7B-cot", "SFT": "Qwen2.5-VL-7B-sft", "SFT + RL": "MM-R5"}  # system of 04 -> its row
GB, GIB = 10**9, 1 << 30
PAGE_TOKENS = 1218  # an A4 page within 1,003,520 pixels
WORDS_A_PAGE = 62  # tokens that are written about a page (docs/log.md)
TEACHER_TOKENS = (1225, 60)  # of a call: a page in high detail with its prompt, and 40 words
READ_BYTES, CACHE_BYTES = 200_000, 57_344  # 7B, a token: while a prompt is read, and of its keys and values alone

ENCODED_BY = {name: method for method, (_, name, _) in ENCODERS.items()}  # model -> its retrieval method

Row = tuple[str, str, dict[str, Any]]  # first stage, method, parameters of notebook 04


def reproduce(
    target: str, root: str = "runs", dry_run: bool = False, profile: str | None = None, max_questions: int | None = None
) -> str:
    """Run a target, or with `dry_run` say what that will take; return a text: the tables, or the plan.

    profile: a file in the place of the target's own; max_questions: of each row of the tables (None: all)

    Raises ValueError with all that stands in the way, each with its remedy, before anything is computed.
    """
    if target not in TARGETS:
        raise ValueError(f"there is no target {target!r}: choose one of {', '.join(TARGETS)}")
    path = Path(profile) if profile else project_root() / f"notebooks/profiles/{target}.yaml"
    parameters = {name: checked_parameters(source_of(name), values) for name, values in read_profile(path).items()}
    if max_questions and target not in ("released", "baselines"):
        raise ValueError(f"{target} trains, too: set MAX_QUESTIONS in a copy of {path} and name that as the profile")
    if max_questions:
        parameters["04_inference"] |= {"MAX_QUESTIONS": max_questions}
    plan = Plan(target, parameters, root)
    if dry_run:
        return str(plan)
    if problems := plan.problems():
        raise ValueError(f"{target} cannot start yet:" + "".join(f"\n- {problem}" for problem in problems))
    plan.download()
    folder = project_root() / root / "reproduce" / target
    folder.mkdir(parents=True, exist_ok=True)
    corpus = load_corpus(parameters["04_inference"]["CORPUS"])
    questions: list[str] = []
    if not plan.rows:
        run_demo(path, root)
        inference = chain_run("04_inference", path, root)[1]
        retriever = _stage(parameters["04_inference"])
        for system, method in trained_rows(parameters["04_inference"]["BASE"]).items():
            questions = _write_rankings(inference, corpus, folder, retriever, method, system)
    for number, (first_stage, method, values) in enumerate(plan.rows, 1):
        print(f"[{number}/{len(plan.rows)}] {first_stage} + {method}", flush=True)
        inference = run_notebook("04_inference", values, root)
        run_notebook("05_evaluation", parameters["05_evaluation"] | {"INFERENCE_RUN": str(inference)}, root)
        questions = _write_rankings(inference, corpus, folder, first_stage, method)
    corpus = corpus.with_questions(questions)
    return as_text(paper_tables(find_runs([folder]), corpus), corpus)


def trained_rows(base: str) -> dict[str, str]:
    """Return the rows of the systems that a chain trains: the paper's for its base model, else named after `base`."""
    name = Path(base).name
    ours = {"base": f"{name}-cot", "SFT": f"{name}-sft", "SFT + RL": f"{name}-sft-rl"}
    return TRAINED if base == PAPERS_BASE else ours


def _write_rankings(
    inference: Path, corpus: Corpus, folder: Path, first_stage: str, method: str, system: str = "base"
) -> list[str]:
    """Write the rankings of a system of a run of 04 and of its retriever, named as their rows; return the questions."""
    frame = pd.read_parquet(inference / f"{system}.generations.parquet")
    questions = frame["question_id"].tolist()
    for name, column in ((run_name(first_stage), "candidates"), (run_name(first_stage, method), "pages")):
        pages = dict(zip(questions, frame[column].map(list), strict=True))
        write_trec(Rankings(pages), corpus, folder / f"{name}.trec", tag="mmr5")
    return questions


class Plan:
    """What a target downloads, computes, asks of a teacher and writes; `str` of it is the dry run."""

    def __init__(self, target: str, parameters: Mapping[str, dict[str, Any]], root: str):
        self.target, self.parameters, self.root = target, parameters, root
        self.table = yaml.safe_load((project_root() / "data/full_size.yaml").read_text(encoding="utf-8"))
        self.rows = _rows(target, parameters["04_inference"])
        self.questions = parameters["04_inference"]["MAX_QUESTIONS"] or self.table["questions"]
        self.sources = self._sources()
        self.cached = {name: _cached_bytes(name) for name in self.sources}
        self.stages = self._stages()

    def _sources(self) -> list[str]:
        rows = [values for _, _, values in self.rows] or [self.parameters["04_inference"]]
        models = [name for row in rows for name, method in ENCODED_BY.items() if row["RETRIEVER"] == method]
        training = [] if self.rows else [TRAINING]
        return list(dict.fromkeys([EVALUATION, *training, *models, *(row["BASE"] for row in rows)]))

    def _stages(self) -> pd.DataFrame:
        """Return one row a stage: GiB on a GPU, hours on one GPU (and on four, where that was planned)."""
        stages: dict[str, tuple[float, ...]] = {}
        pages = self.table["pages"]["mmdocir"] if self.rows else sum(self.table["pages"].values())
        pages = min(pages, 65 * self.questions) if self.rows else pages  # 65 pages a document
        for name in self.sources:
            size = self.table["GB"].get(name, 0.0)
            if name in ENCODED_BY:
                seconds = 2 * (size * GB / 2) * PAGE_TOKENS / OPERATIONS + 0.05  # and a twentieth to read a page
                stages[f"encode pages, {name}"] = (size * GB / GIB + 2, pages * seconds / 3600)
        stages |= {} if self.rows else {stage: tuple(row) for stage, row in self.table["training"][self.target].items()}
        settings = self.parameters["04_inference"]
        for first_stage, method, values in self.rows or [(_stage(settings), "base, SFT, SFT + RL", settings)]:
            gib, hours = self._inference(values)
            stages[f"rerank, {first_stage} + {method}"] = (gib, hours * (1 if self.rows else len(TRAINED)))
        columns = ["GiB a GPU", "hours, 1 GPU", "hours, 4 GPUs"][: max(map(len, stages.values()))]
        return pd.DataFrame({name: dict(zip(columns, figures, strict=False)) for name, figures in stages.items()}).T

    def _inference(self, values: Mapping[str, Any]) -> tuple[float, float]:
        """Return GiB and hours of one run of notebook 04: prompts are bound by operations, writing as when sampling."""
        weights = self.table["GB"].get(values["BASE"], 16.6) * GB
        batch, pages = values["BATCH_SIZE"], values["NUM_CANDIDATES"]
        prompt = batch * pages * PAGE_TOKENS
        written = pages * WORDS_A_PAGE if values["MODE"] == "reason" else pages
        reading = 2 * (weights / 2) * prompt * 1.4 / OPERATIONS  # .4: the vision tower
        layers = self.table["layers"].get(values["BASE"], 28)
        seconds = reading + written * max(weights * 1.2 / BANDWIDTH, LATENCY * layers)  # .2: keys and values
        held = prompt * READ_BYTES + batch * values["MAX_NEW_TOKENS"] * CACHE_BYTES
        return weights * (1 + held / (16.6 * GB)) / GIB, self.questions / batch * seconds / 3600

    def teacher(self) -> tuple[int, float, float, float]:
        """Return the calls of the teacher at most, millions of tokens read and written, and their price."""
        values = self.parameters.get("01_data_construction", {})
        if not values.get("TEACHER_SERVER"):
            return 0, 0.0, 0.0, 0.0
        calls = values["MAX_TRACES"] * (values["NUM_CANDIDATES"] + values["REFINED"])
        read, written = (calls * tokens / 1e6 for tokens in TEACHER_TOKENS)
        return calls, read, written, read * values["PRICE_IN"] + written * values["PRICE_OUT"]

    def written_gb(self) -> float:
        """Return the GB that a run writes: page vectors, texts and, where it trains, traces and two merged models."""
        vectors = {values["RETRIEVER"] for _, _, values in self.rows} or {"colqwen"}
        pages = self.table["pages"]["mmdocir"] if self.rows else sum(self.table["pages"].values())
        size = sum(pages * (2e5 if method == "colqwen" else 4e3) for method in vectors)  # 2e5: docs/guide.md, 4 GB
        return (size + len(self.rows) * 1e7) / GB + (0 if self.rows else 2 * 16.6 + 5 + 7)

    def finished(self) -> str:
        """Say which runs are finished in the run folder."""
        if self.rows:
            done = sum(is_done(run_folder("04_inference", values, self.root)) for _, _, values in self.rows)
            return f"{done} of {len(self.rows)} rows"
        folders: dict[str, Path] = {}
        for name in CHAIN:
            taken = {parameter: str(folders[parent]) for parent, parameter in parents(source_of(name)).items()}
            folder = run_folder(name, self.parameters[name] | taken, self.root)
            if not is_done(folder):
                break
            folders[name] = folder
        return f"{len(folders)} of {len(CHAIN)} notebooks"

    def problems(self) -> list[str]:
        """Return what stands in the way, each with its remedy; nothing is loaded or paid for."""
        found = []
        missing = sum(self.table["GB"].get(name, 0.0) for name, size in self.cached.items() if not size)
        for place, needed in ((_hub_cache(), missing), (project_root(), self.written_gb())):
            free = shutil.disk_usage(next(p for p in (place, *place.parents) if p.exists())).free / GB
            if free < needed and not self._small():
                found.append(f"{place} has {free:.0f} GB free of {needed:.0f} needed: free some, or set HF_HUB_CACHE")
        found += [problem for name, size in self.cached.items() if not size for problem in _hub_problems(name)]
        for name, source in (("mmdocir", EVALUATION), ("mmdocir-train", TRAINING)):
            if self.cached.get(source):
                try:
                    load_corpus(name)  # says which file or column is missing
                except ValueError as error:
                    found.append(f"{error}. Run `hf download {source} --repo-type dataset` again")
        found += _version_problems(self.parameters)
        if not self._small():
            found += _gpu_problems(self.stages["GiB a GPU"].max())
        if self.teacher()[0]:
            found += _key_problems(self.parameters["01_data_construction"]["TEACHER_SERVER"])
        return found

    def download(self) -> None:
        """Complete the hub's cache, at the revisions that it has; from then on nothing asks the hub."""
        from huggingface_hub import snapshot_download

        for name in self.sources:
            reference = _repository(name) / "refs" / "main"
            revision = reference.read_text().strip() if reference.is_file() else None
            if name in (EVALUATION, TRAINING):
                fetch(ALL if name == TRAINING else None, revision=revision)
            else:
                snapshot_download(name, revision=revision, ignore_patterns=["*.bin", "*.pth", "*.pt", "*.gguf"])
        os.environ["HF_HUB_OFFLINE"] = "1"  # of the notebooks' kernels, for the time of this run

    def _small(self) -> bool:
        """Are all models here, and far smaller than planned, as on a stand-in of the hub?"""
        sizes = [size for name, size in self.cached.items() if name not in (EVALUATION, TRAINING)]
        return all(sizes) and sum(sizes) < GB

    def __str__(self) -> str:
        lines = [f"{self.target}: what it takes, estimated (docs/full_size.md: what was measured)", "", "Downloads:"]
        for name, size in self.cached.items():
            there = f", of which {size / GB:.3g} are there" if size else ""
            lines.append(f"  {name}: {self.table['GB'].get(name, 0.0):.1f} GB{there}")
        table = self.stages.round(1).to_string(na_rep="")
        lines += ["", "Computes:", *(f"  {line}" for line in table.splitlines())]
        card = "one GPU like an H100, training on one of 24 GB" if self.target == "small" else "one GPU like an H100"
        lines.append(f"  together {self.stages['hours, 1 GPU'].sum():.1f} hours on {card}")
        calls, read, written, price = self.teacher()
        asked = f"at most {calls:,} calls, {read:.0f} + {written:.1f} million tokens, {price:.0f} in your PRICE's money"
        lines += ["", f"Asks a teacher: {asked if calls else 'nobody'}", f"Writes: {self.written_gb():.1f} GB"]
        return "\n".join([*lines, f"Finished in {self.root}: {self.finished()}"])


def _stage(settings: Mapping[str, Any]) -> str:
    """Return the name that the paper's tables have for the retriever of notebook 04."""
    retriever = settings["RETRIEVER"]
    return next((name for name in RETRIEVERS if name.lower() == retriever), retriever)


def _rows(target: str, settings: Mapping[str, Any]) -> list[Row]:
    if target == "released":
        return [(stage, "MM-R5", {**settings, "RETRIEVER": stage.lower()}) for stage in RETRIEVERS]
    if target == "baselines":
        systems = {name: way for name, way in RERANKERS.items() if way[0] not in ("MODEL", "i2vec/MM-R5")}
        return [
            (_stage(settings), name, {**settings, "BASE": model, "MODE": mode})
            for name, (model, mode) in systems.items()
        ]
    return []


def _hub_cache() -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def _cached_bytes(name: str) -> int:
    """Return the bytes of a repository's newest snapshot in the hub's cache, 0 where it has none."""
    return sum(file.stat().st_size for file in (_repository(name) / "snapshots").glob("*/**/*") if file.is_file())


def _repository(name: str) -> Path:
    return _hub_cache() / f"{'datasets' if name in (EVALUATION, TRAINING) else 'models'}--{name.replace('/', '--')}"


def _hub_problems(name: str) -> list[str]:
    """Ask the hub whether a repository may be downloaded; some want their terms to be accepted first (Gemma)."""
    import httpx
    from huggingface_hub import HfApi

    dataset = name in (EVALUATION, TRAINING)
    try:
        HfApi().auth_check(name, repo_type="dataset" if dataset else None)
    except (OSError, ValueError, httpx.HTTPError) as error:
        command = f"hf download {name}{' --repo-type dataset' * dataset}"
        return [
            f"{name} is not in {_hub_cache()} and cannot be fetched ({type(error).__name__}): run `{command}` where"
            f" there is a network, after `hf auth login` where https://huggingface.co/{name} asks to accept terms"
        ]
    return []


def _gpu_problems(needed: float) -> list[str]:
    import torch

    if not torch.cuda.is_available():
        return [f"there is no GPU: one with {needed:.0f} GiB is planned for; the miniature (`mmr5 demo`) needs none"]
    free = torch.cuda.mem_get_info()[0] / GIB
    advice = "a larger GPU, or a profile with a smaller BATCH_SIZE"
    return [] if free >= needed else [f"the GPU has {free:.0f} GiB free of {needed:.0f} planned: {advice}"]


def _version_problems(parameters: Mapping[str, dict[str, Any]]) -> list[str]:
    """Compare what is installed with what this project asks for, and try what is optional and would be used."""
    found = []
    for requirement in importlib.metadata.requires("mmr5-lab") or ():
        try:
            if "extra ==" not in requirement:
                require_version(requirement.partition(";")[0])
        except (ImportError, importlib.metadata.PackageNotFoundError) as error:
            found.append(f"{' '.join(str(error).split())}: run `pip install '{requirement}'`")
    if is_flash_attn_2_available():
        try:
            import flash_attn  # type: ignore[import-not-found]  # noqa: F401
        except ImportError as error:  # built for another torch
            found.append(f"flash-attn cannot be imported ({error}): build it again, or run `pip uninstall flash-attn`")
    if any(values.get("FOUR_BIT") for values in parameters.values()) and not is_bitsandbytes_available():
        found.append("FOUR_BIT needs bitsandbytes and a GPU: run `pip install bitsandbytes`, or leave it out")
    return found


def _key_problems(server: str) -> list[str]:
    """Ask the server for its list of models, which costs nothing."""
    import openai

    if not os.environ.get("OPENAI_API_KEY"):
        return [f"OPENAI_API_KEY is not set: {server} answers nobody without a key"]
    try:
        Chat(server, "")  # refuses an address or a key that cannot be one
        openai.OpenAI(base_url=server, max_retries=1, timeout=20).models.list()
    except ValueError as error:
        return [f"TEACHER_SERVER and OPENAI_API_KEY: {error}"]
    except openai.APIError as error:
        return [f"{server} does not take the key in OPENAI_API_KEY ({type(error).__name__}): set one that is valid"]
    return []
