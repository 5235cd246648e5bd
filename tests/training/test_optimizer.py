"""The Muon optimizer."""

from types import SimpleNamespace

import pytest
import torch

from training.optimizer import ADAMW_SHARE, BadSteps, Muon, orthogonalised


def matrices_and_others(seed=0):
    generator = torch.Generator().manual_seed(seed)
    wide, tall = (torch.randn(*shape, generator=generator).requires_grad_() for shape in ((6, 20), (30, 8)))
    return [wide, tall], [torch.randn(8, generator=generator).requires_grad_()]


def give_gradients(parameters, step):
    generator = torch.Generator().manual_seed(step)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon to compare with")
def test_steps_are_those_of_torch():
    """A wrong coefficient, scale, momentum or decay. torch's knows matrices only, and rounds to bfloat16 on the way."""
    ours, theirs = matrices_and_others(), matrices_and_others()
    options = {"lr": 0.02, "weight_decay": 0.1}
    optimizer = Muon(*ours, **options)
    references = [
        torch.optim.Muon(theirs[0], momentum=0.95, adjust_lr_fn="match_rms_adamw", **options),
        torch.optim.AdamW(theirs[1], **options | {"lr": ADAMW_SHARE * options["lr"]}),
    ]
    for step in range(5):
        give_gradients([*ours[0], *ours[1]], step)
        give_gradients([*theirs[0], *theirs[1]], step)
        optimizer.step()
        for reference in references:
            reference.step()
    start = matrices_and_others()
    for mine, other, before in zip(*([*each[0], *each[1]] for each in (ours, theirs, start))):
        assert (mine - other).norm() < 0.02 * (other - before).norm()


def test_a_convolution_is_the_matrix_of_its_output_channels():
    """A convolution's weight orthogonalised along another axis, or in the order in which channels_last stores it."""
    flat = torch.randn(4, 18)
    gradient = torch.randn(4, 18)
    as_matrix, as_kernel = flat.clone(), flat.view(4, 2, 3, 3).to(memory_format=torch.channels_last)
    for weight, given in ((as_matrix, gradient), (as_kernel, gradient.view(4, 2, 3, 3))):
        weight.requires_grad_()
        weight.grad = given.clone()
        Muon([weight], [torch.zeros(1, requires_grad=True)], lr=0.1, weight_decay=0).step()
    assert torch.allclose(as_kernel.reshape(4, 18), as_matrix, atol=1e-6)


def test_directions_count_alike():
    """An iteration that stops short: the weak directions of a gradient would not be learnt."""
    left, _ = torch.linalg.qr(torch.randn(12, 12))
    right, _ = torch.linalg.qr(torch.randn(40, 12))
    singular = torch.linspace(0.05, 1, 12)
    for matrix in (left @ torch.diag(singular) @ right.T, right @ torch.diag(singular) @ left.T):
        values = torch.linalg.svdvals(orthogonalised(matrix[None])[0])
        assert values.min() > 0.6 and values.max() < 1.3


@pytest.mark.parametrize("kind", ["adamw", "fused adamw", "muon", "fused muon"])
def test_a_masked_step_changes_nothing(kind):
    """A step that is skipped only where a fused kernel is: on other devices torch's AdamW raises, or NaN gets in."""
    (wide, tall), others = matrices_and_others()
    options = {"lr": 0.1, "weight_decay": 0.1, "fused": "fused" in kind}
    optimizer = Muon([wide, tall], others, **options) if "muon" in kind else torch.optim.AdamW([wide, tall, *others], **options)
    bad_steps = BadSteps(3, SimpleNamespace(num_processes=1, scaler=None))
    parameters = [wide, tall, *others]
    for loss in (1.0, float("nan"), 1.0):
        give_gradients(parameters, 0)
        before = [parameter.detach().clone() for parameter in parameters]
        if loss != loss:
            wide.grad[0, 0] = loss
        ok = bad_steps.mask(optimizer, torch.tensor(loss), torch.tensor(1.0))
        optimizer.step()
        same = [torch.equal(parameter, old) for parameter, old in zip(parameters, before)]
        assert all(same) if not ok else not any(same)
        assert all(parameter.isfinite().all() for parameter in parameters)
