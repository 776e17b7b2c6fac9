from functools import partial

import pytest
import torch
from torch import nn

from ewc_lib.continual import mlp
from ewc_lib.experiments.cost.benchmarks import BENCHMARKS, Benchmark, _vectors
from ewc_lib.experiments.cost.counts import Asked, Count, asked, count, count_all, table
from ewc_lib.experiments.cost.peers import CONTESTANTS, PEERS, plain_pass

TINY = Benchmark(
    "Tiny MLP",
    partial(mlp, (4, 5, 3), 0),
    partial(_vectors, shape=(4,), classes=3),
    batch_size=4,
)


def test_views_and_empty_memory_are_free():
    x = torch.ones(4, 6)
    found = asked(lambda: x.mT.reshape(3, 8)[1:].unsqueeze(0).expand(2, 2, 8).unbind(0))
    assert found.operations == 1  # the transposed matrix has to be copied before it is read anew
    assert asked(lambda: torch.empty(3, 4).detach().view(-1).split(5)).operations == 0
    assert found.waits == 0


def test_what_is_known_without_the_device_is_free():
    x = torch.ones(3)
    found = asked(lambda: (torch.ops.aten.promote_types(x.dtype, torch.float64), x.is_same_size(x)))
    assert found.operations == found.waits == 0


def test_every_operation_that_computes_is_a_kernel():
    x = torch.ones(4, 4)
    assert asked(lambda: x @ x + 1).operations == 2
    assert asked(lambda: torch.zeros(3).add_(1).clone()).operations == 3
    assert asked(lambda: torch._foreach_mul([x, x, x], 2.0)).operations == 1


@pytest.mark.parametrize(
    "wait",
    [
        torch.Tensor.item,
        bool,
        float,
        lambda x: torch.equal(x, x),
        lambda x: x.expand(3).nonzero(),
        lambda x: x.expand(3)[torch.tensor([True, False, True])],
        lambda x: x.expand(3).masked_select(torch.tensor([True, False, True])),
        lambda x: x.expand(3).unique(),
        lambda x: torch.zeros(3).index_put_((torch.tensor([True, False, True]),), x),
    ],
)
def test_what_needs_a_number_waits_once(wait):
    x = torch.tensor(2.0)
    assert asked(lambda: wait(x)).waits == 1


def test_what_is_looked_up_by_numbers_does_not_wait():
    x = torch.ones(3)
    assert asked(lambda: x[torch.tensor([0, 2])]).waits == 0


def test_counting_ends_with_its_block():
    with Asked() as found:
        torch.ones(2).add_(1)
    before = found.operations
    torch.ones(2).add_(1)
    assert found.operations == before == 2


def test_a_plain_pass_costs_one_pass_for_each_batch_and_nothing_once():
    assert count(plain_pass, TINY) == Count(1, 0, 0, 0)


def test_what_is_paid_once_is_told_from_what_every_batch_costs():
    def run(model, batches):
        for _ in range(2):
            plain_pass(model, batches)
        for _, y in batches:
            y.sum().item()
        plain_pass(model, batches[:1])
        torch.ones(()).item()

    model, batches = TINY.model(), TINY.batches(4)
    plain = asked(lambda: plain_pass(model, batches)).operations
    found = count(run, TINY)
    assert found.waits == found.waits_once == 1
    assert found.each == pytest.approx(2 + 1 / plain)
    assert found.once == pytest.approx(1 + 1 / plain)


def test_a_loop_starts_kernels_for_every_observation_and_vmap_for_a_batch():
    loop, by_vmap = (count(PEERS[name]["empirical"], TINY) for name in ("loop", "torch.func"))
    assert loop.each > TINY.batch_size  # kernels to square and to add, besides those of passes
    assert by_vmap.each < TINY.batch_size


def test_the_exact_kind_is_counted_where_it_is_within_reach():
    found = count_all({"a": TINY, "b": TINY._replace(exact=False)})
    assert [kind for name, kind in found if name == "a"] == ["empirical", "sketch", "exact"]
    assert [kind for name, kind in found if name == "b"] == ["empirical", "sketch"]


def test_attention_and_convolutions_are_counted_alike():
    model = nn.Conv2d(1, 1, 3)
    found = asked(lambda: model(torch.ones(1, 1, 4, 4)).sum().backward())
    assert found.calls["convolution"] == found.calls["convolution_backward"] == 1


def test_the_table_has_a_line_for_each_model_and_kind():
    found = {("cnn", "exact"): Count(19.2, 3, 16.14, 120), ("mlp", "sketch"): Count(1, 0, 0, 0)}
    *_, one, other = table(found).splitlines()
    assert one.split() == ["cnn", "exact", "19.20", "3.0", "16.1", "120"]
    assert other.split() == ["mlp", "sketch", "1.00", "0.0", "0.0", "0"]


MOST = {
    ("cnn", "empirical"): 1.8,
    ("cnn", "sketch"): 2.0,
    ("cnn", "exact"): 4.0,
    ("transformer", "empirical"): 1.6,
    ("transformer", "sketch"): 1.7,
    ("transformer", "exact"): 4.0,
}


@pytest.mark.parametrize(("name", "kind"), MOST)
def test_an_accelerator_is_asked_for_little_more_than_a_plain_pass(name, kind):
    """And waited for once a batch: all checks are read together."""
    found = count(CONTESTANTS["ewc_lib"][kind], BENCHMARKS[name])
    assert found.each <= MOST[name, kind]
    assert found.waits <= 1
    assert found.waits_once <= 6


def test_a_list_of_numbers_is_waited_for():
    assert asked(lambda: torch.ones(3).tolist()).waits == 1
    assert asked(lambda: torch.ones(3).sum()).waits == 0
