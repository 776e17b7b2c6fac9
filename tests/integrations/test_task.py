"""What the callbacks of all trainers share."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import IterableDataset

from ewc_lib import EWC
from ewc_lib.attaching import attachments
from ewc_lib.integrations._task import Task, in_batches
from ewc_lib.regularizers import L2, MAS, SI, AdapterEWC, KroneckerLaplace, LwF, add_adapters


def rows(loader):
    return [row for batch in loader for row in batch.tolist()]


def test_each_observation_is_read_once_in_a_random_order_that_is_always_the_same():
    data = torch.arange(50)
    before = torch.get_rng_state()
    first, second = (rows(in_batches(data, 8, None)) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert first == second != data.tolist()
    assert sorted(first) == data.tolist()


def test_data_that_have_an_order_of_their_own_keep_it():
    class Numbers(IterableDataset):
        def __iter__(self):
            return iter(range(9))

    assert rows(in_batches(Numbers(), 4, None)) == list(range(9))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def optimizers(model):
    return [torch.optim.SGD(layer.parameters(), 0.1) for layer in model]


def task(regularizer, whole=True):
    return Task(regularizer, None, None, whole, {})


def test_only_optimizers_that_move_what_is_held_are_attached_to():
    model = network()
    one, other = optimizers(model)
    own = task(EWC(model, 1.0, params=["1.*"]))
    own.begin([one, other], resumed=False)
    assert not one._optimizer_step_post_hooks
    assert other._optimizer_step_post_hooks
    own.begin([one, other], resumed=False)  # once more, and still once each
    assert len(other._optimizer_step_post_hooks) == 1
    own.stop()
    assert not own.attached
    assert not other._optimizer_step_post_hooks


@pytest.mark.parametrize("metric", [None, "optimizer", "euclidean"])
def test_the_metric_is_that_of_the_proximal_step(metric):
    model = network()
    adam = torch.optim.Adam(model.parameters())
    own = Task(EWC(model, 1.0), "proximal", metric, True, {})
    own.begin([adam], resumed=False)
    assert [one.metric for one in attachments(adam)] == [metric or "optimizer"]


def test_every_callback_hands_the_metric_on():
    for name in ("transformers", "lightning", "avalanche"):
        module = pytest.importorskip(f"ewc_lib.integrations.{name}")
        make = getattr(module, "EWCCallback", None) or module.EWCPlugin
        callback = make(EWC(network(), 1.0), metric="euclidean")
        assert callback._task._how == {"metric": "euclidean"}


def test_optimizers_of_another_model_are_refused():
    with pytest.raises(ValueError, match="holds none of the parameters"):
        task(EWC(network(), 1.0)).begin(optimizers(network()), resumed=False)


@pytest.mark.parametrize("make", [EWC, L2, SI, MAS, LwF])
def test_a_task_ends_once_also_where_inference_is_going_on(make):
    model, (x, y) = network(), (torch.randn(6, 3), torch.arange(6) % 2)
    regularizer = make(model, 1.0)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    own = task(regularizer)
    own.begin([optimizer], resumed=False)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    with torch.inference_mode():
        for _ in range(2):
            own.end((x, y))
    assert regularizer.n_tasks == 1
    own.begin([optimizer], resumed=False)
    F.cross_entropy(model(x), 1 - y).backward()
    optimizer.step()
    own.end((x, y))
    assert regularizer.n_tasks == 2
    assert not any(value.is_inference() for value in regularizer.state_dict().values())


@pytest.mark.parametrize("make", [EWC, MAS, KroneckerLaplace])
@pytest.mark.parametrize(("options", "group"), [({}, False), ({"group": "mine"}, "mine")])
def test_data_that_every_process_reads_are_its_own_unless_a_group_is_named(
    make, options, group, monkeypatch
):
    seen, found = [], make.consolidate

    def consolidate(self, data, *, group=None):
        seen.append(group)
        return found(self, data)

    monkeypatch.setattr(make, "consolidate", consolidate)
    data = torch.randn(6, 3), torch.arange(6) % 2
    for everywhere in (True, False):
        Task(make(network(), 1.0), None, None, True, options).end(data, everywhere=everywhere)
    assert seen == [group, options.get("group")]


@pytest.mark.parametrize("make", [L2, LwF])
def test_a_method_that_knows_no_groups_reads_data_of_every_process_as_well(make):
    regularizer = make(network(), 1.0)
    regularizer.before_task()
    task(regularizer).end((torch.randn(6, 3), torch.arange(6) % 2), everywhere=True)
    assert regularizer.n_tasks == 1


def test_the_distance_is_that_of_what_was_there_before_a_parameter_grew():
    model = network()
    ewc = EWC(model, 1.0)
    task(ewc).end((torch.randn(6, 3), torch.arange(6) % 2))
    old = model[1]
    model[1] = nn.Linear(4, 3)
    with torch.no_grad():
        model[1].weight[:2], model[1].bias[:2] = old.weight, old.bias
        model[1].bias[1] += 2.0
    readings = task(ewc).readings()
    assert readings["ewc/distance"] == pytest.approx(2.0)
    assert readings["ewc/penalty"] == pytest.approx(ewc.penalty().item())


def with_adapters(model, strength):
    add_adapters(model, ["0"], rank=1)
    return AdapterEWC(model, strength)


@pytest.mark.parametrize(
    ("make", "readings"),
    [
        (EWC, {"ewc/penalty", "ewc/distance", "ewc/nats"}),
        (lambda model, _: EWC(model, budget=1.0), {"ewc/distance", "ewc/nats"}),
        (L2, {"ewc/penalty", "ewc/distance"}),
        (with_adapters, {"ewc/penalty"}),
        (LwF, set()),
    ],
    ids=["EWC", "budget", "L2", "AdapterEWC", "LwF"],
)
def test_each_method_logs_what_the_callbacks_say(make, readings):
    assert task(make(network(), 1.0)).readings().keys() == readings


@pytest.mark.parametrize("make", [SI, LwF])
def test_before_a_first_task_nothing_pulls(make):
    model = network()
    readings = task(make(model, 1.0)).readings()
    assert not any(readings.values())
