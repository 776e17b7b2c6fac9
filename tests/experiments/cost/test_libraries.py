import torch
import torch.nn.functional as F

from ewc_lib.experiments.cost import _libraries
from ewc_lib.experiments.cost._plain import cross_entropy
from ewc_lib.experiments.cost.benchmarks import _text
from ewc_lib.experiments.cost.models import GPT2


def test_a_loader_yields_the_same_batches_and_its_own_tensors():
    batches = [(torch.randn(7, 4), torch.arange(7)), (torch.randn(3, 4), torch.arange(3))]
    loaded = list(_libraries._loader(batches))
    assert [len(y) for _, y in loaded] == [7, 3]
    for (x, y), (x_loaded, y_loaded) in zip(batches, loaded, strict=True):
        assert torch.equal(x, x_loaded)
        assert torch.equal(y, y_loaded)
        assert x.data_ptr() != x_loaded.data_ptr()


def test_the_classes_are_moved_to_the_second_axis():
    model = GPT2(6, 5, width=4, layers=1, heads=2)
    x, y = _text(4, torch.Generator().manual_seed(0), length=5, vocabulary=6)
    moved = F.cross_entropy(_libraries.ClassesSecond(model)(x), y, reduction="sum")
    torch.testing.assert_close(moved, cross_entropy(model(x), y))
    assert y.is_contiguous()
