"""A random part of data that can be asked for any observation; the first ones of others."""

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    StackDataset,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)

from ewc_lib import EWC, Fisher, fisher_information
from ewc_lib._batches import batches
from ewc_lib._drawing import random_part
from ewc_lib.fisher import MatrixFree
from ewc_lib.regularizers import EWCDR, KroneckerLaplace
from tests.scenarios import cut, same

N, SOME = 40, 12
X, Y = torch.arange(2.0 * N).reshape(N, 2) / N, torch.arange(N) % 2
CPU = torch.device("cpu")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def numbers(data, n_samples=SOME, seed=0):
    """Return the numbers of the observations that are drawn, and read."""
    part = random_part(data, n_samples, seeded(seed))
    found = [batch.inputs for batch in batches(part, CPU, n_samples)]
    found = [x["x"] if isinstance(x, dict) else x for x in found]
    return (torch.cat([x[0] if isinstance(x, tuple) else x for x in found])[:, 0] * N / 2).tolist()


def loader(data=None, **options):
    return DataLoader(data or TensorDataset(X, Y), **{"batch_size": 5} | options)


def dicts(rows):
    return {"x": torch.stack([x for x, _ in rows]), "labels": torch.stack([y for _, y in rows])}


DRAWN = {
    "one tuple": lambda: (X, Y),
    "one tuple of several inputs": lambda: ((X, X), Y),
    "one tuple of named inputs": lambda: ({"x": X}, Y),
    "one tuple of arrays": lambda: (X.numpy(), Y.numpy()),
    "a loader": loader,
    "a loader with its own way to collate": lambda: loader(collate_fn=dicts),
    "a loader of another data set": lambda: loader(StackDataset(X, Y)),
    "a loader of a part": lambda: loader(Subset(TensorDataset(X, Y), range(N))),
    "a loader with a sampler in order": lambda: loader(sampler=SequentialSampler(X)),
}


@pytest.mark.parametrize("make", DRAWN.values(), ids=DRAWN)
def test_what_can_be_indexed_gives_a_random_part_that_the_generator_alone_decides(make):
    found = numbers(make())
    expected = torch.randperm(N, generator=seeded())[:SOME].sort().values.tolist()
    assert found == expected != list(range(SOME))
    assert numbers(make()) == found
    assert numbers(make(), seed=1) != found
    assert len(set(numbers(make(), seed=1))) == SOME


class Fewer(SequentialSampler):
    """A sampler that knows better."""

    def __iter__(self):
        return iter(range(SOME + 1))


class Own(DataLoader):
    """A loader that somebody has changed."""


IN_THEIR_OWN_ORDER = {
    "a list of batches": lambda: cut(X, Y, 5),
    "a generator of batches": lambda: iter(cut(X, Y, 5)),
    "a tuple of batches": lambda: tuple(cut(X, Y, 5)),
    "a loader with another sampler": lambda: loader(sampler=Fewer(X)),
    "a loader with other batches": lambda: DataLoader(
        TensorDataset(X, Y), batch_sampler=list(torch.arange(N).reshape(-1, 4).tolist())
    ),
    "a loader that drops what is left": lambda: loader(drop_last=True),
    "a loader of another class": lambda: Own(TensorDataset(X, Y), batch_size=5),
    "a loader without batches": lambda: DataLoader(
        TensorDataset(X.unflatten(0, (-1, 1)), Y.unflatten(0, (-1, 1))), batch_size=None
    ),
}


@pytest.mark.parametrize("make", IN_THEIR_OWN_ORDER.values(), ids=IN_THEIR_OWN_ORDER)
def test_of_other_data_the_first_ones_are_taken(make):
    assert numbers(make()) == list(range(SOME))


