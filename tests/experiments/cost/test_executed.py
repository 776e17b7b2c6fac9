from functools import partial

import pytest

from ewc_lib.experiments.cost.benchmarks import BENCHMARKS, LARGE
from ewc_lib.experiments.cost.executed import executed, work_of
from ewc_lib.experiments.cost.model import SHAPES, Shape
from ewc_lib.experiments.cost.peers import CONTESTANTS, plain_pass


@pytest.mark.parametrize("name", ["mlp", "cnn", "cnn-norms", "transformer"])
def test_the_work_of_a_model_is_what_is_executed(name):
    model, (work, columns) = BENCHMARKS[name].model(), work_of(BENCHMARKS[name])
    for kind, k in {"sketch": 1, "exact": columns}.items():
        run = partial(CONTESTANTS["ewc_lib"][kind], model)
        found = executed(run, BENCHMARKS[name].batches)
        # Squares are counted if they are added up by a product.
        assert work._replace(squares=0).diagonal(k) <= found <= work.diagonal(k)
    assert executed(partial(plain_pass, model), BENCHMARKS[name].batches) == work.plain
    assert columns == 9


def test_the_work_of_gpt2_is_that_of_its_shape():
    assert work_of(BENCHMARKS["gpt2"]) == (SHAPES["measured here"].work, 999)


def test_the_work_of_a_large_model_is_found_without_its_values():
    shape = Shape(12, 768, 50_257, 256)
    assert work_of(LARGE["gpt2-124m"])[0] == shape.work
    work, columns = work_of(LARGE["resnet18"])
    assert columns == 99
    assert work.forward == 555_468_800
