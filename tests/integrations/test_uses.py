"""Programs as people write them, to which at most two lines are added, marked by ``# ewc``.

Each is compared with a calculation that is written out here, without the package where that is
short. What callbacks of trainers do is in the tests of those.
"""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributions import Normal
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from ewc_lib import EWC
from ewc_lib.continual import learn
from ewc_lib.regularizers import AdapterEWC

RATE, STRENGTH = 0.2, 30.0


def network(outputs=2):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, outputs))


def task(seed, n=16):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, generator=generator), torch.arange(n) % 2


def parameters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def close(one, other, rtol=1e-4, atol=1e-6):
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=rtol, atol=atol, msg=name)


def exact_fisher(model, x):
    """The definition: classes in their probability, the square of each gradient."""
    found = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for row in x:
        logp = model(row[None])[0].log_softmax(0)
        for share in logp:
            grads = torch.autograd.grad(share, list(model.parameters()), retain_graph=True)
            for total, g in zip(found.values(), grads, strict=True):
                total += share.exp().detach() * g.square() / len(x)
    return found


def pulled(model, fisher, anchor, rate):
    """The proximal step, by its formula."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            s = rate * STRENGTH * fisher[name]
            p.copy_((p + s * anchor[name]) / (1 + s))


# 1: mixed precision with a scaler, clipping, accumulation, a scheduler


def plain_loop(model, data, after_step=None, attach=None, accumulate=4, scale=True):
    """The loop of a user, where one line is added; and the same, where ours is by hand."""
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    scaler = torch.amp.GradScaler("cpu", enabled=scale)
    if attach is not None:
        attach(optimizer)  # ewc
    for _ in range(6):
        for number, (x, y) in enumerate(DataLoader(TensorDataset(*data), 4)):
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(model(x), y) / accumulate
            scaler.scale(loss).backward()
            if (number + 1) % accumulate == 0:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                if after_step is not None:
                    after_step(scheduler.get_last_lr()[0])
                scheduler.step()


def test_1_a_plain_loop_needs_two_lines_and_the_penalty_counts_once_a_step():
    model = network()
    plain_loop(model, task(0))
    ewc = EWC(model, STRENGTH)
    ewc.consolidate(task(0))  # ewc
    twin = copy.deepcopy(model)
    anchor, fisher = parameters(twin), exact_fisher(twin, task(0)[0])
    plain_loop(model, task(1), attach=ewc.attach)
    plain_loop(twin, task(1), lambda rate: pulled(twin, fisher, anchor, rate), scale=False)
    close(parameters(model), parameters(twin))
    free = network()
    free.load_state_dict(anchor)
    plain_loop(free, task(1))
    distance = sum((p - anchor[n]).square().sum() for n, p in parameters(free).items())
    assert sum((p - anchor[n]).square().sum() for n, p in parameters(model).items()) < distance


# 3b: a causal language model with the labels of a collator

TINY = {"vocab_size": 12, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16}


def language_model():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    own = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**TINY, **none, **own))


def texts(seed, n=6):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(2, 12, (n, 7), generator=generator)
    return [{"input_ids": row[: 4 + i % 4].tolist()} for i, row in enumerate(rows)]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_3b_a_causal_language_model_needs_one_line_and_labels_are_shifted(tmp_path):
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models

    from ewc_lib.integrations.transformers import EWCCallback

    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"[PAD]": 0})), pad_token="[PAD]"
    )
    collator = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
    model = language_model()
    args = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=3, gradient_accumulation_steps=2,
        report_to="none", disable_tqdm=True, use_cpu=True, save_strategy="no",
    )  # fmt: skip
    ewc = EWC(model, STRENGTH, kind="empirical")
    callback = EWCCallback(ewc, consolidate_with=True)
    transformers.Trainer(
        model, args, collator, train_dataset=texts(0), callbacks=[callback]  # ewc
    ).train()  # fmt: skip
    wanted = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for text in texts(0):
        ids = torch.tensor([text["input_ids"]])
        logits = model.eval()(input_ids=ids).logits
        loss = F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum")
        grads = torch.autograd.grad(loss, list(model.parameters()))
        for total, g in zip(wanted.values(), grads, strict=True):
            total += g.square() / len(texts(0))
    close(wanted, ewc.precision.diagonal(), rtol=1e-3)


# 4: adapters


def with_adapters():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False)
    torch.manual_seed(1)
    return peft.get_peft_model(network(), config)


def whole_weights(model):
    """The weights that the adapters make, by their formula."""
    layers = {name: m for name, m in model.named_modules() if hasattr(m, "get_delta_weight")}
    return {
        name: m.weight + m.scaling["default"] * m.lora_B.default.weight @ m.lora_A.default.weight
        for name, m in layers.items()
    }


def test_4_adapters_of_peft_are_held_by_the_weights_that_they_make():
    model = with_adapters()
    ewc = AdapterEWC(model, STRENGTH)
    ewc.consolidate(task(0))  # ewc
    anchor = {name: weight.detach() for name, weight in whole_weights(model).items()}
    merged = network()
    with torch.no_grad():
        for layer, weight in zip((merged[0], merged[2]), anchor.values(), strict=True):
            layer.weight.copy_(weight)
    fisher = exact_fisher(merged, task(0)[0])
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, RATE)
    ewc.attach(optimizer)  # ewc
    x, y = task(1)
    for _ in range(3):
        before = [p.detach().clone() for p in trained]
        own = zip((fisher["0.weight"], fisher["2.weight"]), whole_weights(model).items(),
                  strict=True)  # fmt: skip
        pulls = [(f * (weight - anchor[name]).square()).sum() for f, (name, weight) in own]
        loss = F.cross_entropy(model(x), y) + 0.5 * STRENGTH * sum(pulls)
        wanted = torch.autograd.grad(loss, trained)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        for p, start, gradient in zip(trained, before, wanted, strict=True):
            torch.testing.assert_close(p.detach(), start - RATE * gradient, rtol=1e-4, atol=1e-6)


# 5: a wrapper for several processes, here around one


@pytest.fixture
def _one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def learned_by(trained, model):
    """Learn two tasks with a model that is in a wrapper or is not."""
    ewc = EWC(trained, STRENGTH)
    ewc.consolidate(task(0))  # ewc
    optimizer = torch.optim.SGD(trained.parameters(), RATE)
    ewc.attach(optimizer)  # ewc
    x, y = task(1)
    for _ in range(4):
        optimizer.zero_grad()
        F.cross_entropy(trained(x), y).backward()
        optimizer.step()
    return parameters(model), ewc


@pytest.mark.usefixtures("_one_process")
def test_5_a_wrapped_model_learns_as_the_model_in_it():
    plain, inner = network(), network()
    one, _ = learned_by(plain, plain)
    other, _ = learned_by(DistributedDataParallel(inner), inner)
    close(one, other)


@pytest.mark.usefixtures("_one_process")
def test_5_what_a_wrapped_model_remembers_goes_into_a_plain_one():
    inner = network()
    _, ewc = learned_by(DistributedDataParallel(inner), inner)
    elsewhere = EWC(network(), STRENGTH)
    elsewhere.load_state_dict(ewc.state_dict())
    close(exact_fisher(network(), task(0)[0]), elsewhere.precision.diagonal())


# 6: a head that grows


def test_6_a_larger_head_and_a_new_layer_need_no_line():
    model = network()
    ewc = EWC(model, STRENGTH)
    ewc.consolidate(task(0))
    anchor, fisher = parameters(model), exact_fisher(model, task(0)[0])
    old = model[2]
    model[2] = nn.Linear(5, 4)
    with torch.no_grad():
        model[2].weight[:2], model[2].bias[:2] = old.weight, old.bias
        for p in model.parameters():
            p += 0.1
    model.append(nn.Linear(4, 4))
    wanted = 0.0
    for name, p in model.named_parameters():
        if name in anchor:
            moved = p[: len(anchor[name])] - anchor[name]
            wanted = wanted + 0.5 * STRENGTH * (fisher[name] * moved.square()).sum()
    torch.testing.assert_close(ewc.penalty(), wanted)
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    new = model[2].weight[2:].detach().clone()
    with ewc.attach(optimizer):
        optimizer.zero_grad()
        optimizer.step()
    assert torch.equal(model[2].weight[2:], new)
    assert ewc.penalty() < wanted


# 7: a likelihood of one's own


def test_7_a_likelihood_is_a_function_to_a_distribution():
    def spread(output):
        return Normal(output[:, 0], output[:, 1].exp())

    model, (x, _) = network(), task(0)
    ewc = EWC(model, STRENGTH, likelihood=spread)
    ewc.consolidate((x, x.sum(1)))
    wanted = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for row in x:  # of a normal distribution: 1 / σ² for the mean, 2 for log σ
        mean, log_sigma = model(row[None])[0]
        for value, weight in ((mean, (-2 * log_sigma).exp()), (log_sigma, torch.tensor(2.0))):
            grads = torch.autograd.grad(value, list(model.parameters()), retain_graph=True)
            for total, g in zip(wanted.values(), grads, strict=True):
                total += weight.detach() * g.square() / len(x)
    close(wanted, ewc.precision.diagonal())


# 8: states, copies and compiled models


def second_task(model, ewc, compiled=False):
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    ewc.attach(optimizer)  # ewc
    forward = torch.compile(model, backend="eager") if compiled else model
    x, y = task(1)
    for _ in range(4):
        optimizer.zero_grad()
        F.cross_entropy(forward(x), y).backward()
        optimizer.step()
    return parameters(model)


@pytest.mark.parametrize("way", ["state", "copy", "compiled"])
def test_8_a_state_a_copy_and_a_compiled_model_go_on_in_the_same_way(way, tmp_path):
    model = network()
    ewc = EWC(model, STRENGTH)
    ewc.consolidate(task(0))  # ewc
    if way == "state":
        torch.save([model.state_dict(), ewc.state_dict()], tmp_path / "both.pt")
        other = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
        held = EWC(other, STRENGTH)
        states = torch.load(tmp_path / "both.pt", weights_only=True)
        other.load_state_dict(states[0])
        held.load_state_dict(states[1])
    else:
        other, held = copy.deepcopy((model, ewc))
    found = second_task(other, held, compiled=way == "compiled")
    close(second_task(model, ewc), found)
    close(ewc.state_dict(), held.state_dict(), rtol=0, atol=0)


# 9: a model that is large for its data


def test_9_a_part_of_the_data_and_a_sketch_come_near_the_whole():
    model, (x, y) = network(), task(0, n=400)
    ewc = EWC(model, STRENGTH, kind="sketch", n_samples=200)
    ewc.consolidate(DataLoader(TensorDataset(x, y), 50))
    whole = EWC(model, STRENGTH).consolidate((x, y))
    assert ewc.precision.n_samples == 200
    assert ewc.precision.trace().item() == pytest.approx(whole.trace().item(), rel=0.2)


# 10: tasks of one's own, one after another


def sgd(own):
    return torch.optim.SGD(own, RATE)


def test_10_tasks_may_be_loaders():
    model = network()
    tasks = [(f"task {t}", DataLoader(TensorDataset(*task(t)), 16), None) for t in range(2)]
    ewc = EWC(model, STRENGTH)
    learn(tasks, model, ewc, steps=4, optimizer=sgd)  # ewc
    twin = network()
    optimizer, fisher, anchor = sgd(twin.parameters()), None, parameters(twin)
    for t in range(2):
        x, y = task(t)
        for _ in range(4):
            optimizer.zero_grad()
            F.cross_entropy(twin(x), y).backward()
            for name, p in twin.named_parameters():
                if fisher is not None:
                    p.grad += STRENGTH * fisher[name] * (p.detach() - anchor[name])
            optimizer.step()
        fisher, anchor = exact_fisher(twin, x), parameters(twin)
    close(parameters(model), parameters(twin))
