"""GRPO with prompts encoded once a group gives what plain trl gives: samples, losses, gradients, weights."""

import pytest
import torch
from helpers.architectures import save
from trl import GRPOConfig, GRPOTrainer

from mmr5_lab.mini.documents import make_corpus
from mmr5_lab.models.loading import load_model
from mmr5_lab.models.vision_cache import PageCache
from mmr5_lab.retrieval.retrieve import retrieve
from mmr5_lab.traces.construction import rl_dataset, training_candidates
from mmr5_lab.training import shared_prefix
from mmr5_lab.training.shared_prefix import SharedPrefixGRPOTrainer, cannot_share
from mmr5_lab.training.stages import lora

SHARING = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """Prompts of 3 and 5 pages, two of them of the same question in two orders."""
    corpus = make_corpus(tmp_path_factory.mktemp("corpus"), seed=4, splits={"rl": (2, 3)})
    run = retrieve(corpus, top_k=5)
    wide = training_candidates(corpus, run, 5, shuffles=2)
    narrow = training_candidates(corpus, run, 3)
    return rl_dataset(corpus, [*wide[:2], *wide[-2:], *narrow[:2]])


def paid(completions, **columns):
    """Rewards that differ within a group, whatever a random model writes."""
    return [float(sum(map(ord, str(completion))) % 7) for completion in completions]


def train(trainer_class, model, data, folder, **more):
    loaded, processor = load_model(model)
    if trainer_class is SharedPrefixGRPOTrainer:
        PageCache(loaded)
    arguments = GRPOConfig(
        output_dir=str(folder), per_device_train_batch_size=4, gradient_accumulation_steps=2, num_generations=4,
        max_steps=3, learning_rate=1e-3, beta=0.04, max_completion_length=9, logging_steps=1, report_to="none",
        disable_tqdm=True, save_strategy="no", bf16=False, gradient_checkpointing=False, seed=1, **more,
    )  # fmt: skip
    trainer = trainer_class(
        loaded.train(), reward_funcs=[paid], args=arguments, train_dataset=data, processing_class=processor,
        peft_config=lora(4, 8, 0.0),
    )  # fmt: skip
    trainer.train()
    texts = list(trainer._logs["completion"])
    log = [row for row in trainer.state.log_history if "loss" in row]
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    return log, texts, weights


@pytest.mark.parametrize(
    ("name", "more"),
    [(name, {}) for name in SHARING]
    + [("qwen2_5_vl", {"loss_type": "grpo", "num_iterations": 2, "steps_per_generation": 2})],
)
def test_training_is_that_of_plain_trl(name, more, prompts, tmp_path):
    folder = save(name, tmp_path / "model")
    plain = train(GRPOTrainer, folder, prompts, tmp_path, **more)
    shared = train(SharedPrefixGRPOTrainer, folder, prompts, tmp_path, **more)
    assert shared[1] == plain[1], "other samples"
    for ours, theirs in zip(shared[0], plain[0], strict=True):
        for key in {"loss", "grad_norm", "reward", "kl", "entropy"} & theirs.keys():
            # Adam makes steps of full size from gradients that are all rounding, so later figures drift a little
            assert ours[key] == pytest.approx(theirs[key], abs=1e-4, rel=2e-3), (ours["step"], key)
    assert len({round(row["loss"], 5) for row in plain[0]}) > 1
    for parameter, value in plain[2].items():
        assert torch.allclose(shared[2][parameter], value, atol=1e-3), parameter


def test_a_prompt_is_encoded_once_a_group(prompts, tmp_path):
    folder = save("qwen2_5_vl", tmp_path / "model")
    rows: list[tuple[int, int]] = []

    class Counting(SharedPrefixGRPOTrainer):
        def __init__(self, model, *args, **options):
            original = model.model.language_model.forward

            def forward(*args, **given):
                rows.append(tuple(given["inputs_embeds"].shape[:2]))
                return original(*args, **given)

            model.model.language_model.forward = forward
            super().__init__(model, *args, **options)

    train(Counting, folder, prompts.select([0, 1]), tmp_path)
    long = [shape for shape in rows if shape[1] > 20]  # without the single tokens of sampling
    # a step: 2 prompts are sampled from together, then each has its reference (4 of 8 rows a pass) and its loss
    assert [shape[0] for shape in long[:5]] == [2, 1, 1, 1, 1]


def test_a_kernel_without_masks_of_its_own_cannot_share(tmp_path, monkeypatch):
    eager, _ = load_model(save("qwen2_vl", tmp_path / "eager"), attention="eager")
    assert cannot_share(eager) is None
    monkeypatch.setattr(shared_prefix, "KERNELS", ())
    assert cannot_share(eager) == "the attention kernel eager takes no mask of its own, as  do"
