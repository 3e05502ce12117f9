"""The optimizers against torch's own and against a decomposition; the schedule."""

from __future__ import annotations

import pytest
import torch

import common
from common import UserError
from common_optim import orthogonalise


def test_one_cycle_rises_for_a_quarter_and_ends_at_zero():
    factors = [common.schedule_factor("one_cycle", step / 100) for step in range(101)]
    assert max(factors) == factors[25] == 1
    assert factors[100] == 0
    assert factors[:26] == sorted(factors[:26])


def test_optimizer_names(fashion):
    model = common.make_model(fashion, common.Recipe(width=16))
    assert common.make_optimizer("SGD+nesterov", model, 0.1).defaults["nesterov"]
    assert common.make_optimizer("RMSprop", model).defaults["lr"] == 0.01
    for name in ("Optimizer", "SGDD", "SGD+", "SGD+magic", "lr_scheduler"):
        with pytest.raises(UserError, match="unknown optimizer"):
            common.optimizer_class(name)
    with pytest.raises(UserError, match="cannot train"):
        common.make_optimizer("Adam+momentum", model, 0.1)


def test_muon_turns_kernels_by_the_gradients_polar_factor_and_steps_the_rest_as_adamw(fashion):
    model = common.make_model(fashion, common.Recipe(width=16), seed=3)
    optimizer = common.make_optimizer("Muon", model, 0.05)
    rest = [weight for weight in model.parameters() if weight.requires_grad and weight.ndim != 4]
    twins = [torch.nn.Parameter(weight.detach().clone()) for weight in rest]
    reference = torch.optim.AdamW(twins, 0.05, betas=(0.9, 0.95), weight_decay=0.0)
    kernels = [weight for weight in model.parameters() if weight.requires_grad and weight.ndim == 4]
    before = [kernel.detach().clone() for kernel in kernels]
    model(fashion.train_images[:64].float() / 255).logsumexp(1).sum().backward()
    for weight, twin in zip(rest, twins, strict=True):
        twin.grad = weight.grad.clone()
    optimizer.step()
    reference.step()
    assert all(torch.equal(weight, twin) for weight, twin in zip(rest, twins, strict=True))
    assert kernels
    for kernel, old in zip(kernels, before, strict=True):
        assert kernel.norm().item() == pytest.approx(len(kernel) ** 0.5, rel=1e-5)
        left, _, right = torch.linalg.svd(kernel.grad.flatten(1), full_matrices=False)  # what Newton-Schulz aims at
        unchanged, expected = (
            matrix * len(old) ** 0.5 / matrix.norm()
            for matrix in (old.flatten(1), old.flatten(1) - 0.05 * left @ right)
        )
        assert (kernel.flatten(1) - expected).norm() < 0.5 * (unchanged - expected).norm()


def test_muon_obeys_the_rate_that_the_schedule_sets(fashion):
    model = common.make_model(fashion, common.Recipe(width=16))
    optimizer = common.make_optimizer("Muon", model, 0.05)
    for _ in range(2):
        before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        model(fashion.train_images[:8].float() / 255).logsumexp(1).sum().backward()
        optimizer.step()  # the first one sets the kernels' norms
        for group in optimizer.param_groups:
            group["lr"] = 0.0
    for name, weight in model.named_parameters():
        assert torch.allclose(weight, before[name], rtol=1e-5, atol=1e-7)


def test_orthogonalised_matrices_are_those_of_torchs_muon_up_to_its_bf16():
    gradient = torch.randn(16, 72, generator=torch.Generator().manual_seed(0))
    weight = torch.nn.Parameter(torch.zeros_like(gradient))
    weight.grad = gradient.clone()
    torch.optim.Muon([weight], lr=1.0, weight_decay=0.0, momentum=0.9, ns_steps=3).step()
    ours = orthogonalise(gradient)
    assert (ours + weight.detach()).norm() < 0.03 * ours.norm()
    assert 0.3 < torch.linalg.svdvals(ours).min() < torch.linalg.svdvals(ours).max() < 1.3
