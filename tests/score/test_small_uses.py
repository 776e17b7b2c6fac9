"""A use that nobody saw is found out however small it is, whatever else the model computes."""

import pytest
import torch
import torch.nn.functional as F

from tests.scenarios import N, relative_error
from tests.zoo import Functional, error, measure, read, stir, truth
from tests.zoo.hidden import Small


def with_a_mask(dtype, size):
    """A linear map of double precision behind a mask, with an unseen use of its weight."""

    def body(p, x):
        h = F.linear(x, p.w) * (x > -1).to(dtype)
        return h + Small.apply(x, p.w, size) if size else h

    with torch.random.fork_rng():
        torch.manual_seed(0)
        case = read(stir(Functional(body, w=(4, 4))), torch.randn(N, 4))
    return case._replace(model=case.model.double(), x=case.x.double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-2, 1e-3, 1e-4, 1e-5])
def test_a_small_unseen_use_is_seen_beside_a_mask_of_any_precision(dtype, size):
    case = with_a_mask(dtype, size)
    found, expected = measure(case), truth(case)
    assert error(found.diagonal(), expected.diagonal("exact")) < 1e-10
    assert found.paths == {"body.w": "generic"}


@pytest.mark.parametrize("size", [1e-2, 1e-3, 1e-4, 1e-5])
def test_without_the_unseen_use_the_information_would_be_another(size):
    """So the test above could fail."""
    with_it, without = (
        truth(with_a_mask(torch.bfloat16, s)).diagonal("exact")["body.w"] for s in (size, 0.0)
    )
    assert relative_error(without, with_it) > size / 100


def test_a_mask_of_low_precision_costs_no_rule():
    found = measure(with_a_mask(torch.bfloat16, 0.0))
    assert found.paths == {"body.w": "rule"}
