"""A loop of one's own with accelerate, against the same loop by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ewc_lib import EWC
from ewc_lib.regularizers import SI
from tests.scenarios import same

accelerate = pytest.importorskip("accelerate")
from accelerate.state import AcceleratorState, GradientState  # noqa: E402

RATE = 0.2


@pytest.fixture(autouse=True)
def _alone():
    yield
    forget()


def forget():
    """Accelerate keeps what it was told for the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))


def task(seed, n=8):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, generator=generator), torch.arange(n) % 2


def after_task_a(make, strength):
    """Return a network that has learned a task, and what holds it there."""
    model, (x, y) = network(), task(0)
    regularizer = make(model, strength)
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    with regularizer.attach(optimizer):
        for _ in range(5):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    optimizer.zero_grad()
    regularizer.consolidate((x, y))
    return model, regularizer


def parts(model):
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
    return optimizer, scheduler


def by_hand(model, regularizer, form, epochs=4, most=0.05):
    optimizer, scheduler = parts(model)
    x, y = task(1)
    for _ in range(epochs):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), most)
        regularizer.before_step()
        if form == "gradient":
            regularizer.add_gradient_()
        optimizer.step()
        if form == "proximal":
            regularizer.proximal_step_(optimizer)
        regularizer.after_step()
        scheduler.step()


def with_accelerate(model, regularizer, form, epochs=4, most=0.05, micro=4):
    accelerator = accelerate.Accelerator(gradient_accumulation_steps=micro, cpu=True)
    loader = DataLoader(TensorDataset(*task(1)), 8 // micro)
    model, *own, loader = accelerator.prepare(model, *parts(model), loader)
    optimizer, scheduler = own
    regularizer.attach(optimizer, form)
    for _ in range(epochs):
        for x, y in loader:
            with accelerator.accumulate(model):
                accelerator.backward(F.cross_entropy(model(x), y))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), most)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
    return accelerator


@pytest.mark.parametrize("micro", [1, 4])
@pytest.mark.parametrize("form", ["proximal", "gradient"])
@pytest.mark.parametrize(("make", "strength"), [(EWC, 20.0), (SI, 20.0)])
def test_a_prepared_optimizer_is_attached_to_as_a_plain_one(make, strength, form, micro):
    (one, first), (other, second) = (after_task_a(make, strength) for _ in range(2))
    by_hand(one, first, form)
    with_accelerate(other, second, form, micro=micro)
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(second.penalty(), first.penalty(), rtol=1e-3, atol=1e-7)
    free, third = after_task_a(make, 0.0)
    by_hand(free, third, form)
    gaps = [(p - q).abs().max() for p, q in zip(one.parameters(), free.parameters(), strict=True)]
    assert max(gaps) > 1e-3  # without it, it goes elsewhere


def test_a_step_that_a_scaler_leaves_out_moves_nothing():
    model, ewc = after_task_a(EWC, 20.0)
    with torch.no_grad():
        model[0].weight += 0.5
    accelerate.Accelerator(cpu=True)
    scaler = torch.amp.GradScaler("cpu")
    optimizer = accelerate.optimizer.AcceleratedOptimizer(parts(model)[0], scaler=scaler)
    ewc.attach(optimizer)
    x, y = task(1)
    before, penalty = model[0].weight.detach().clone(), ewc.penalty().item()
    for overflow in (True, False):
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        if overflow:
            model[0].bias.grad[0] = torch.inf
        optimizer.step()
        assert optimizer.step_was_skipped == overflow
        assert torch.equal(model[0].weight, before) == overflow
    assert ewc.penalty().item() < 0.99 * penalty


def test_a_state_that_accelerate_saves_goes_on_as_if_nothing_had_happened(tmp_path):
    model, ewc = after_task_a(EWC, 20.0)
    accelerator = with_accelerate(model, ewc, "proximal")
    accelerator.register_for_checkpointing(ewc)
    accelerator.save_state(str(tmp_path))
    forget()
    other = network()
    new = EWC(other, 20.0)
    accelerator = accelerate.Accelerator(cpu=True)
    prepared = accelerator.prepare(other, parts(other)[0])
    accelerator.register_for_checkpointing(new)
    accelerator.load_state(str(tmp_path))
    assert same(new.state_dict(), ewc.state_dict())
    assert same(dict(prepared[0].named_parameters()), dict(model.named_parameters()))
    assert torch.equal(new.penalty(), ewc.penalty())
