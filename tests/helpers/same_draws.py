"""Run `mmr5_lab.experiments.launch` so that one process and several can be compared.

Each process has random numbers of its own, so with plain sampling they write different completions: here draws depend
on a completion's place in its group alone. The strict rewards, of which a random model earns none, become one that
differs within a group. Everything else is as it is.

    python tests/helpers/same_draws.py GROUP_SIZE NOTEBOOK ARGUMENTS…     (several notebooks: with "," between them)
"""

import itertools
import sys

import torch
from transformers import GenerationMixin

from mmr5_lab.experiments.launch import main
from mmr5_lab.rewards import REWARD_SETS, completion_texts


def same_draws(group: int) -> None:
    """Let `torch.multinomial` draw by Gumbel noise, seeded by the token's number and the row's place in its group."""
    token = itertools.count()
    sample = GenerationMixin._sample

    def restarted(self, *given, **options):
        nonlocal token
        token = itertools.count()
        return sample(self, *given, **options)

    def multinomial(probabilities: torch.Tensor, num_samples: int, **_) -> torch.Tensor:
        number = next(token)
        noise = [
            torch.rand(probabilities.shape[-1], generator=torch.Generator().manual_seed(1000 * number + row % group))
            for row in range(len(probabilities))
        ]
        return (probabilities.log() - (-torch.stack(noise).log()).log()).argmax(-1, keepdim=True)

    GenerationMixin._sample = restarted
    torch.multinomial = multinomial


def letters(completions, **columns):
    return [float(sum(map(ord, text)) % 7) for text in completion_texts(completions)]


if __name__ == "__main__":
    REWARD_SETS["strict"] = (letters,)
    size, *given = sys.argv[1:]
    same_draws(int(size))
    codes = [main(list(part)) for comma, part in itertools.groupby(given, lambda word: word == ",") if not comma]
    sys.exit(max(codes))
