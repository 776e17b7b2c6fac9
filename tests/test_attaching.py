"""A regularizer that is attached to an optimizer, against the same calls by hand."""

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ewc_lib import EWC
from ewc_lib.attaching import Attachment
from ewc_lib.regularizers import L2, SI, LwF, Replay, RWalk
from tests.regularizers.cases import (
    FUNCTION,
    METHODS,
    QUADRATIC,
    after_one_task,
    copies,
    gradients,
    learn,
    move,
    sgd,
    task,
)
from tests.scenarios import same

RATE = 0.05


def forms_of(names):
    """Every form that each method has."""
    quadratic = [(name, "proximal") for name in names if name not in FUNCTION]
    return quadratic + [(name, "gradient") for name in names]


def steps(model, optimizer, data, n=6, micro=1, step=None, on_loss=None):
    """A training loop that knows of no penalty."""
    x, y = data
    generator = torch.Generator().manual_seed(3)
    for _ in range(n):
        optimizer.zero_grad()
        for _ in range(micro):
            batch = torch.randint(len(x), (8,), generator=generator)
            loss = F.cross_entropy(model(x[batch]), y[batch]) / micro
            (loss if on_loss is None else on_loss(loss)).backward()
        (optimizer.step if step is None else step)()


def second_task(name, train, seed=1, **options):
    """Return a network after its second task, and what held the first."""
    model, regularizer = after_one_task(name, **options)
    model.outputs = range(2, 4)
    train(model, regularizer, task(seed, dtype=next(model.parameters()).dtype))
    return model, regularizer


@pytest.mark.parametrize(("name", "form"), forms_of(METHODS))
def test_an_attached_method_does_what_the_calls_by_hand_do(name, form):
    def by_hand(model, regularizer, data):
        learn(model, sgd(model), regularizer, data, steps=6, proximal=form == "proximal")

    def attached(model, regularizer, data):
        optimizer = sgd(model)
        with regularizer.attach(optimizer, form):
            steps(model, optimizer, data)
        regularizer.consolidate(data)

    (one, first), (other, second) = second_task(name, by_hand), second_task(name, attached)
    assert same(copies(one), copies(other))
    assert same(first.state_dict(), second.state_dict())


@pytest.mark.parametrize("name", QUADRATIC)
def test_a_proximal_step_is_what_a_method_does_unless_told_otherwise(name):
    model, regularizer = after_one_task(name)
    assert regularizer.attach(sgd(model)).form == "proximal"


