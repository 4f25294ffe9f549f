"""Linear layers on a CPU, computed by oneDNN.

PyTorch multiplies float32 matrices with MKL, which leaves half of an AMD processor unused; oneDNN, which PyTorch comes
with, does not (`docs/log.md`, 2026-11-24). Values differ by rounding, if at all; gradients are there as before.
"""

from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional

FEW_ROWS = 8  # below, what it takes to call oneDNN is more than it saves


def use_onednn(model: nn.Module) -> None:
    """Let the linear layers of a model on a CPU be computed by oneDNN, where PyTorch has it.

    They stay `nn.Linear` with their parameters, so that they are saved, wrapped by peft, merged and trained like any
    others.
    """
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear


class Linear(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return linear(input, self.weight, self.bias)


def linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`torch.nn.functional.linear`, by oneDNN where that can be: … × k, n × k and n give … × n."""
    if not (_fits(input) and _fits(weight)) or input.numel() < FEW_ROWS * input.shape[-1]:
        return functional.linear(input, weight, bias)
    if torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad):
        return cast(torch.Tensor, _Linear.apply(input, weight, bias))
    return _product(input, weight, bias)


def _fits(tensor: torch.Tensor) -> bool:
    return tensor.dtype == torch.float32 and tensor.device.type == "cpu"


def _product(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], None)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(input, weight)
        return _product(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        [gradient] = gradients
        input, weight = ctx.saved_tensors
        of_input, of_weight, of_bias = ctx.needs_input_grad
        rows = gradient.reshape(-1, gradient.shape[-1])
        return (
            _product(gradient, weight.t()) if of_input else None,
            _product(rows.t(), input.reshape(-1, input.shape[-1]).t()) if of_weight else None,
            rows.sum(0) if of_bias else None,
        )
