import torch

from ewc_lib import EWC, fisher_information
from ewc_lib.continual import mlp
from ewc_lib.experiments.structures.displacements import divergence, learned_step


def classifier():
    model = mlp((5, 4, 3), seed=1).double()
    x = torch.randn(20, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return model, (x, torch.arange(20) % 3)


def moved(model, displacement):
    with torch.no_grad():
        for name, p in model.named_parameters():
            p += displacement[name]


def step(model, size, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: size * torch.randn(p.shape, dtype=p.dtype, generator=generator)
        for name, p in model.named_parameters()
    }


def test_a_learned_step_is_the_way_of_sgd_and_the_model_is_put_back():
    model, (x, y) = classifier()
    before = [p.clone() for p in model.parameters()]
    found = learned_step(model, (x, y), rate=0.1, steps=1, seed=0, batch_size=len(x))
    assert all(map(torch.equal, before, model.parameters()))
    loss = torch.nn.functional.cross_entropy(model(x), y)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    for step_of, gradient in zip(found.values(), gradients, strict=True):
        torch.testing.assert_close(step_of, -0.1 * gradient)


def test_a_learned_step_is_shorter_where_an_earlier_task_is_held():
    model, task = classifier()
    ewc = EWC(model, strength=100.0)
    ewc.consolidate(task)
    other = task[0], task[1].flip(0)
    options = {"rate": 0.1, "steps": 50, "seed": 0}
    free, held = (learned_step(model, other, regularizer=r, **options) for r in (None, ewc))
    assert ewc.precision.quadratic(held) < 0.5 * ewc.precision.quadratic(free)


def test_the_divergence_is_that_of_the_probabilities():
    model, (x, _) = classifier()
    displacement = step(model, 0.5)
    before = [p.clone() for p in model.parameters()]
    found = divergence(model, x, displacement)
    assert all(map(torch.equal, before, model.parameters()))
    old = model(x).softmax(1)
    moved(model, displacement)
    expected = (old * (old / model(x).softmax(1)).log()).sum(1).mean()
    torch.testing.assert_close(found, expected.detach(), rtol=1e-10, atol=0)
    assert found > 0.01


def test_the_divergence_begins_as_the_quadratic_form_of_the_fisher_information():
    model, task = classifier()
    F = fisher_information(model, task, structure="dense")

    def gap(size):
        displacement = step(model, size)
        return abs(divergence(model, task[0], displacement) - F.quadratic(displacement) / 2)

    assert 6 < gap(2e-3) / gap(1e-3) < 10  # the third order is left