@pytest.mark.parametrize("name", ["EWC", "SI", "LwF"])
def test_under_accumulation_it_acts_once_a_step(name):
    """With four halves of a batch, a quarter each, as with the whole batch at once."""
    form = "gradient" if name in FUNCTION else "proximal"

    def train(micro):
        def run(model, regularizer, data):
            optimizer, (x, y) = sgd(model), data
            with regularizer.attach(optimizer, form):
                for _ in range(5):
                    optimizer.zero_grad()
                    for part in torch.arange(len(x)).chunk(micro):
                        (F.cross_entropy(model(x[part]), y[part]) / micro).backward()
                    optimizer.step()
            regularizer.consolidate(data)

        return run

    whole, parts = (second_task(name, train(micro))[0] for micro in (1, 4))
    for n, p in copies(whole).items():
        torch.testing.assert_close(copies(parts)[n], p, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kernel", ["plain", "foreach", "fused"])
@pytest.mark.parametrize("method", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("name", ["EWC", "SI"])
@pytest.mark.parametrize("form", ["proximal", "gradient"])
def test_a_scaler_changes_nothing(name, form, method, kernel):
    """Fused kernels take the scale off themselves, within the step."""
    options = {} if kernel == "plain" else {kernel: True}

    def train(scaled):
        def run(model, regularizer, data):
            optimizer = method(model.parameters(), lr=RATE, **options)
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, enabled=scaled)

            def step():
                scaler.step(optimizer)
                scaler.update()

            with regularizer.attach(optimizer, form):
                steps(model, optimizer, data, step=step, on_loss=scaler.scale)
            regularizer.consolidate(data)

        return run

    (one, first), (other, second) = (
        second_task(name, train(scaled), dtype=torch.float32) for scaled in (False, True)
    )
    for n, p in copies(one).items():
        torch.testing.assert_close(copies(other)[n], p, rtol=1e-5, atol=1e-6)
    for key, value in first.state_dict().items():
        torch.testing.assert_close(second.state_dict()[key], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscaled_first", [False, True])
@pytest.mark.parametrize(("name", "form"), [("EWC", "proximal"), ("EWC", "gradient"), ("SI", None)])
def test_a_step_that_a_scaler_leaves_out_moves_nothing_and_is_not_noted(
    name, form, unscaled_first, fused
):
    model, regularizer = after_one_task(name, dtype=torch.float32)
    move(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    regularizer.attach(optimizer, form or "proximal")
    x, y = task(1, dtype=torch.float32)
    scaler.scale(F.cross_entropy(model(x), y)).backward()
    next(model.parameters()).grad[0, 0] = torch.inf
    before, state = copies(model), regularizer.state_dict()
    if unscaled_first:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    assert same(copies(model), before)
    assert same(regularizer.state_dict(), state)
    assert regularizer.penalty().item() > 0.01  # it would have moved


def test_clipping_clips_the_gradient_of_the_loss_alone():
    model, ewc = after_one_task("EWC")
    move(model)
    optimizer = sgd(model)
    ewc.attach(optimizer, "gradient")
    x, y = task(1)
    F.cross_entropy(model(x), y).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-6)
    clipped, before = gradients(model), copies(model)
    ewc.strength = 500.0
    optimizer.step()
    moved = {n: (p - before[n]).norm() for n, p in copies(model).items()}
    assert sum(moved.values()) > 1000 * RATE * sum(g.norm() for g in clipped.values())


def test_the_rate_is_the_one_that_a_scheduler_has_set_for_the_step():
    def rates(attached):
        model, ewc = after_one_task("EWC")
        move(model)
        optimizer = sgd(model, lr=1.0)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.1)
        if attached:
            ewc.attach(optimizer)
        for _ in range(3):
            optimizer.zero_grad()
            optimizer.step()
            if not attached:
                ewc.proximal_step_(optimizer)
            scheduler.step()
        return copies(model)

    assert same(rates(True), rates(False))


@pytest.mark.parametrize("by_name", [True, False])
@pytest.mark.parametrize(("name", "form"), forms_of(["EWC", "SI", "LwF"]))
def test_a_step_with_a_closure_is_that_without(name, form, by_name):
    def train(with_closure):
        def run(model, regularizer, data):
            optimizer, (x, y) = sgd(model), data

            def closure():
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                return loss

            with regularizer.attach(optimizer, form):
                for _ in range(4):
                    if not with_closure:
                        closure()
                        optimizer.step()
                    elif by_name:
                        optimizer.step(closure=closure)
                    else:
                        optimizer.step(closure)
            regularizer.consolidate(data)

        return run

    (one, first), (other, second) = (second_task(name, train(c)) for c in (True, False))
    assert same(copies(one), copies(other))
    assert same(first.state_dict(), second.state_dict())


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_lbfgs_finds_the_minimum_of_loss_and_penalty(search):
    model, ewc = after_one_task("EWC")
    x, y = task(1)
    optimizer = torch.optim.LBFGS(
        model.parameters(), 0.5 if search is None else 1.0, max_iter=400, line_search_fn=search
    )

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    with ewc.attach(optimizer, "gradient"):
        optimizer.step(closure)
    whole = F.cross_entropy(model(x), y) + ewc.penalty()
    slope = torch.autograd.grad(whole, list(model.parameters()))
    assert max(g.abs().max() for g in slope) < 1e-5
    assert ewc.penalty() > 1e-4


@pytest.mark.parametrize("name", ["EWC", "SI"])
def test_lbfgs_is_refused_where_it_would_be_wrong(name):
    model, regularizer = after_one_task(name)
    optimizer = torch.optim.LBFGS(model.parameters())
    with pytest.raises(ValueError, match="LBFGS"):
        regularizer.attach(optimizer)
    if name == "SI":
        with pytest.raises(ValueError, match="many steps in one"):
            regularizer.attach(optimizer, "gradient")


@pytest.mark.parametrize("name", ["ASGD", "Adadelta", "Adafactor", "LBFGS", "Rprop"])
def test_an_optimizer_whose_steps_have_no_known_scale_is_refused_before_the_first_task(name):
    model = nn.Linear(3, 2).double()
    ewc, optimizer = EWC(model, 1.0), getattr(torch.optim, name)(model.parameters())
    with pytest.raises(ValueError, match="use form='gradient'"):
        ewc.attach(optimizer)
    with pytest.raises(ValueError, match="use form='gradient'"):
        ewc.proximal_step_(optimizer)
    ewc.attach(optimizer, "gradient")
    if name != "LBFGS":
        EWC(model, 1.0).attach(optimizer, metric="euclidean")


@pytest.mark.filterwarnings("ignore:the penalty is attached")  # asked for here to compare
def test_rprop_with_the_gradient_finds_the_minimum_of_loss_and_penalty():
    model, ewc = after_one_task("EWC")
    x, y = task(1)
    optimizer = torch.optim.Rprop(model.parameters(), lr=1e-3)
    ewc.attach(optimizer, "gradient")
    for _ in range(300):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    whole = F.cross_entropy(model(x), y) + ewc.penalty()
    slope = torch.autograd.grad(whole, list(model.parameters()))
    assert max(g.abs().max() for g in slope) < 1e-3
    assert ewc.penalty() > 1e-4


def test_an_optimizer_without_a_rate_has_no_proximal_step():
    model, ewc = after_one_task("EWC")
    optimizer = sgd(model)
    optimizer.param_groups[0]["lr"] = None
    with pytest.raises(ValueError, match="form='gradient'"):
        ewc.attach(optimizer)


def test_what_is_attached_twice_is_refused_until_it_is_removed():
    model, ewc = after_one_task("EWC")
    optimizer = sgd(model)
    handle = ewc.attach(optimizer)
    with pytest.raises(ValueError, match="attached to this optimizer already"):
        ewc.attach(optimizer, "gradient")
    L2(model, 1.0).attach(optimizer)  # another one may
    handle.remove()
    handle.remove()
    move(model)
    before = copies(model)
    optimizer.zero_grad()
    optimizer.step()  # L2 has no task yet
    assert same(copies(model), before)
    assert "EWC" in repr(ewc.attach(optimizer))


@pytest.mark.parametrize("name", ["EWC", "LwF"])
def test_an_optimizer_of_another_model_is_refused(name):
    model, regularizer = after_one_task(name)
    with pytest.raises(ValueError, match="holds none of the parameters"):
        regularizer.attach(sgd(copy.deepcopy(model)))


@pytest.mark.parametrize("wrong", [None, "adam", nn.Linear(1, 1)], ids=repr)
def test_what_is_no_optimizer_is_refused(wrong):
    with pytest.raises(TypeError, match=type(wrong).__name__):
        after_one_task("EWC")[1].attach(wrong)


def test_an_unknown_metric_is_refused_and_a_known_one_is_that_of_every_step():
    model, ewc = after_one_task("EWC")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="metric must be one of 'optimizer', 'euclidean'"):
        ewc.attach(optimizer, metric="adam")
    with pytest.raises(ValueError, match="metric must be one of"):
        ewc.proximal_step_(optimizer, "adam")
    assert ewc.attach(optimizer).metric == "optimizer"
    other = copy.deepcopy(model)
    by_hand, second = (
        EWC(other, strength=ewc.strength),
        torch.optim.Adam(other.parameters(), lr=0.1),
    )
    by_hand.load_state_dict(ewc.state_dict())
    ewc.attach(third := torch.optim.Adam(model.parameters(), lr=0.1), metric="euclidean")
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    third.step()
    second.step()
    by_hand.proximal_step_(second, "euclidean")
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_an_unknown_form_is_refused_and_a_function_has_no_proximal_step():
    model, ewc = after_one_task("EWC")
    with pytest.raises(ValueError, match="form must be one of"):
        ewc.attach(sgd(model), "implicit")
    with pytest.raises(ValueError, match="no proximal step"):
        LwF(model).attach(sgd(model), "proximal")