@pytest.mark.parametrize("sampler", ["shuffle", "random", "weighted"])
def test_a_loader_that_draws_goes_on_drawing_for_itself(sampler):
    def make():
        if sampler == "shuffle":
            return loader(shuffle=True, generator=seeded(5))
        if sampler == "random":
            return loader(sampler=RandomSampler(X, generator=seeded(5)))
        return loader(sampler=WeightedRandomSampler(torch.ones(N), N, generator=seeded(5)))

    own = [int(x[0] * N / 2) for batch, _ in make() for x in batch][:SOME]
    assert numbers(make()) == numbers(make(), seed=1) == own


def test_a_loader_over_a_part_keeps_what_it_was_told():
    def worker(number):
        return None

    given = loader(collate_fn=dicts, num_workers=2, timeout=7, worker_init_fn=worker)
    part = random_part(given, SOME, seeded())
    for name in ("collate_fn", "num_workers", "timeout", "worker_init_fn", "batch_size"):
        assert getattr(part, name) == getattr(given, name)
    assert len(given.dataset) == N


def test_all_of_them_and_too_many_are_left_to_whoever_reads():
    for data in ((X, Y), loader()):
        assert numbers(data, N) == list(range(N))
        with pytest.raises(ValueError, match=f"n_samples={N + 1}, but data holds only {N}"):
            numbers(data, N + 1)
    whole = cut(X, Y, 5)
    assert random_part(whole, None, seeded()) is whole


def test_nothing_is_drawn_where_all_are_used():
    generator = seeded()
    before = generator.get_state()
    random_part((X, Y), None, generator)
    random_part(cut(X, Y, 5), SOME, generator)
    assert same(generator.get_state(), before)


USERS = {
    "fisher_information": lambda m, d, n, g: fisher_information(m, d, n_samples=n, generator=g),
    "eigenkronecker": lambda m, d, n, g: fisher_information(
        m, d, structure="eigenkronecker", n_samples=n, generator=g
    ),
    "EWC": lambda m, d, n, g: EWC(m, 1.0).consolidate(d, n_samples=n, generator=g),
    "EWC with a number": lambda m, d, n, g: EWC(m, 1.0, n_samples=n).consolidate(d, generator=g),
    "EWC-DR": lambda m, d, n, g: EWCDR(m, 1.0).consolidate(d, n_samples=n, generator=g),
    "Kronecker Laplace": lambda m, d, n, g: KroneckerLaplace(m, 1.0).consolidate(
        d, n_samples=n, generator=g
    ),
}


@pytest.mark.parametrize("use", USERS.values(), ids=USERS)
def test_the_mean_is_over_the_observations_that_are_drawn(use):
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 2).double()
    x = X.double()
    rows = torch.randperm(N, generator=seeded(3))[:SOME].sort().values
    expected = use(model, (x[rows], Y[rows]), None, None)
    found = {
        "tuple": use(model, (x, Y), SOME, seeded(3)),
        "loader": use(model, loader(TensorDataset(x, Y)), SOME, seeded(3)),
    }
    for F in found.values():
        assert isinstance(F, Fisher)
        assert F.n_samples == SOME
        torch.testing.assert_close(F.to_dense(), expected.to_dense(), rtol=1e-12, atol=1e-15)


def test_every_product_without_a_matrix_is_of_the_same_part():
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 2).double()
    x, v = X.double(), torch.ones(6, dtype=torch.float64)
    F = MatrixFree(model, (x, Y), n_samples=SOME, generator=seeded(3))
    dense = fisher_information(
        model, (x, Y), structure="dense", n_samples=SOME, generator=seeded(3)
    )
    for _ in range(2):
        torch.testing.assert_close(F @ v, dense @ v, rtol=1e-10, atol=1e-14)


def test_a_batch_sampler_of_another_class_decides_for_itself():
    class Backwards(BatchSampler):
        def __iter__(self):
            return iter([[n] for n in range(SOME)])

    batch_sampler = Backwards(SequentialSampler(X), 1, False)
    assert numbers(DataLoader(TensorDataset(X, Y), batch_sampler=batch_sampler)) == list(
        range(SOME)
    )
