"""The same on a GPU as on the processor. All of it is skipped on a machine without one."""

from fnmatch import fnmatchcase

import pytest
import torch
from torch import nn

from ewc_lib import EWC, data, fisher_information
from ewc_lib.continual import MultiHead, average_accuracy, learn, mlp, permuted
from ewc_lib.experiments.cost.benchmarks import BENCHMARKS
from ewc_lib.experiments.cost.measure import peak_bytes
from ewc_lib.experiments.cost.peers import CONTESTANTS
from ewc_lib.experiments.cost.peers import error as error_of
from tests.regularizers.cases import METHODS, network, task
from tests.scenarios import N, relative_error
from tests.zoo import SINGLE_PRECISION, ZOO, error, measure, slower_than_expected, zoo_truth

if not torch.cuda.is_available():
    pytest.skip("this machine has no CUDA device", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings(
    "ignore:The PyTorch API of nested tensors", "ignore:LSTM with projections is not supported"
)

HELD = [name for name in ZOO if name.startswith(("positions_looked_up", "embedding_bag_with_off"))]
"""Entries that hold a plain tensor, which does not move with a model."""

MOVED = [name for name in ZOO if name not in HELD]
SLOWER = ("scripted",)
"""Entries that take a slower path than on the processor."""

ROUNDED = (*SINGLE_PRECISION, "llama_in_double_precision", "weight_norm*")
"""Entries whose operations round to single precision somewhere, on the GPU at least."""


def tolerance(name):
    return 1e-5 if any(fnmatchcase(name, pattern) for pattern in ROUNDED) else 1e-9


def on_gpu(case):
    return case._replace(model=case.model.to("cuda"))


@pytest.mark.parametrize("kind", ["exact", "empirical"])
@pytest.mark.parametrize("name", MOVED)
def test_the_diagonal_is_that_of_the_processor(name, kind):
    found = measure(on_gpu(ZOO[name]()), 1, N, kind=kind)
    assert all(value.is_cuda for value in found.diagonal().values())
    expected = zoo_truth(name).diagonal(kind)
    assert error({k: v.cpu() for k, v in found.diagonal().items()}, expected) < tolerance(name)


@pytest.mark.parametrize("name", [name for name in MOVED if name not in SLOWER])
def test_the_path_is_that_of_the_processor(name):
    assert not slower_than_expected(name, measure(on_gpu(ZOO[name]()), kind="empirical").paths)


@pytest.mark.parametrize("structure", ["dense", "block", "kronecker"])
def test_structures_are_those_of_the_processor(structure):
    here = measure(ZOO["mlp"](), structure=structure).to_dense()
    there = measure(on_gpu(ZOO["mlp"]()), structure=structure).to_dense()
    assert relative_error(there.cpu(), here) < 1e-9


@pytest.mark.parametrize("kind", ["exact", "sketch", "sampled", "empirical"])
def test_single_precision_with_dropout_leaves_the_random_state_of_the_gpu(kind):
    model = torch.nn.Sequential(mlp((64, 32, 10), seed=0), torch.nn.Dropout()).to("cuda")
    before = torch.cuda.get_rng_state()
    found = fisher_information(model, data.digits().train, kind=kind)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    assert all(value.isfinite().all() for value in found.diagonal().values())


def follow(name, device):
    """Learn two tasks in double precision and return the parameters."""
    model = network().to(device)
    method = METHODS[name](model, 0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for t in range(3):
        x, y = (tensor.to(device) for tensor in task(t))
        method.before_task()
        for _ in range(10):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            method.before_step(x)
            method.add_gradient_()
            optimizer.step()
            method.after_step()
        method.consolidate((x, y))
    return torch.cat([p.detach().cpu().flatten() for p in model.parameters()])


@pytest.mark.parametrize("name", METHODS)
def test_methods_train_as_on_the_processor(name):
    assert relative_error(follow(name, "cuda"), follow(name, "cpu")) < 1e-8


@pytest.mark.parametrize("mode", ["separate", "online"])
def test_a_penalty_whose_sums_are_kept_on_the_processor_is_the_same(mode):
    model, penalties = network().to("cuda"), []
    regularizers = [EWC(model, 0.5, mode), EWC(model, 0.5, mode, device="cpu")]
    for t in range(3):
        data_of_task = tuple(tensor.to("cuda") for tensor in task(t))
        for ewc in regularizers:
            ewc.consolidate(data_of_task)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1)
        penalties.append([ewc.penalty() for ewc in regularizers])
    for here, there in penalties:
        assert here.is_cuda
        assert there.is_cuda
        assert relative_error(there, here) < 1e-9


@pytest.mark.parametrize("proximal", [False, True])
def test_a_stream_is_learned_and_goes_on_from_a_checkpoint(tmp_path, proximal):
    stream = permuted(data.digits(), 3, seed=0)

    def attempt(checkpoint):
        model = MultiHead(mlp((64, 64, 10), seed=0)).to("cuda")
        method = EWC(model, strength=30.0)
        return learn(
            stream,
            model,
            method,
            steps=200,
            proximal=proximal,
            checkpoint=checkpoint,
            progress=False,
        )

    first = attempt(tmp_path / "stream.pt")
    assert average_accuracy(first.accuracies) > 0.5  # the proximal step holds on tightly
    again = attempt(tmp_path / "stream.pt")
    assert torch.equal(again.accuracies.nan_to_num(-1), first.accuracies.nan_to_num(-1))


CONTEST = [(library, kind) for library, kinds in CONTESTANTS.items() for kind in kinds]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("library", "kind"), CONTEST)
def test_every_contestant_of_the_benchmark_answers_on_the_gpu(library, kind):
    there = BENCHMARKS["mlp"]._replace(device="cuda")
    try:
        wrong_by = error_of(CONTESTANTS[library][kind], kind, there)
    except ImportError as missing:
        pytest.skip(f"{library} is not installed (pip install 'ewc_lib[peers]'): {missing}")
    assert kind in ("sketch", "sampled") or wrong_by < 1e-9


def test_the_peak_of_a_run_is_what_it_takes_of_the_memory_of_the_gpu():
    def take(model, batches):
        torch.empty(2**28, dtype=torch.uint8, device="cuda")

    there = BENCHMARKS["mlp"]._replace(device="cuda")
    nothing = peak_bytes(lambda model, batches: None, there, 256, 1)
    assert nothing >= 256 * 784 * 4
    assert peak_bytes(take, there, 256, 1) - nothing == pytest.approx(2**28, rel=0.01)


class Halves(nn.Module):
    """A model of two parts, of which the second stays in main memory."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)).to("cuda")
        self.second = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3))

    def forward(self, x):
        return self.second(self.first(x).tanh().cpu()).to("cuda")


def test_a_model_on_two_devices_has_the_information_of_one_on_a_single_device():
    torch.manual_seed(0)
    model, x, y = Halves(), torch.randn(40, 4), torch.arange(40) % 3
    found = fisher_information(model, (x.cuda(), y.cuda())).diagonal()
    alone = nn.Sequential(*model.first, nn.Tanh(), *model.second).cpu()
    expected = fisher_information(alone, (x, y)).diagonal()
    for a, b in zip(found.values(), expected.values(), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=1e-6)
