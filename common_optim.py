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


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon for convolutions, AdamW for all other parameters, both at one learning rate.

    Muon makes the update of a matrix orthogonal and takes nothing but matrices (Jordan et al. 2024): a kernel
    (O, I, H, W) is given to it as (O, H * W * I), one row a filter. Afterwards every kernel is scaled to a norm of
    sqrt(O): BatchNorm makes its scale irrelevant, and so the rate alone says how far a step turns it. Weight decay
    is for the other parameters.
    """

    def __init__(self, params: Iterable[Tensor], lr: float = 1e-3, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        weights = [weight for group in self.param_groups for weight in group["params"]]
        self.kernels = [weight for weight in weights if weight.ndim == 4]
        self.matrices = [self.as_matrix(kernel.detach()) for kernel in self.kernels]
        if any(
            matrix.data_ptr() != kernel.data_ptr() for matrix, kernel in zip(self.matrices, self.kernels, strict=True)
        ):
            raise ValueError("its kernels are not channels_last")
        others = [weight for weight in weights if weight.ndim != 4]
        self.muon = torch.optim.Muon(self.matrices, lr, weight_decay=0.0, momentum=0.9, ns_steps=3)
        self.adam = torch.optim.AdamW(others, lr, betas=(0.9, 0.95), weight_decay=weight_decay)

    @staticmethod
    def as_matrix(kernel: Tensor) -> Tensor:
        """(O, I, H, W) as (O, H * W * I): a view of a channels_last tensor."""
        return kernel.permute(0, 2, 3, 1).flatten(1)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of everything that has a gradient."""
        for part in (self.muon, self.adam):
            for group in part.param_groups:
                group["lr"] = self.param_groups[0]["lr"]
        for matrix, kernel in zip(self.matrices, self.kernels, strict=True):
            matrix.grad = self.as_matrix(kernel.grad)
        self.muon.step()
        self.adam.step()
        for matrix in self.matrices:
            matrix *= len(matrix) ** 0.5 / matrix.norm()
