"""Layers in one process, which is a group by itself; the ranks test the rest."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from ewc_lib._alone import alone
from ewc_lib._gathering import Layers
from ewc_lib._sharded import is_absent, present


@pytest.fixture(autouse=True)
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def nets():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    sharded = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    sharded.load_state_dict(model.state_dict())
    for layer in (sharded[0], sharded[2]):
        fully_shard(layer)
    return model, sharded


def layers_of(model, wide=True):
    return Layers(model, None, adds=True, wide=wide)


def test_values_are_there_only_while_a_layer_runs():
    plain, model = nets()
    there = []
    for layer in (model[0], model[2]):
        layer.register_forward_hook(
            lambda *_: there.append([not is_absent(layer.weight) for layer in (model[0], model[2])])
        )
    x = torch.randn(5, 3).double()
    with alone(model, layers_of(model)):
        assert all(map(is_absent, model.parameters()))
        assert model[0].weight.isnan().all()
        assert torch.equal(model(x), plain(x))
        assert all(map(is_absent, model.parameters()))
    assert there == [[True, False], [False, True]]
    assert not any(map(is_absent, model.parameters()))


def test_the_way_back_has_the_values_again_as_often_as_it_is_gone():
    plain, model = nets()
    x = torch.randn(5, 3).double().requires_grad_()
    expected = torch.autograd.grad(plain(x).square().sum(), [x, *plain.parameters()])
    with alone(model, layers_of(model)):
        value = model(x).square().sum()
        for _ in range(2):
            found = torch.autograd.grad(value, [x, *model.parameters()], retain_graph=True)
            assert all(map(torch.equal, found, expected))


def test_a_layer_that_fails_leaves_nothing_behind():
    plain, model = nets()
    x = torch.randn(5, 3).double()
    with alone(model, layers_of(model)):
        with pytest.raises(RuntimeError):
            model(torch.zeros(5, 7).double())
        assert all(map(is_absent, model.parameters()))
        assert torch.equal(model(x), plain(x))


def test_all_are_there_where_that_is_asked_for():
    plain, model = nets()
    with alone(model, layers_of(model)):
        with present(model.parameters()):
            for name, parameter in model.named_parameters():
                assert torch.equal(parameter, plain.get_parameter(name))
        assert all(map(is_absent, model.parameters()))


def test_transforms_of_functions_see_all_values():
    plain, model = nets()
    x = torch.randn(5, 3).double()
    expected = dict(plain.named_parameters())
    with alone(model, layers_of(model)), present(model.parameters()):
        own = {name: p.detach() for name, p in model.named_parameters()}
        value, pull = torch.func.vjp(lambda p: torch.func.functional_call(model, p, (x,)), own)
        found = pull(torch.ones_like(value))[0]
    gradients = torch.autograd.grad(plain(x).sum(), list(expected.values()))
    for name, gradient in zip(expected, gradients, strict=True):
        torch.testing.assert_close(found[name], gradient)


def test_half_precision_is_widened_with_its_inputs_or_left():
    x = torch.randn(5, 3).bfloat16()
    torch.manual_seed(0)
    half = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).bfloat16()
    fully_shard(half)
    with alone(half, layers_of(half)):
        assert half(x).dtype == torch.float32
    with alone(half, layers_of(half, wide=False)):
        assert half(x).dtype == torch.bfloat16


def test_sums_are_kept_in_parts_and_start_at_zero():
    _, model = nets()
    layers = layers_of(model)
    first, second = layers.stand_ins[:2]
    layers.add(first, torch.ones(first.shape, dtype=torch.double))
    layers.add(first, torch.ones(first.shape, dtype=torch.double))
    assert (layers.sum_of(0, torch.double).full_tensor() == 2).all()
    assert (layers.sum_of(1, torch.double).full_tensor() == 0).all()
    assert layers.sum_of(1, torch.double).shape == second.shape
    layers.serve()