class Wrapper:
    """Keeps an optimizer, as trainers do."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def step(self) -> None:
        self.optimizer.step()


def test_an_optimizer_in_wrappers_is_found():
    model, ewc = after_one_task("EWC")
    move(model)
    outer = Wrapper(Wrapper(sgd(model)))
    handle = ewc.attach(outer)
    assert handle.optimizer is outer.optimizer.optimizer
    before = ewc.penalty().item()
    outer.step()
    assert ewc.penalty().item() < before


def test_a_state_or_a_copy_of_the_optimizer_is_free_of_it():
    model, ewc = after_one_task("EWC")
    optimizer = sgd(model)
    ewc.attach(optimizer)
    assert optimizer.state_dict().keys() == {"state", "param_groups"}
    twin = pickle.loads(pickle.dumps(optimizer))
    assert not twin._optimizer_step_post_hooks


def test_an_optimizer_that_nobody_needs_is_freed():
    model, ewc = after_one_task("EWC")
    optimizer = sgd(model)
    handle = ewc.attach(optimizer)
    gone = weakref.ref(optimizer)
    gc.disable()
    try:
        del optimizer
        assert gone() is None
    finally:
        gc.enable()
    assert handle.optimizer is None
    assert "None" in repr(handle)


def test_an_error_within_the_block_removes_it():
    model, ewc = after_one_task("EWC")
    optimizer = sgd(model)
    handle = ewc.attach(optimizer)
    assert isinstance(handle, Attachment)

    def fails():
        with handle:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize("form", ["proximal", "gradient"])
def test_a_compiled_step_is_the_same(form):
    def train(wrap):
        def run(model, regularizer, data):
            optimizer = torch.optim.SGD(model.parameters(), lr=torch.tensor(RATE))
            regularizer.attach(optimizer, form)
            steps(model, optimizer, data, step=wrap(optimizer.step))

        return run

    torch._dynamo.reset()
    plain = second_task("EWC", train(lambda step: step))[0]
    compiled = second_task("EWC", train(lambda step: torch.compile(step, backend="eager")))[0]
    for n, p in copies(plain).items():
        torch.testing.assert_close(copies(compiled)[n], p, rtol=1e-9, atol=1e-12)
    assert (copies(plain)["net.0.weight"] - copies(after_one_task("EWC")[0])["net.0.weight"]).any()


@pytest.mark.filterwarnings("ignore:the penalty is attached")  # asked for here to compare
def test_learning_without_forgetting_sees_the_inputs_of_training_only():
    model, lwf = after_one_task("LwF")
    move(model)
    optimizer = sgd(model)
    lwf.attach(optimizer)
    x, y = task(1)
    with torch.no_grad():
        model(torch.full_like(x, 9.0))
    model.eval()(torch.full_like(x, 9.0))
    F.cross_entropy(model.train()(x), y).backward()
    task_alone = gradients(model)
    lwf.before_step(x)
    wanted = torch.autograd.grad(lwf.penalty(), list(model.parameters()))
    optimizer.step()
    for own, g, p in zip(task_alone.values(), wanted, model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, own + g)


def test_replay_draws_once_a_step():
    model, replay = after_one_task("replay")
    by_hand = Replay(model, 3.0, capacity=3, batch_size=8)
    by_hand.load_state_dict(replay.state_dict())
    optimizer = sgd(model, lr=0.0)
    replay.attach(optimizer)
    x, _ = task(1)
    for _ in range(2):
        model(x).sum().backward()
        model(x).sum().backward()
        optimizer.step()
        by_hand.before_step()
    assert same(replay.state_dict(), by_hand.state_dict())


@pytest.mark.parametrize("method", [SI, RWalk])
def test_before_the_first_task_a_path_is_noted_already(method):
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    regularizer = method(model, strength=1.0)
    regularizer.attach(optimizer)
    steps(model, optimizer, task(dtype=torch.float32), n=12)
    assert regularizer.consolidate(None).trace() > 0


def halves(model, lr=RATE):
    """Two optimizers, each of one layer."""
    layers = model.net[0], model.net[2]
    return [torch.optim.SGD(layer.parameters(), lr=lr) for layer in layers]


@pytest.mark.parametrize("name", ["EWC", "Kronecker Laplace", "SI"])
@pytest.mark.parametrize("form", ["proximal", "gradient"])
def test_two_optimizers_do_what_one_does(name, form):
    """Also with a matrix for each layer, each of which is moved as a whole."""

    def train(make):
        def run(model, regularizer, data):
            optimizers = make(model)
            for optimizer in optimizers:
                regularizer.attach(optimizer, form)
            x, y = data
            for _ in range(5):
                model.zero_grad()
                F.cross_entropy(model(x), y).backward()
                for optimizer in optimizers:
                    optimizer.step()
            regularizer.consolidate(data)

        return run

    one, first = second_task(name, train(lambda model: [sgd(model)]))
    two, second = second_task(name, train(halves))
    for n, p in copies(one).items():
        torch.testing.assert_close(copies(two)[n], p, rtol=1e-10, atol=1e-12)
    for key, value in first.state_dict().items():
        torch.testing.assert_close(second.state_dict()[key], value, rtol=1e-8, atol=1e-10)


def test_of_two_optimizers_the_second_sees_what_the_first_has_moved_on_the_same_inputs():
    def attached(model, lwf, optimizers, x, y):
        for optimizer in optimizers:
            lwf.attach(optimizer)
        for _ in range(4):
            model.zero_grad()
            F.cross_entropy(model(x), y).backward()
            for optimizer in optimizers:
                optimizer.step()

    def by_hand(model, lwf, optimizers, x, y):
        for _ in range(4):
            model.zero_grad()
            F.cross_entropy(model(x), y).backward()
            for optimizer in optimizers:
                own = optimizer.param_groups[0]["params"]
                lwf.before_step(x)
                found = torch.autograd.grad(lwf.penalty(), own)
                for p, g in zip(own, found, strict=True):
                    p.grad += g
                optimizer.step()

    def run(train):
        model, lwf = after_one_task("LwF")
        move(model)
        train(model, lwf, halves(model), *task(1))
        return copies(model)

    one, other = run(attached), run(by_hand)
    for n, p in one.items():
        torch.testing.assert_close(other[n], p, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("halved", [False, True])
def test_the_steps_of_a_second_optimizer_are_no_more_steps(halved):
    model, si = after_one_task("SI")
    optimizers = halves(model) if halved else [sgd(model)]
    for optimizer in optimizers:
        si.attach(optimizer)
    for _ in range(5):
        F.cross_entropy(model(task(1)[0]), task(1)[1]).backward()
        for optimizer in optimizers:
            optimizer.step()
    assert si.consolidate(None).n_samples == 5


def test_an_optimizer_gets_the_gradient_of_its_own_parameters_only():
    for name in ("EWC", "LwF", "replay"):
        model, regularizer = after_one_task(name)
        move(model)
        head = halves(model)[1]
        regularizer.attach(head, "gradient")
        x, y = task(1)
        F.cross_entropy(model(x), y).backward()
        before = gradients(model)
        head.step()
        now = gradients(model)
        assert torch.equal(now["net.0.weight"], before["net.0.weight"])
        assert not torch.equal(now["net.2.weight"], before["net.2.weight"])


def test_an_optimizer_in_the_backward_pass_for_each_parameter_is_right():
    def run(in_backward):
        model, ewc = after_one_task("EWC")
        move(model)
        if in_backward:
            for p in model.parameters():
                own = torch.optim.SGD([p], lr=RATE)
                ewc.attach(own, "gradient")

                def step(p, own=own):
                    own.step()
                    own.zero_grad()

                p.register_post_accumulate_grad_hook(step)
        else:
            whole = sgd(model)
            ewc.attach(whole, "gradient")
        for _ in range(3):
            model.zero_grad()
            F.cross_entropy(model(task(1)[0]), task(1)[1]).backward()
            if not in_backward:
                whole.step()
        return copies(model)

    one, other = run(False), run(True)
    for n, p in one.items():
        torch.testing.assert_close(other[n], p, rtol=1e-12, atol=1e-12)


def test_an_optimizer_of_a_new_head_alone_makes_its_steps():
    model, ewc = after_one_task("EWC")
    model.net.append(nn.Linear(4, 4, dtype=torch.float64))
    head = torch.optim.SGD(model.net[-1].parameters(), lr=RATE)
    for form in ("proximal", "gradient"):
        with ewc.attach(head, form):
            model.zero_grad()
            F.cross_entropy(model(task(1)[0]), task(1)[1]).backward()
            before, body = copies(model.net[-1]), gradients(model.net[:-1])
            head.step()
            assert not same(copies(model.net[-1]), before)
            assert same(gradients(model.net[:-1]), body)


def test_random_walk_counts_the_steps_of_one_optimizer():
    model, walk = after_one_task("RWalk")
    first, second = halves(model)
    walk.attach(first)
    walk.attach(second)
    F.cross_entropy(model(task(1)[0]), task(1)[1]).backward()
    first.step()
    with pytest.raises(ValueError, match="only one optimizer"):
        second.step()
    walk.before_task()
    second.step()


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("form", ["proximal", "gradient"])
def test_what_one_notes_does_not_depend_on_what_another_adds(form, first):
    def importance(order):
        model = after_one_task("EWC")[0]
        ewc, si = after_one_task("EWC")[1], SI(model, 0.0)
        ewc = EWC(model, 300.0)
        ewc.consolidate(task())
        optimizer = sgd(model)
        attach = [lambda: ewc.attach(optimizer, form), lambda: si.attach(optimizer)]
        for one in attach if order else reversed(attach):
            one()
        steps(model, optimizer, task(1))
        return si.consolidate(None).values

    assert same(importance(first), importance(not first))


@pytest.mark.parametrize("method", [torch.optim.SGD, torch.optim.Adam])
def test_an_optimizer_that_goes_up_takes_no_gradient(method):
    model, ewc = after_one_task("EWC")
    optimizer = method(model.parameters(), lr=RATE, maximize=True)
    with pytest.raises(ValueError, match="goes up"):
        ewc.attach(optimizer, "gradient")
    ewc.attach(optimizer)
    sparse = torch.optim.SparseAdam(model.parameters())
    with pytest.raises(ValueError, match="no dense gradient"):
        ewc.attach(sparse, "gradient")


def test_a_step_within_the_step_of_a_class_that_extends_it_counts_once():
    class Own(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    def run(method):
        model, ewc = after_one_task("EWC")
        move(model)
        torch.optim.SGD(model.parameters(), lr=RATE)  # has the step of the class take hooks
        optimizer = method(model.parameters(), lr=RATE)
        ewc.attach(optimizer)
        for _ in range(2):
            optimizer.step()
        return copies(model)

    assert same(run(Own), run(torch.optim.SGD))


class Sharpness(torch.optim.Optimizer):
    """Goes up, takes the gradient there, and lets another one make the step from where it was."""

    def __init__(self, base):
        super().__init__(base.param_groups, {})
        self.base_optimizer = base

    @torch.no_grad()
    def up(self):
        for p in self.param_groups[0]["params"]:
            self.state[p]["old"] = p.clone()
            p.add_(0.01 * p.grad)

    @torch.no_grad()
    def down(self):
        for p in self.param_groups[0]["params"]:
            p.copy_(self.state[p]["old"])
        self.base_optimizer.step()


def test_an_optimizer_that_lets_another_make_its_step_is_followed():
    model, ewc = after_one_task("EWC")
    move(model)
    outer = Sharpness(sgd(model))
    assert ewc.attach(outer).optimizer is outer.base_optimizer
    F.cross_entropy(model(task(1)[0]), task(1)[1]).backward()
    outer.up()
    F.cross_entropy(model(task(1)[0]), task(1)[1]).backward()
    before = ewc.penalty().item()
    ewc.strength = 1e6
    outer.down()
    assert ewc.penalty().item() / 1e6 < 0.01 * before


def test_a_removed_handle_is_not_entered_again_and_one_within_itself_ends_outside():
    model, ewc = after_one_task("EWC")
    optimizer = sgd(model)
    with ewc.attach(optimizer) as handle:
        with handle:
            pass
        assert optimizer._optimizer_step_pre_hooks
    with pytest.raises(ValueError, match="was removed"):
        handle.__enter__()
    with pytest.raises(TypeError, match="not copied"):
        copy.deepcopy(handle)


def gradient_of_lwf(lwf, model, parts):
    """Return the gradient of its mean over all observations."""
    n = sum(map(len, parts))
    total = [0.0 for _ in model.parameters()]
    for part in parts:
        lwf.before_step(part)
        found = torch.autograd.grad(lwf.penalty(), list(model.parameters()))
        total = [t + len(part) / n * g for t, g in zip(total, found, strict=True)]
    return total


@pytest.mark.parametrize(
    "before",
    ["nothing", "a logged penalty", "a step that was left out", "a batch that was dropped"],
)
@pytest.mark.filterwarnings("ignore:the penalty is attached")  # asked for here to compare
def test_the_passes_of_a_step_are_its_own_each_with_its_observations(before):
    model, lwf = after_one_task("LwF")
    move(model)
    optimizer, scaler = sgd(model), torch.amp.GradScaler("cpu", init_scale=2.0)
    lwf.attach(optimizer)
    x, y = task(1, n=32)
    if before == "a logged penalty":
        lwf.before_step(x)
        lwf.penalty()
    if before == "a step that was left out":
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        next(model.parameters()).grad[0, 0] = torch.inf
        scaler.step(optimizer)
    if before == "a batch that was dropped":
        model(x)
    optimizer.zero_grad()
    for part in (slice(28), slice(28, 32)):
        (F.cross_entropy(model(x[part]), y[part])).backward()
    alone = gradients(model)
    wanted = gradient_of_lwf(lwf, model, [x[:28], x[28:]])
    optimizer.step()
    for p, own, g in zip(model.parameters(), alone.values(), wanted, strict=True):
        torch.testing.assert_close(p.grad, own + g)


def test_copies_of_a_watched_model_and_stored_ones_say_nothing():
    model, lwf = after_one_task("LwF")
    optimizer = sgd(model)
    lwf.attach(optimizer)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    twin(task()[0])
    assert not lwf._passes
    pickle.dumps(lwf)
    del optimizer
    model(task()[0])
    assert not model._forward_pre_hooks


def test_a_refused_attachment_leaves_nothing_behind():
    model, lwf = after_one_task("LwF")
    optimizer = sgd(model)
    handle = lwf.attach(optimizer)
    for _ in range(3):
        with pytest.raises(ValueError, match="already"):
            lwf.attach(optimizer)
    assert len(model._forward_pre_hooks) == 1
    handle.remove()
    model(task()[0])
    assert not model._forward_pre_hooks
    assert not lwf._passes


def test_a_model_that_was_not_seen_in_training_is_said_to_be():
    model, lwf = after_one_task("LwF")
    optimizer = sgd(model)
    lwf.attach(optimizer)
    F.cross_entropy(model.eval()(task()[0]), task()[1]).backward()
    with pytest.raises(ValueError, match="forward passes in training mode"):
        optimizer.step()


def test_inputs_by_name_and_in_a_region_of_autocast_are_taken_as_they_were():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, features):
            return self.layer(features)

    model = Named()
    lwf, optimizer = LwF(model), torch.optim.SGD(model.parameters(), lr=RATE)
    x, y = task(dtype=torch.float32)
    lwf.consolidate((x, y))
    lwf.attach(optimizer)
    with torch.autocast("cpu", torch.bfloat16):
        encoded = nn.Linear(3, 3)(x)
        loss = F.cross_entropy(model(features=encoded), y)
    loss.backward()
    optimizer.step()


def test_a_pattern_of_two_lines_holds_the_first_task():
    def forgotten(held):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        ewc = EWC(model, strength=3000.0 if held else 0.0)
        ewc.attach(optimizer)
        x, y = task(0, n=64, dtype=torch.float32)
        y = (x[:, 0] > 0).long()
        steps(model, optimizer, (x, y), n=100)
        ewc.consolidate((x, y))
        before = F.cross_entropy(model(x), y).item()
        steps(model, optimizer, (x, 1 - y), n=100)
        return F.cross_entropy(model(x), y).item() - before

    assert forgotten(True) < 0.2 * forgotten(False)
