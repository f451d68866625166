"""Gradients that are written down, where those that autograd finds op by op touch more memory than they must."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

# tensors, and the gradients by them
Pairs = Sequence[tuple[Tensor | None, Tensor | None]]


def with_gradient(
    function: Callable[..., Tensor], gradient: Callable[..., tuple[Tensor, ...]]
) -> Callable[..., Tensor]:
    """`function(*tensors)`, differentiated by `gradient(d_output, *tensors)`.

    Whoever asks for more than a first derivative, or for another kind of it, gets that of the function itself.
    """

    class Written(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *tensors: Tensor) -> Tensor:
            ctx.save_for_backward(*tensors)
            return function(*tensors)

        @staticmethod
        def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor | None, ...]:
            tensors = ctx.saved_tensors
            if not torch.is_grad_enabled():
                return gradient(d_output, *tensors)
            # a tensor may have been made of another one; of a view of it no other is
            views = [part.view_as(part) for part in tensors]
            return tuple(differentiate([(function(*views), d_output)], views, ctx.needs_input_grad, create_graph=True))

    def apply(*tensors: Tensor) -> Tensor:
        return function(*tensors) if is_traced() else Written.apply(*tensors)

    return apply


def is_traced() -> bool:
    """Whether a compiler, `torch.func` or a forward derivative looks on, which see through plain tensors only."""
    compiled = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return compiled or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_batch_of_gradients(gradient: Tensor | None) -> bool:
    """Whether it is one of `autograd.grad(..., is_grads_batched=True)`, which know plain operations only."""
    return gradient is not None and torch._C._functorch.is_legacy_batchedtensor(gradient)


def differentiate(
    pairs: Pairs, inputs: Sequence[Tensor], wanted: Sequence[bool], **options: Any
) -> list[Tensor | None]:
    """From gradients by some tensors to those by inputs that are wanted.

    None by the others, and by what has no part in any tensor with a gradient. Options are those of autograd.grad.
    """
    of = [part for part, wants in zip(inputs, wanted, strict=True) if wants]
    known = [
        (tensor, gradient)
        for tensor, gradient in pairs
        if tensor is not None and tensor.requires_grad and gradient is not None
    ]
    if not known or not of:
        return [None] * len(inputs)
    outputs, gradients = zip(*known, strict=True)
    found = iter(torch.autograd.grad(outputs, of, gradients, allow_unused=True, **options))
    return [next(found) if wants else None for wants in wanted]
