"""What holds for one process that shares tensors with nobody; the ranks test the rest."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from ewc_lib._sharded import (
    any_sharded,
    is_absent,
    is_sharded,
    part_like,
    placed_like,
    present,
    reshard,
    total,
    whole,
)


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_plain_tensors_are_whole_and_stay_themselves():
    x = torch.randn(3)
    assert not is_sharded(x)
    assert whole(x) is x
    assert part_like(x, x) is x
    assert placed_like({"x": x}, {"x": x})["x"] is x
    assert total([x.sum(), x.sum()]) == 2 * x.sum()


def test_tensors_go_where_others_are_and_back(mesh):
    x = torch.randn(4, 3, dtype=torch.double, requires_grad=True)
    like = distribute_tensor(torch.zeros(4, 3, dtype=torch.double), mesh, [Shard(0)])
    assert any_sharded([x, like])
    part = part_like(like, x)
    assert part.placements == (Shard(0),)
    assert part_like(distribute_tensor(x, mesh, [Replicate()]), part).placements == (Replicate(),)
    found = part_like(torch.zeros(4, 3), part)
    assert type(found) is torch.Tensor
    (gradient,) = torch.autograd.grad((found**2).sum(), x)
    assert torch.equal(gradient, 2 * x)


def test_scalars_of_several_kinds_add_up_to_a_plain_number(mesh):
    x = torch.randn(4, 3, dtype=torch.double)
    kinds = [distribute_tensor(x, mesh, [way]).sum() for way in (Shard(0), Shard(1), Replicate())]
    found = total([*kinds, x.sum()])
    assert not isinstance(found, DTensor)
    torch.testing.assert_close(found, 4 * x.sum())


def test_outer_modules_hold_their_part_again(mesh):
    model = fully_shard(nn.Linear(3, 2))
    model(torch.zeros(1, 3))
    assert not is_sharded(model.weight)
    reshard(model)
    assert is_sharded(model.weight)


def test_what_has_values_is_not_absent():
    values = [torch.zeros(()), torch.zeros(1).expand(3), nn.Parameter(torch.zeros(2, 2))]
    assert not any(map(is_absent, values))
    with present(values):
        pass
