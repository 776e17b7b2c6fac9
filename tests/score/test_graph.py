"""What the graph of an output tells without any work on a device."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ewc_lib._precision import products
from ewc_lib.score.graph import NOTHING, Graph
from tests.scenarios import HiddenLinear

EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float64, torch.float32, torch.bfloat16)}


def weights(n=2):
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(3, 3, dtype=torch.float64)) for _ in range(n)]


def x(n=4):
    return torch.ones(n, 3, dtype=torch.float64)


W, V = weights()


@pytest.mark.parametrize("n", [1, 5])
def test_the_same_operations_have_the_same_signature_for_any_batch(n):
    assert Graph.of(F.linear(x(n), W)).signature == Graph.of(F.linear(x(), W)).signature


@pytest.mark.parametrize(
    "other",
    [
        lambda: F.linear(x(), V),
        lambda: F.linear(x(), W) + F.linear(x(), W),
        lambda: torch.tanh(F.linear(x(), W)),
        lambda: x() @ W.mT.contiguous(),
        lambda: HiddenLinear.apply(x(), W),
        lambda: F.linear(x(), W) + HiddenLinear.apply(x(), V),
    ],
)
def test_other_operations_parameters_or_connections_have_another_signature(other):
    assert Graph.of(other()).signature != Graph.of(F.linear(x(), W)).signature


def test_functions_of_ones_own_are_seen():
    assert Graph.of(F.linear(x(), W) + HiddenLinear.apply(x(), V)).has_custom_functions
    assert not Graph.of(F.linear(x(), W)).has_custom_functions


def test_an_output_without_a_gradient_has_no_graph():
    assert Graph.of(x()) is NOTHING
    assert NOTHING.eps() == 0
    assert NOTHING.eps_of(W) == 0


def test_precision_is_that_of_the_coarsest_operation_on_the_way_to_a_parameter():
    h = F.linear(x(), W).bfloat16().double()
    graph = Graph.of(F.linear(h, V) + F.linear(x(), V))
    assert graph.eps() == graph.eps_of(W) == EPS[torch.bfloat16]
    assert graph.eps_of(V) == EPS[torch.float64]


def test_the_coarsest_of_several_ways_counts():
    graph = Graph.of(F.linear(x(), W) + F.linear(x().float(), W.float()).double())
    assert graph.eps_of(W) == EPS[torch.float32]
    assert (
        graph.eps(graph_end := torch.autograd.graph.get_gradient_edge(W).node) == EPS[torch.float32]
    )
    assert graph_end is not None


def test_what_has_no_gradient_does_not_count():
    mask = (x() > 0).bfloat16()
    assert Graph.of(F.linear(x(), W) * mask.double()).eps() == EPS[torch.float64]


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_single_precision_counts_as_half_of_it_where_products_may_be_rounded(dtype):
    graph = Graph.of(F.linear(x().to(dtype), W.to(dtype)).abs().sum())
    with products("high"):
        coarse = Graph.of(F.linear(x().to(dtype), W.to(dtype)).abs().sum())
        double = Graph.of(F.linear(x(), W))
    assert graph.eps() == EPS[torch.float32]
    assert coarse.eps() == torch.finfo(torch.float16).eps
    assert double.eps() == EPS[torch.float64]
