"""Layers by oneDNN give what PyTorch's own give, with the same gradients, and stay what they were to everyone else."""

import copy

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mmr5_lab.models.cpu_layers import FEW_ROWS, Linear, linear, use_onednn


def gradients(layer: nn.Module, shown: torch.Tensor) -> list[torch.Tensor]:
    shown = shown.clone().requires_grad_()
    layer.zero_grad()
    layer(shown).sin().sum().backward()
    return [shown.grad, *(parameter.grad.clone() for parameter in layer.parameters())]


def close(ours, plain) -> None:
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)


@given(
    shape=st.lists(st.integers(1, 5), max_size=2),
    rows=st.integers(1, 2 * FEW_ROWS),
    wide=st.integers(1, 40),
    out=st.integers(1, 40),
    bias=st.booleans(),
)
def test_values_and_gradients_are_those_of_a_linear_layer(shape, rows, wide, out, bias):
    plain = nn.Linear(wide, out, bias)
    ours = copy.deepcopy(plain)
    use_onednn(ours)
    shown = torch.randn(*shape, rows, wide)
    close(ours(shown), plain(shown))
    with torch.inference_mode():
        close(ours(shown), plain(shown))
    close(gradients(ours, shown), gradients(plain, shown))


def test_only_plain_layers_are_changed_and_what_they_hold_is_not():
    class Own(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(4, 4), Own(4, 4), nn.Conv3d(1, 1, 3, 1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    use_onednn(model)
    assert [type(layer) for layer in model] == [Linear, Own, nn.Conv3d]
    assert isinstance(model[0], nn.Linear), "peft looks for these"
    assert list(model.state_dict()) == list(before)
    close(model.state_dict(), before)


def test_other_types_of_numbers_take_the_usual_way():
    layer = nn.Linear(4, 3).double()
    shown = torch.randn(20, 4, dtype=torch.float64)
    close(linear(shown, layer.weight, layer.bias), layer(shown))


def test_a_changed_weight_counts_at_once():
    """Adapters are merged into weights that were used before."""
    layer = nn.Linear(8, 8)
    use_onednn(layer)
    shown = torch.randn(32, 8)
    with torch.inference_mode():
        layer(shown)
    with torch.no_grad():
        layer.weight.zero_()
    close(layer(shown), layer.bias.expand(32, 8))
