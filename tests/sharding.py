"""What two processes do for the tests of states, which start them with torchrun.

Rank ``r`` saves its results as ``r.pt`` in the folder that it is given; each is a dict of plain
tensors and numbers, or the error that was met.
"""

import sys
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from ewc_lib import EWC, Fisher, fisher_information
from ewc_lib.files import card
from ewc_lib.regularizers import SI


def network(sharded=False):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))
    return fully_shard(model) if sharded else model


def task():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(12, 3, generator=generator), torch.arange(12) % 3


def consolidated(sharded, **options):
    """An EWC whose task was computed on the whole model, and then sharded as the model is."""
    model = network(sharded)
    whole = EWC(network(), 2.0, **options)
    whole.consolidate(task())
    ewc = EWC(model, 2.0, **options)
    ewc.load_state_dict(whole.state_dict())
    with torch.no_grad():
        for p in [*model.parameters(), *whole.model.parameters()]:
            p += 0.5
    return ewc, whole


def full(value):
    return value.full_tensor() if isinstance(value, DTensor) else value


def gathered(state):
    return {key: full(value) for key, value in state.items()}


def placed_alike(values, model):
    """Tell whether each process has of every tensor what it has of the parameter."""
    own = dict(model.named_parameters())
    return all(
        isinstance(value, DTensor)
        and value.placements == own[name].placements
        and value.to_local().shape == own[name].to_local().shape
        for name, value in values.items()
    )


class Checks:
    def __init__(self, folder):
        self.folder = Path(folder)

    def a_plain_state_in_a_sharded_model(self):
        ewc, whole = consolidated(sharded=True)
        ewc.add_gradient_()
        gradient = {n: full(p.grad) for n, p in ewc.model.named_parameters()}
        whole.add_gradient_()
        return {
            "anchor": placed_alike(ewc.anchor, ewc.model),
            "precision": placed_alike(ewc.precision.diagonal(), ewc.model),
            "state": gathered(ewc.state_dict()),
            "expected state": whole.state_dict(),
            "gradient": gradient,
            "expected gradient": {n: p.grad for n, p in whole.model.named_parameters()},
        }

    def a_sharded_state_in_a_plain_model(self):
        sharded, whole = consolidated(sharded=True)
        state = sharded.state_dict()
        ewc = EWC(network(), 2.0)
        ewc.load_state_dict(state)
        return {
            "was sharded": any(isinstance(value, DTensor) for value in state.values()),
            "is sharded": any(isinstance(value, DTensor) for value in ewc.state_dict().values()),
            "state": ewc.state_dict(),
            "expected state": whole.state_dict(),
        }

    def a_sharded_state_in_a_sharded_model(self):
        first, whole = consolidated(sharded=True)
        ewc = EWC(network(sharded=True), 2.0)
        ewc.load_state_dict(first.state_dict())
        return {
            "anchor": placed_alike(ewc.anchor, ewc.model),
            "state": gathered(ewc.state_dict()),
            "expected state": whole.state_dict(),
        }

    def a_matrix_in_a_sharded_model(self):
        ewc, whole = consolidated(sharded=True, structure="kronecker")
        return {
            "anchor": placed_alike(ewc.anchor, ewc.model),
            "state": gathered(ewc.state_dict()),
            "expected state": whole.state_dict(),
        }

    def a_model_that_is_sharded_after_its_task(self):
        return {
            f"{structure}, {dtype}": self._sharded_after(structure, dtype)
            for structure, dtype in [
                ("diagonal", torch.float32),
                ("kronecker", torch.float32),
                ("diagonal", torch.bfloat16),
            ]
        }

    def _sharded_after(self, structure, dtype):
        """Do the same with a model that stays whole, and with one that is sharded in between."""
        found = []
        for shards in (False, True):
            model = network().to(dtype)
            ewc = EWC(model, 2.0, structure=structure)
            x, y = task()
            ewc.consolidate((x.to(dtype), y), group=False)
            with torch.no_grad():
                for p in model.parameters():
                    p += 0.5
            ewc.proximal_step_(torch.optim.SGD(model.parameters(), lr=0.1))
            if shards:
                fully_shard(model)
                model(x.to(dtype))  # the outermost module goes on holding whole parameters
            penalty = ewc.penalty().detach()
            ewc.add_gradient_()
            gradient = {n: full(p.grad) for n, p in model.named_parameters()}
            ewc.proximal_step_(torch.optim.SGD(model.parameters(), lr=0.1))
            adam = torch.optim.Adam(model.parameters(), lr=0.1)
            adam.step()  # by the gradient of the penalty
            ewc.proximal_step_(adam)
            if structure == "diagonal":
                own = slice(dist.get_rank(), None, 2) if shards else slice(None)
                data = x[own].to(dtype), y[own]
                ewc.consolidate(data, group=None if shards else False)
            places = {n: full(p.detach()) for n, p in model.named_parameters()}
            placed = placed_alike(ewc.anchor, model) if shards else True
            found.append([placed, penalty, gradient, places, gathered(ewc.state_dict())])
        return found

    def the_memory_of_a_path(self):
        def moved(si):
            si.before_task()
            for p in si.model.parameters():
                p.grad = torch.ones_like(p)
            si.before_step()
            with torch.no_grad():
                for p in si.model.parameters():
                    p += 0.5
            si.after_step()
            return si

        sharded, plain = moved(SI(network(sharded=True), 2.0)), moved(SI(network(), 2.0))
        there, here = SI(network(sharded=True), 2.0), SI(network(), 2.0)
        there.load_state_dict(plain.state_dict())
        here.load_state_dict(sharded.state_dict())
        kept = there._memory
        return {
            "sharded": all(placed_alike(values, there.model) for values in kept.values()),
            "state": gathered(there.state_dict()),
            "other state": here.state_dict(),
            "expected state": plain.state_dict(),
        }

    def files(self):
        """Every process saves, and the first one writes."""
        path = self.folder / "sharded.safetensors"
        ewc, whole = consolidated(sharded=True)
        ewc.save(path, data="of two processes")
        dist.barrier()
        plain, again = EWC(network(), 2.0), EWC(network(sharded=True), 2.0)
        plain.load(path)
        again.load(path)
        F = fisher_information(network(), task())
        fisher = self.folder / "fisher.safetensors"
        if dist.get_rank() == 0:
            F.save(fisher, model=network())
        dist.barrier()
        found = Fisher.load(fisher, network(sharded=True))
        precision = self.folder / "precision.safetensors"
        ewc.precision.save(precision, model=ewc.model)
        dist.barrier()
        return {
            "data": card(path)["data"],
            "left": sorted(p.name for p in self.folder.glob("*draft*")),
            "state": plain.state_dict(),
            "sharded state": gathered(again.state_dict()),
            "expected state": whole.state_dict(),
            "fisher": found.state_dict(),
            "expected fisher": F.state_dict(),
            "precision": Fisher.load(precision, whole.model).state_dict(),
            "expected precision": whole.precision.state_dict(),
        }


def attempt(check):
    try:
        return check()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def main(folder):
    dist.init_process_group("gloo", timeout=timedelta(minutes=2))
    warnings.simplefilter("error")
    warnings.simplefilter("ignore", FutureWarning)
    warnings.simplefilter("ignore", DeprecationWarning)
    checks = Checks(folder)
    names = [name for name in vars(Checks) if not name.startswith("_")]
    results = {name: attempt(getattr(checks, name)) for name in names}
    torch.save(results, Path(folder) / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
