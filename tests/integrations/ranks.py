"""What every rank does for the tests of `distributed`, which start it with torchrun.

Each check returns plain tensors, or the error that it met; rank ``r`` saves all its results
as ``r.pt`` in the folder that it is given.
"""

import sys
import warnings
import weakref
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from ewc_lib import EWC, freeze_norms
from ewc_lib import fisher_information as in_one_process
from ewc_lib._names import plain_name
from ewc_lib.integrations.distributed import all_reduce, fisher_information
from ewc_lib.regularizers import EWCDR, MAS, SI, AdapterEWC, KroneckerLaplace, LwF, Replay
from ewc_lib.regularizers.adapters import add_adapters

N = 23
STRUCTURES = ("diagonal", "block", "module", "dense", "kronecker", "kronecker-reduce")
CASES = [(kind, structure) for kind in ("exact", "empirical") for structure in STRUCTURES]


class Images(nn.Module):
    """Convolution, norm and linear map, and a parameter that goes through the generic path."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 2)
        self.norm = nn.BatchNorm2d(2)
        self.power = nn.Parameter(torch.tensor([1.5, 2.0]))
        self.head = nn.Linear(2, 3)

    def forward(self, x):
        hidden = self.norm(self.conv(x)).sigmoid().mean((2, 3))
        return self.head(hidden**self.power)


class Words(nn.Module):
    """Tied, frozen and recurrent parameters."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.recur = nn.GRU(4, 4, batch_first=True)
        self.mix = nn.Linear(4, 4)
        self.mix.bias.requires_grad_(False)
        self.head = nn.Linear(4, 6)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.mix(self.recur(self.embed(x))[0][:, -1]).tanh())


class Towers(nn.Module):
    """Equal blocks, each with a linear map and a normalisation, and small ends.

    They are wider than there are observations, so that no result has the size of a weight.
    """

    def __init__(self, blocks=8, width=N + 6):
        super().__init__()
        self.first = nn.Linear(3, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.Tanh())
            for _ in range(blocks)
        )
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        hidden = self.first(x)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.head(hidden)


def towers():
    torch.manual_seed(0)
    return Towers().double(), torch.randn(N, 3).double(), torch.arange(N) % 3


def together(model):
    fully_shard([model.blocks[0], model.blocks[1]])
    fully_shard(model)
    return {}


def only_blocks(model):
    for block in model.blocks:
        fully_shard(block)
    return {}


def frozen(model):
    for parameter in model.blocks[1:5].parameters():
        parameter.requires_grad_(False)
    return only_blocks(model)


def mixed(model):
    fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    return {}


def half(model):
    model.bfloat16()
    return only_blocks(model)


def for_itself(model):
    fully_shard(model)
    return {"group": False}


def recomputed(model):
    for i, block in enumerate(model.blocks):
        model.blocks[i] = fully_shard(checkpoint_wrapper(block))
    fully_shard(model)
    return {}


WAYS = {
    way.__name__: way
    for way in (together, only_blocks, frozen, mixed, half, for_itself, recomputed)
}


