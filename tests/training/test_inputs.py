"""What is given to a training run: what is refused, in which words, and what tells data from other data."""

import re

import datasets
import pytest
from helpers.architectures import save
from PIL import Image

from mmr5_lab.models.loading import load_model, set_max_pixels
from mmr5_lab.training.inputs import check_prompts, check_traces, data_fingerprint, trace_lengths
from mmr5_lab.training.stages import train_grpo, train_sft


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3", "internvl"])
def test_the_length_of_a_trace_is_that_of_the_trainer_s_inputs(name, material, tmp_path):
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    _, processor = load_model(save(name, tmp_path))
    collate = DataCollatorForVisionLanguageModeling(processor)
    lengths = [collate([material.traces[i]])["input_ids"].shape[1] for i in range(4)]
    assert trace_lengths(material.traces.select(range(4)), processor) == lengths
    if name == "qwen2_5_vl":
        set_max_pixels(processor, 56 * 56)
        assert trace_lengths(material.traces.select([0]), processor)[0] < lengths[0]


def test_traces_above_the_longest_length_are_refused_before_anything_is_trained(material, tmp_path):
    _, processor = load_model(material.model)
    lengths = trace_lengths(material.traces, processor)
    longest, second = sorted(lengths)[-1], sorted(set(lengths))[-2]
    check_traces(material.traces, processor, longest)
    number = lengths.index(longest)
    asked = re.search(r"The question is: (.*)\n", material.traces[number]["prompt"][-1]["content"][0]["text"])[1]
    said = f"{second} tokens. The first is trace {number + 1} ('{asked}'), of {longest} tokens: raise max_length, lower"
    with pytest.raises(ValueError, match=re.escape(said)):
        train_sft(
            material.model, material.traces, tmp_path, learning_rate=1e-3, epochs=1, batch_size=2, lora_rank=4,
            lora_alpha=8, max_length=second,
        )  # fmt: skip
    assert not (tmp_path / "checkpoints").exists()


GRPO = {"learning_rate": 1e-3, "batch_size": 4, "generations": 2, "max_steps": 1, "lora_rank": 4, "max_completion": 8}


@pytest.mark.parametrize(
    ("data", "settings", "said"),
    [
        (lambda prompts: prompts.select([0, 1, 2]), {"accumulation": 2}, "3 prompts do not fill a step of 4 .8 comple"),
        (lambda prompts: prompts.select([]), {}, "there are no prompts to train on"),
        (lambda prompts: own_prompts(2, without=[1]), {}, "1 of 2 prompts have no positive .* the first is prompt 2"),
        (lambda prompts: own_prompts(2).remove_columns("images"), {}, "the prompts have no column images: they need"),
        (lambda prompts: prompts, {"rewards": "generous"}, "rewards is 'generous': give a name of strict, ndcg, "),
        (
            lambda prompts: prompts,
            {"rewards": []},
            "rewards is .*: give a name of strict, ndcg, released, direct, ",
        ),
        (lambda prompts: prompts, {"batch_size": 3}, "3 × 1 completions a step .* not a multiple of the group size 2"),
    ],
)
def test_prompts_that_cannot_be_trained_on_are_refused_in_our_words(data, settings, said, material, tmp_path):
    with pytest.raises(ValueError, match=said):
        train_grpo(material.model, data(material.prompts), tmp_path, **{**GRPO, **settings})


def own_prompts(count: int, without=()) -> datasets.Dataset:
    """Prompts of one's own, with a positive each but for those `without`."""
    page = Image.new("RGB", (140, 168))
    return datasets.Dataset.from_list([
        {"prompt": [{"role": "user", "content": f"q{i}"}], "images": [page, page], "num_candidates": 2,
         "positive_ids": [] if i in without else [1]} for i in range(count)
    ])  # fmt: skip


def test_traces_without_a_column_and_without_rows_are_refused(material):
    _, processor = load_model(material.model)
    with pytest.raises(ValueError, match="the traces have no column completion: they need prompt, completion, images"):
        check_traces(material.traces.remove_columns("completion"), processor, 100)
    with pytest.raises(ValueError, match="there are no traces to train on"):
        check_traces(material.traces.select([]), processor, 100)


def test_enough_prompts_pass(material):
    check_prompts(material.prompts, batch_size=len(material.prompts), accumulation=2, generations=2)
    check_prompts(own_prompts(2), batch_size=4, accumulation=1, generations=2)


def test_a_fingerprint_stands_for_rows_their_order_and_their_pages(material, tmp_path):
    traces, prompts = material.traces, material.prompts
    assert data_fingerprint(traces) == data_fingerprint(material.traces)
    assert data_fingerprint(prompts) == data_fingerprint(material.prompts)
    turned = list(range(len(traces)))[::-1]
    prints = {
        data_fingerprint(data)
        for data in (traces, traces.select(turned), traces.select(turned[1:]), prompts, prompts.select([1, 0]))
    }
    assert len(prints) == 5
    rows, other = own_prompts(2), own_prompts(2, without=[0])
    assert data_fingerprint(rows) != data_fingerprint(other), "other labels"
