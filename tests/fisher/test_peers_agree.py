"""What other libraries compute, where they can, is what this package computes."""

import importlib

import pytest
import torch

from ewc_lib.experiments.cost.benchmarks import BENCHMARKS
from ewc_lib.experiments.cost.peers import CONTESTANTS, answer

MODULES = {"nngeometry": "nngeometry", "BackPACK": "backpack"}


@pytest.fixture(params=MODULES)
def library(request):
    try:
        importlib.import_module(MODULES[request.param])
    except ImportError as missing:
        pytest.skip(f"{request.param} is not installed (pip install 'ewc_lib[peers]'): {missing}")
    return request.param


@pytest.mark.parametrize("kind", ["empirical", "exact"])
@pytest.mark.parametrize("model", ["mlp", "cnn", "cnn-norms"])
def test_the_diagonal_is_that_of_other_libraries(library, model, kind):
    theirs = answer(CONTESTANTS[library][kind], BENCHMARKS[model])
    ours = answer(CONTESTANTS["ewc_lib"][kind], BENCHMARKS[model])
    assert theirs.keys() == ours.keys()
    for name, f in ours.items():
        assert f.dtype == theirs[name].dtype == torch.float64
        torch.testing.assert_close(theirs[name], f, rtol=1e-9, atol=1e-12 * float(f.max()))
