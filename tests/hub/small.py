"""`paper`, `recommended` and `small` at the smallest size: their own profiles, with fewer of everything."""

import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import yaml
from helpers.servers import Server, as_teacher
from hub.stand_in import environment

from mmr5_lab.experiments.runs import project_root

FAULTS = (503, "cut", b"<html>")
CONCURRENCY = 4  # requests under way at once: those that a kill may send again
SMALL = {
    "01_data_construction": {"MAX_TRACES": 7, "MAX_PER_DOMAIN": 1, "CONCURRENCY": CONCURRENCY},
    "02_sft": {"PROBES": 1, "WORKERS": 0, "ACCUMULATION": 4},
    "03_grpo": {"MAX_PROMPTS": 4, "GENERATIONS": 2, "BATCH_SIZE": 2, "ACCUMULATION": 2, "MAX_COMPLETION": 16},
    "04_inference": {"MAX_QUESTIONS": 2, "FRONTIER": 1, "MAX_NEW_TOKENS": 16},
    "06_error_analysis": {"PROBED": 1, "MAX_NEW_TOKENS": 16, "BATCH_SIZE": 4, "SHUFFLES": 2},
}


def faulty_teacher(seed: int = 0) -> Server:
    """A teacher of which a quarter of the requests fail."""
    draw = random.Random(seed)
    return Server({"": [draw.choice([*FAULTS, *[as_teacher] * 9]) for _ in range(2000)]})


def paid(teacher: Server) -> Counter:
    """How often each question was answered by the teacher."""
    served = zip(teacher.bodies, teacher.served, strict=False)
    return Counter(json.dumps(body, sort_keys=True) for body, turn in served if turn is as_teacher)


def small_profile(target: str, teacher: Server, path: Path, **more: dict) -> Path:
    """Write a target's profile with small values, and `more` of a notebook, to `path` and return that."""
    profile = yaml.safe_load((project_root() / f"notebooks/profiles/{target}.yaml").read_text())
    for notebook, values in SMALL.items():
        profile[notebook] |= values | more.get(notebook[3:], {})
    profile["01_data_construction"]["TEACHER_SERVER"] = teacher.url
    path.write_text(yaml.safe_dump(profile))
    return path


def start(hub: Path, *arguments: str) -> subprocess.Popen:
    """Start `mmr5 reproduce` on the stand-in hub."""
    return subprocess.Popen(
        [sys.executable, "-m", "mmr5_lab.cli", "reproduce", *arguments], cwd=project_root(),
        env=environment(hub) | {"OPENAI_API_KEY": "key"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
