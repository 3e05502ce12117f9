"""The optimizers by name, and the learning rate's schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common_options import UserError, first_line


def optimizer_class(name: str) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """Look up ``name`` in torch.optim; "+momentum" or "+nesterov" add momentum 0.9 to it.

    Returns the class and its extra arguments; raises UserError for an unknown name.
    """
    base, plus, variant = name.partition("+")
    momentum = {"momentum": 0.9}
    extra = {"": {}, "+momentum": momentum, "+nesterov": momentum | {"nesterov": True}}.get(plus + variant)
    kind = Muon if base == "Muon" else getattr(torch.optim, base, None)
    if (
        not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer))
        or kind is torch.optim.Optimizer
        or extra is None
    ):
        other = {"Optimizer", "LBFGS", "SparseAdam"}  # those ask for another loop or other weights
        known = sorted(key for key, value in vars(torch.optim).items() if isinstance(value, type) and key not in other)
        raise UserError(
            f"unknown optimizer {name!r}: one of {', '.join(known)}, with +momentum or +nesterov where it has that"
        )
    return kind, extra


def make_optimizer(
    name: str, model: nn.Module, lr: float | None = None, weight_decay: float = 0.0
) -> torch.optim.Optimizer:
    """An optimizer of ``model``'s trainable parameters; ``lr`` None means the framework's default.

    Raises UserError where the optimizer does not take these arguments or this model.
    """
    kind, extra = optimizer_class(name)
    if lr is not None:
        extra = {**extra, "lr": lr}
    if weight_decay:
        extra = {**extra, "weight_decay": weight_decay}
    try:
        return kind([p for p in model.parameters() if p.requires_grad], **extra)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"optimizer {name} cannot train this model: {first_line(error)}") from None


def schedule_factor(schedule: str, progress: float) -> float:
    """The learning rate's factor at ``progress`` in [0, 1) of all steps."""
    if schedule == "constant":
        return 1.0
    return float(np.interp(progress, [0, 0.25, 1], [0.02, 1, 0]))


MUON_MOMENTUM = 0.9


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for convolutions, AdamW for all other parameters, both at one learning rate.

    A kernel (O, I, H, W) is taken as a matrix (O, I * H * W), one row a filter, and moved by lr times the orthogonal
    matrix nearest to its averaged gradient. Afterwards every kernel is scaled to a norm of sqrt(O): BatchNorm makes its
    scale irrelevant, and so the rate alone says how far a step turns it. Weight decay is for the other parameters.
    (torch.optim.Muon takes nothing but matrices and computes in bf16, which processors without it only emulate.)
    """

    def __init__(self, params: Iterable[Tensor], lr: float = 1e-3, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        weights = [weight for group in self.param_groups for weight in group["params"]]
        self.kernels = [weight for weight in weights if weight.ndim == 4]
        self.averages = [torch.zeros_like(kernel) for kernel in self.kernels]
        others = [weight for weight in weights if weight.ndim != 4]
        self.adam = torch.optim.AdamW(others, lr, betas=(0.9, 0.95), weight_decay=weight_decay)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update; every kernel needs a gradient."""
        lr = self.param_groups[0]["lr"]
        for group in self.adam.param_groups:
            group["lr"] = lr
        self.adam.step()
        for kernel, average in zip(self.kernels, self.averages, strict=True):
            average.lerp_(kernel.grad, 1 - MUON_MOMENTUM)
            direction = kernel.grad.lerp(average, MUON_MOMENTUM)  # Nesterov's
            kernel -= lr * orthogonalise(direction.flatten(1)).view_as(kernel)
            kernel *= len(kernel) ** 0.5 / kernel.norm()


def orthogonalise(matrix: Tensor, steps: int = 3) -> Tensor:
    """A matrix with the singular vectors of ``matrix`` (R, C), its singular values all drawn towards 1.

    Newton and Schulz's iteration with the quintic of Jordan et al. 2024, which ends near 1 rather than at it.
    """
    matrix = matrix / matrix.norm().clamp_min(1e-7)
    for _ in range(steps):
        gram = matrix @ matrix.T
        matrix = 3.4445 * matrix + (-4.7750 * gram + 2.0315 * gram @ gram) @ matrix
    return matrix