class Watch(TorchDispatchMode):
    """Count the bytes of all tensors as large as the weight of a block that exist at once."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            large = type(tensor) is torch.Tensor and tensor.numel() == (N + 6) ** 2
            if large and not tensor.is_meta:
                storage = tensor.untyped_storage()
                if not getattr(storage, "seen", False):
                    storage.seen = True
                    self._count(storage.nbytes())
                    weakref.finalize(storage, self._count, -storage.nbytes())
        return found

    def _count(self, nbytes):
        self.now += nbytes
        self.most = max(self.most, self.now)


def images():
    torch.manual_seed(0)
    model = Images().double()
    freeze_norms(model)
    return model, torch.randn(N, 1, 4, 4).double(), torch.arange(N) % 3


def words():
    torch.manual_seed(0)
    return Words().double(), torch.randint(0, 6, (N, 5)), torch.arange(N) % 6


def part(rank, ranks):
    """Shards of 5 and 18 observations, or of 5, 0, 4 and 14."""
    bounds = {2: [0, 5, N], 4: [0, 5, 5, 9, N]}[ranks]
    return slice(bounds[rank], bounds[rank + 1])


def as_batches(x, y, size=2):
    """Cut data into a list of batches, of which there are none for no data."""
    return list(zip(x.split(size), y.split(size), strict=True)) if len(x) else []


def read_never():
    """Fail as soon as anybody reads the data."""
    raise AssertionError("the data were read")
    yield


def with_adapters(model):
    """Put an adapter into a network, whether it is in a wrapper or not."""
    torch.manual_seed(1)
    add_adapters(getattr(model, "module", model), ["head"], rank=2)
    return model


METHODS = {
    "EWC": lambda model: EWC(model, strength=10.0),
    "EWC in blocks": lambda model: EWC(model, strength=10.0, structure="block"),
    "KroneckerLaplace": lambda model: KroneckerLaplace(model, strength=10.0),
    "MAS": lambda model: MAS(model, strength=10.0),
    "EWCDR": lambda model: EWCDR(model, strength=10.0),
    "AdapterEWC": lambda model: AdapterEWC(with_adapters(model), strength=10.0),
}
"""Those that compute an importance at the end of a task."""


def precision_and_penalty(regularizer):
    """Return what is remembered, and the penalty one step aside."""
    with torch.no_grad():
        for p in regularizer.model.parameters():
            p += 1
    precision = regularizer.precision
    return precision.n_samples, precision.to_dense(), regularizer.penalty().detach()


def aside(regularizer):
    """Return the penalty a step aside."""
    with torch.no_grad():
        for p in regularizer.model.parameters():
            p += 0.1
    return regularizer.penalty().detach()


def trained(model, ewc, *parts):
    """Return the gradients with a penalty in the loss, without, and after a step of each kind."""

    def gradients():
        own = dict(ewc.model.named_parameters())
        found = {n: p.grad for n, p in own.items() if p.grad is not None}
        model.zero_grad()
        return whole(found)

    def loss():
        return sum(nn.functional.cross_entropy(model(x), y) for x, y in parts) / len(parts)

    found = {"penalty": aside(ewc)}
    (loss() + ewc.penalty()).backward()
    found["in the loss"] = gradients()
    loss().backward()
    ewc.add_gradient_()
    found["added"] = gradients()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    loss()  # and with it, outer modules hold whole parameters for a way back
    ewc.proximal_step_(optimizer)
    found["step"] = whole(dict(model.named_parameters()))
    return found


ATTACHED = {
    "EWC": lambda model: EWC(model, strength=10.0),
    "SI": lambda model: SI(model, strength=10.0),
    "LwF": lambda model: LwF(model, strength=3.0),
    "replay": lambda model: Replay(model, strength=3.0, capacity=2, batch_size=4),
}
"""Those that act in the steps of an optimizer, however their gradient comes about."""


def learned(name, rank, ranks, wrap):
    """Learn a second task in which each process has equal parts, and return the parameters."""
    torch.manual_seed(0)
    model = wrap(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double())
    x, y = torch.randn(32, 3, dtype=torch.float64), torch.arange(32) % 2
    regularizer = ATTACHED[name](model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    regularizer.attach(optimizer)
    for task in range(2):
        own = slice(rank, None, ranks)
        for _ in range(4):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[own] + task), y[own]).backward()
            optimizer.step()
        regularizer.consolidate((x[own] + task, y[own]))
    return whole(dict(model.named_parameters()))


def whole(tensors):
    plain = {n: getattr(t, "full_tensor", lambda t=t: t)() for n, t in tensors.items()}
    return {n.removeprefix("module."): t.detach().clone() for n, t in plain.items()}


class Checks:
    """Every check is a method; all are run in the order of their names."""

    def __init__(self):
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.model, x, y = images()
        self.own = part(self.rank, self.ranks)
        self.x, self.y = x[self.own], y[self.own]

    def attached(self):
        def wrap(model):
            return DistributedDataParallel(model)

        return {name: learned(name, self.rank, self.ranks, wrap) for name in ATTACHED}

    def attached_without_the_wrapper(self):
        model = nn.Linear(3, 2)
        return LwF(model).attach(torch.optim.SGD(model.parameters(), lr=0.1))

    def cases(self):
        return {
            f"{kind} {structure}": fisher_information(
                self.model, (self.x, self.y), kind=kind, structure=structure
            ).state_dict()
            for kind, structure in CASES
        }

    def random(self):
        return {
            kind: fisher_information(self.model, as_batches(self.x, self.y), kind=kind).state_dict()
            for kind in ("sketch", "sampled")
        }

    def given_generator(self):
        generator = torch.Generator().manual_seed(100 + self.rank)
        F = fisher_information(self.model, (self.x, self.y), kind="sketch", generator=generator)
        return F.state_dict()

    def elastic_weight_consolidation(self):
        model = images()[0]
        ewc = EWC(model, strength=10.0)
        ewc.remember(fisher_information(model, (self.x, self.y)))
        with torch.no_grad():
            for p in model.parameters():
                p += 1
        return ewc.penalty().detach()

    def consolidated(self):
        """What each method makes of the data of all ranks, in the wrapper for training."""
        found = {}
        for name, make in METHODS.items():
            regularizer = make(DistributedDataParallel(images()[0]))
            regularizer.consolidate((self.x, self.y))
            found[name] = precision_and_penalty(regularizer)
        return found

    def consolidated_each_for_itself(self):
        made = {n: make(DistributedDataParallel(images()[0])) for n, make in METHODS.items()}
        for regularizer in made.values():
            regularizer.consolidate((self.x, self.y), group=False)
        return {name: precision_and_penalty(regularizer) for name, regularizer in made.items()}

    def consolidated_by_some(self):
        """The ranks at both ends."""
        group = dist.new_group([0, self.ranks - 1])
        ewc = EWC(self.model, strength=10.0)
        return ewc.consolidate((self.x, self.y), group=group).state_dict()

    def consolidated_twice(self):
        """The random numbers of two tasks, and of two ranks, differ."""
        ewc = EWC(self.model, strength=10.0, kind="sketch")
        x, y = images()[1:]  # the same on all ranks
        own = [ewc.consolidate((x, y), group=False).state_dict() for _ in range(2)]
        apart = [fisher_information(self.model, (x, y), kind="sketch").state_dict()]
        return own + apart

    def other_parameters_on_one_rank(self):
        with torch.no_grad():
            self.model.head.weight *= 1.0 + 0.01 * self.rank
        try:
            return EWC(self.model, strength=1.0).consolidate((self.x, self.y))
        finally:
            self.model = images()[0]

    def running_statistics_of_the_first_rank(self):
        model = DistributedDataParallel(images()[0])
        model.module.norm.running_mean += 0.1 + self.rank
        F = EWC(model, strength=1.0).consolidate((self.x, self.y))
        kept = model.module.norm.running_mean
        return {"F": F.state_dict(), "own kept": bool((kept == 0.1 + self.rank).all())}

    def sampled_for_all_ranks(self):
        """Of 23 observations, and of 1, which all but one rank only repeat."""
        _, x, y = images()
        return {
            n: EWC(self.model, strength=1.0).consolidate(self._loader(x[:n], y[:n])).state_dict()
            for n in (N, 1)
        }

    def _loader(self, x, y):
        dataset = TensorDataset(x, y)
        return DataLoader(dataset, 2, sampler=DistributedSampler(dataset))

    def dispatched_by_accelerate(self):
        from accelerate.data_loader import prepare_data_loader
        from accelerate.state import PartialState

        PartialState(cpu=True)
        _, x, y = images()
        counts = {}
        for split in (False, True):
            loader = DataLoader(TensorDataset(x, y), 4)
            prepared = prepare_data_loader(
                loader, put_on_device=True, dispatch_batches=True, split_batches=split
            )
            F = EWC(self.model, strength=1.0).consolidate(prepared)
            counts[split] = F.state_dict()
        fully_shard(model := images()[0])
        F = EWC(model, strength=1.0).consolidate(prepared)
        counts["sharded"] = whole(F.diagonal())
        return counts

    def half_precision(self):
        model = images()[0].bfloat16()
        return fisher_information(model, (self.x.bfloat16(), self.y)).state_dict()

    def first_rank_is_empty(self):
        """On the other ranks, the data are a list of batches; on this one, a used-up iterator."""
        data = iter([]) if self.rank == 0 else as_batches(self.x, self.y)
        return fisher_information(self.model, data, structure="kronecker").state_dict()

    def all_ranks_are_empty(self):
        return fisher_information(self.model, (self.x[:0], self.y[:0]))

    def one_rank_fails(self):
        y = self.y.clamp(min=100) if self.rank == self.ranks - 1 else self.y
        return fisher_information(self.model, (self.x, y))

    def one_rank_fails_while_it_reads(self):
        def batches():
            if self.rank == 0:
                raise OSError("the disk is gone\nand with it the data")
            yield from as_batches(self.x, self.y)

        return fisher_information(self.model, batches())

    def structures_that_do_not_add_up(self):
        found = {}
        for structure in ("eigenkronecker", "lowrank"):
            try:
                fisher_information(self.model, read_never(), structure=structure)
            except Exception as error:
                found[structure] = f"{type(error).__name__}: {error}"
        return found

    def ranks_of_other_parameters(self):
        params = "conv.*" if self.rank == self.ranks - 1 else "head.*"
        return fisher_information(self.model, (self.x, self.y), params=params)

    def ranks_of_other_dtypes(self):
        dtype = torch.float32 if self.rank == self.ranks - 1 else torch.float64
        return fisher_information(self.model, (self.x, self.y), dtype=dtype)

    def computed_before(self):
        """Each rank takes one observation more than the one before it."""
        _, x, y = images()
        F = in_one_process(self.model, (x[: 5 + self.rank], y[: 5 + self.rank]))
        return all_reduce(F).state_dict()

    def wrapped(self):
        """With buffers, a wrapper waits for the others in each forward pass."""
        model = DistributedDataParallel(self.model)
        F = fisher_information(model, as_batches(self.x, self.y, 1))
        return F.state_dict()

    def some_of_the_ranks(self):
        group = dist.new_group([0, self.ranks - 1])
        return fisher_information(self.model, (self.x, self.y), group=group).state_dict()

    def first_rank_alone(self):
        group = dist.new_group([0])
        return fisher_information(self.model, (self.x, self.y), group=group).state_dict()

    def sharded(self):
        def shard(model):
            fully_shard(model.mix)
            fully_shard(model)

        return self._sharded(shard)

    def sharded_and_replicated(self):
        shape = 2, self.ranks // 2
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
        return self._sharded(lambda model: fully_shard(model, mesh=mesh))

    def _sharded(self, shard):
        model, x, y = words()
        shard(model)
        own = x[self.own], y[self.own]
        warnings.filterwarnings("ignore", "vmap cannot follow FSDPWords", RuntimeWarning)
        nn.functional.cross_entropy(model(x), y).backward()
        before = {name: (p, p.grad) for name, p in model.named_parameters()}
        F = fisher_information(model, own)
        after = {name: (p, p.grad) for name, p in model.named_parameters()}
        whole = fisher_information(model, own, structure="kronecker")
        nn.functional.cross_entropy(model(x), y).backward()
        return {
            "untouched": all(
                a is b for name in before for a, b in zip(before[name], after[name], strict=True)
            ),
            "placed like the parameters": all(
                isinstance(f, DTensor)
                and f.placements == before[name][0].placements
                and f.to_local().shape == before[name][0].to_local().shape
                for name, f in F.diagonal().items()
            ),
            "diagonal": {name: f.full_tensor() for name, f in F.diagonal().items()},
            "quadratic": F.quadratic(F.diagonal()),
            "shares": [row.share for row in F.report()],
            "kronecker": whole.to_dense(),
            "gradients": {
                name: p.grad.full_tensor()
                for name, p in model.named_parameters()
                if p.grad is not None
            },
        }

    def trained_in_a_wrapper(self):
        model = DistributedDataParallel(images()[0])
        ewc = EWC(model, strength=10.0)
        ewc.consolidate((self.x, self.y))
        return trained(model, ewc, (self.x, self.y))

    def trained_sharded(self):
        warnings.filterwarnings("ignore", "vmap cannot follow FSDPWords", RuntimeWarning)
        found = {}
        for structure in STRUCTURES:
            model, x, y = words()
            fully_shard(model.mix)
            fully_shard(model)
            ewc = EWC(model, strength=10.0, structure=structure)
            ewc.consolidate((x[self.own], y[self.own]))
            found[structure] = trained(model, ewc, (x, y))
        return found

    def layer_by_layer(self):
        """The most bytes of whole parameters, and of what is like them, that exist at once."""
        warnings.filterwarnings("error")
        model, x, y = towers()
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
        own = slice(self.own.start, self.own.stop)
        with Watch() as watch:
            F = fisher_information(model, as_batches(x[own], y[own], 3))
        return {"F": whole(F.diagonal()), "most": watch.most, "n": F.n_samples}

    def sharded_in_other_ways(self):
        """Modules together, frozen parameters, mixed precision, half precision, each for itself."""
        return {name: self._in_a_way(change) for name, change in WAYS.items()}

    def _in_a_way(self, change):
        model, x, y = towers()
        options = change(model)
        data = (x, y) if options.get("group") is False else (x[self.own], y[self.own])
        if next(model.parameters()).dtype == torch.bfloat16:
            data = data[0].bfloat16(), data[1]
        F = EWC(model, strength=1.0).consolidate(data, **options)
        found = {plain_name(name): f for name, f in F.diagonal().items()}
        return {"F": whole(found), "n": F.n_samples}

    def random_and_sharded(self):
        model, x, y = towers()
        fully_shard(model)
        data = as_batches(x[self.own], y[self.own])
        return whole(fisher_information(model, data, kind="sketch").diagonal())

    def sharded_over_others(self):
        """The group has some of those who share the parameters."""
        group = dist.new_group([0])
        model, x, y = towers()
        fully_shard(model)
        return fisher_information(model, (x[self.own], y[self.own]), group=group)

    def nan_in_one_part(self):
        model, x, y = towers()
        with torch.no_grad():
            model.head.weight[-1] = torch.nan  # which only the last rank has
        fully_shard(model)
        return fisher_information(model, (x[self.own], y[self.own]))

    def states_go_over(self):
        """From a whole model to a sharded one, and back."""
        model, x, y = words()
        ewc = EWC(model, strength=10.0)
        ewc.consolidate((x, y), group=False)
        fully_shard(sharded := words()[0])
        other = EWC(sharded, strength=10.0)
        other.load_state_dict(ewc.state_dict())
        back = EWC(words()[0], strength=10.0)
        back.load_state_dict(other.state_dict())
        return [aside(regularizer) for regularizer in (ewc, other, back)]

    def sharded_and_one_rank_fails(self):
        model, x, y = words()
        fully_shard(model)
        wrong = 100 if self.rank == 0 else 0
        return fisher_information(model, (x[self.own], y[self.own] + wrong))


def attempt(check):
    try:
        return check()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def main(folder):
    dist.init_process_group("gloo", timeout=timedelta(minutes=5))
    warnings.simplefilter("error")
    warnings.simplefilter("ignore", FutureWarning)
    warnings.simplefilter("ignore", DeprecationWarning)
    checks = Checks()
    names = [name for name in vars(Checks) if not name.startswith("_")]
    results = {name: attempt(getattr(checks, name)) for name in names}
    torch.save(results, Path(folder) / f"{checks.rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
