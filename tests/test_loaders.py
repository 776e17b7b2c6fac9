import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    TensorDataset,
)

from ewc_lib._loaders import Unpadded, unpadded

SIZES = [(n, size, ranks) for n in (1, 5, 8, 9, 13, 24) for size, ranks in ((2, 2), (4, 3))]


def numbered(n):
    return TensorDataset(torch.arange(n), torch.arange(n))


def seen(loader):
    return [int(x) for batch in loader for x in batch[0]]


def on_all(loaders):
    return sorted(x for loader in loaders for x in seen(unpadded(loader)))


def with_sampler(dataset, size, ranks, rank, **options):
    sampler = DistributedSampler(dataset, ranks, rank, **options)
    return DataLoader(dataset, size, sampler=sampler)


@pytest.mark.parametrize(("n", "size", "ranks"), SIZES)
class TestTogether:
    @pytest.mark.parametrize("shuffle", [True, False])
    def test_a_distributed_sampler_gives_each_observation_once(self, n, size, ranks, shuffle):
        loaders = [with_sampler(numbered(n), size, ranks, r, shuffle=shuffle) for r in range(ranks)]
        assert on_all(loaders) == list(range(n))

    @pytest.mark.parametrize("even_batches", [True, False])
    @pytest.mark.parametrize("shuffle", [True, False])
    @pytest.mark.parametrize("split_batches", [True, False])
    def test_accelerate_gives_each_observation_once(
        self, n, size, ranks, even_batches, shuffle, split_batches
    ):
        def prepared(rank):
            own = size * ranks if split_batches else size
            generator = torch.Generator().manual_seed(0)
            loader = DataLoader(numbered(n), own, shuffle=shuffle, generator=generator)
            return prepare_data_loader(
                loader,
                num_processes=ranks,
                process_index=rank,
                split_batches=split_batches,
                even_batches=even_batches,
            )

        assert on_all([prepared(rank) for rank in range(ranks)]) == list(range(n))

    @pytest.mark.parametrize("split_batches", [True, False])
    def test_a_stream_whose_length_is_known_gives_each_once(self, n, size, ranks, split_batches):
        class Stream(IterableDataset):
            def __len__(self):
                return n

            def __iter__(self):
                return iter(numbered(n))

        def prepared(rank):
            loader = DataLoader(Stream(), size * ranks if split_batches else size)
            return prepare_data_loader(
                loader, num_processes=ranks, process_index=rank, split_batches=split_batches
            )

        assert on_all([prepared(rank) for rank in range(ranks)]) == list(range(n))


@pytest.mark.parametrize(
    "batch",
    [
        lambda x: {"x": x, "labels": x},
        lambda x: [{"a": x, "b": (x, x)}, x],
        lambda x: (x.numpy(), x.numpy()),
    ],
    ids=["dict", "nested", "arrays"],
)
def test_batches_of_any_form_are_cut(batch):
    dataset = numbered(5)
    sampler = DistributedSampler(dataset, 2, 1, shuffle=False)
    loader = DataLoader(dataset, 3, sampler=sampler)
    loader.collate_fn = lambda rows: batch(torch.stack([x for x, _ in rows]))
    (found,) = unpadded(loader)
    whole = batch(torch.tensor([1, 3]))
    assert str(found) == str(tuple(whole) if isinstance(whole, list) else whole)


def test_a_loader_is_read_to_its_end_where_others_may_wait():
    read = []

    def batches():
        for i in range(4):
            read.append(i)
            yield torch.zeros(2), torch.zeros(2)

    assert len(list(Unpadded(batches(), lambda seen, n: max(0, min(n, 3 - seen))))) == 2
    assert read == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "data",
    [
        (torch.zeros(3), torch.zeros(3)),
        [(torch.zeros(3), torch.zeros(3))],
        DataLoader(numbered(5), 2),
        DataLoader(numbered(5), 2, sampler=DistributedSampler(numbered(5), 2, 0, drop_last=True)),
        DataLoader(numbered(6), 2, sampler=DistributedSampler(numbered(6), 2, 0)),
        prepare_data_loader(DataLoader(numbered(5), 2), num_processes=1, process_index=0),
        prepare_data_loader(
            DataLoader(numbered(5), 2, drop_last=True), num_processes=2, process_index=0
        ),
    ],
    ids=["tuple", "list", "loader", "dropped", "even", "one process", "dropped by accelerate"],
)
def test_what_repeats_nothing_is_left_alone(data):
    assert unpadded(data) is data


class Reversed(DistributedSampler):
    def __iter__(self):
        return reversed(list(super().__iter__()))


class Pairs(BatchSampler):
    pass


def unknown():
    dataset = numbered(5)
    shard = {"num_processes": 2, "process_index": 0}
    sampler = DistributedSampler(dataset, 2, 0)

    class Stream(IterableDataset):
        def __iter__(self):
            return iter(dataset)

    return {
        "Reversed": DataLoader(dataset, 2, sampler=Reversed(dataset, 2, 0)),
        "Pairs": DataLoader(dataset, batch_sampler=Pairs(sampler, 2, False)),
        "Stream": prepare_data_loader(DataLoader(Stream(), 2), **shard),
        "SkipBatchSampler": skip_first_batches(
            prepare_data_loader(DataLoader(dataset, 2), **shard), 1
        ),
        "Pairs of accelerate": prepare_data_loader(
            DataLoader(dataset, batch_sampler=Pairs(RandomSampler(dataset), 2, False)), **shard
        ),
    }


@pytest.mark.parametrize("name", unknown())
def test_what_cannot_be_known_is_told_by_name(name):
    loader = unknown()[name]
    with pytest.warns(RuntimeWarning, match=f"^{name.split()[0]} gives some observations to two"):
        assert unpadded(loader) is loader
