"""Every method takes models and batches as people have them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from torch import nn
from torch.utils.data import DataLoader

from ewc_lib.regularizers import EWCDR, LwF, Replay
from tests.regularizers.cases import METHODS
from tests.scenarios import same

WORDS = 11
TINY = {
    "vocab_size": WORDS,
    "hidden_size": 4,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 5,
    "max_position_embeddings": 8,
    "pad_token_id": 0,
}


def texts(lengths, seed, labels):
    """One padded batch as a collator makes it."""
    generator = torch.Generator().manual_seed(seed)
    n, longest = len(lengths), max(lengths)
    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
    words = torch.randint(1, WORDS, (n, longest), generator=generator) * mask
    target = {
        "classes": lambda: torch.arange(n) % 3,
        "numbers": lambda: torch.randn(n, generator=generator),
        "flags": lambda: (torch.rand(n, 3, generator=generator) > 0.5).float(),
        "words": lambda: words.masked_fill(mask == 0, -100),
        "tags": lambda: (words % 3).masked_fill(mask == 0, -100),
    }[labels]()
    return {"input_ids": words, "attention_mask": mask, "labels": target}


def batches(labels):
    return lambda seed: [
        texts([4, 3, 4], seed, labels),
        texts([6, 6, 2, 5], seed + 10, labels),
        texts([4, 1, 2], seed + 20, labels),
    ]


def bert(kind="SequenceClassification", **options):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(**TINY, **{"num_labels": 3} | options)
    return getattr(transformers, f"BertFor{kind}")(config)


def gpt2():
    transformers = pytest.importorskip("transformers")
    options = {"n_embd": 4, "n_head": 2, "n_layer": 1, "n_inner": 5, "n_positions": 8}
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=WORDS, **options, **ends)
    )


def t5():
    transformers = pytest.importorskip("transformers")
    sizes = {"d_model": 4, "d_kv": 2, "d_ff": 6, "num_layers": 1, "num_heads": 2}
    ends = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=WORDS, **sizes, **ends)
    )


class TwoInputs(nn.Module):
    """Takes a pair, and returns what the body knows beside its answer."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(2, 4)

    def forward(self, x, z):
        h = torch.tanh(self.a(x) + self.b(z))
        return h[:, :3], h


class Named(nn.Module):
    """Takes tensors by name, and returns a dict."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(3, 3)

    def forward(self, x, scale):
        return {"logits": self.body(x) * scale[:, None], "scale": scale}


def pairs(seed):
    generator = torch.Generator().manual_seed(seed)
    x, z = (torch.randn(8, n, generator=generator) for n in (3, 2))
    return [((x[:5], z[:5]), torch.arange(5) % 3), ((x[5:], z[5:]), torch.arange(3) % 3)]


def named(seed):
    generator = torch.Generator().manual_seed(seed)
    rows = [
        {"x": torch.randn(3, generator=generator), "scale": torch.tensor(1.5), "labels": k % 3}
        for k in range(8)
    ]
    return DataLoader(rows, batch_size=3)


MODELS = {
    "classes of texts": (bert, batches("classes")),
    "a number for each text": (lambda: bert(num_labels=1), batches("numbers")),
    "flags of texts": (
        lambda: bert(problem_type="multi_label_classification"),
        batches("flags"),
    ),
    "a tag for each word": (lambda: bert("TokenClassification"), batches("tags")),
    "next words": (gpt2, batches("words")),
    "translations": (t5, batches("words")),
    "a pair of inputs": (TwoInputs, pairs),
    "inputs and outputs by name": (Named, named),
}


def made(name):
    make, data = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval(), data


def inputs_and_loss(model, batch):
    """What a loop calls its model with, and the loss of that."""
    if not isinstance(batch, dict):
        inputs, y = batch
        return inputs, F.cross_entropy(model(*inputs)[0], y)
    if isinstance(model, Named):
        y = batch["labels"]
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        return batch, F.cross_entropy(model(**inputs)["logits"], y)
    return batch, model(**batch).loss


def learn(model, method, data):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    method.before_task()
    for batch in data:
        optimizer.zero_grad()
        inputs, loss = inputs_and_loss(model, batch)
        loss.backward()
        method.before_step(inputs)
        method.add_gradient_()
        optimizer.step()
        method.after_step()
    method.consolidate(data)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_it_learns_two_tasks_and_is_restored(method, name):
    model, data = made(name)
    if method == "EWC-DR" and name in ("a number for each text", "flags of texts"):
        with pytest.raises(ValueError, match="the logits of classes"):
            EWCDR(model, 3.0).consolidate(data(0))
        return
    regularizer = METHODS[method](model, 3.0)
    for seed in range(2):
        learn(model, regularizer, data(seed))
    twin = copy.deepcopy(model)
    restored = METHODS[method](twin, 3.0)
    restored.load_state_dict(load(save(regularizer.state_dict())))
    batch = next(iter(data(5)))
    for m, r in ((model, regularizer), (twin, restored)):
        with torch.no_grad():
            for p in m.parameters():
                p += 0.1 * torch.ones_like(p).cumsum(0) / len(p)
        r.before_step(batch[0] if isinstance(batch, (tuple, list)) else batch)
    assert 0 < regularizer.penalty().item() < 1e6
    torch.testing.assert_close(regularizer.penalty(), restored.penalty())
    assert same(regularizer.state_dict(), restored.state_dict())


def moved(name, make):
    """A method after one task, at other parameters, and batches of the next one."""
    model, data = made(name)
    method = make(model)
    method.consolidate(data(0))
    old = copy.deepcopy(model)
    with torch.no_grad():
        for k, p in enumerate(model.parameters()):
            p += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(k))
    return model, method, old, data


def divergences(old, new):
    return (old.softmax(-1) * (old.log_softmax(-1) - new.log_softmax(-1))).sum(-1)


@pytest.mark.parametrize("with_labels", [True, False])
def test_lwf_compares_all_words_that_are_followed_by_one(with_labels):
    model, lwf, old, data = moved("next words", lambda model: LwF(model, 1.0, temperature=1.0))
    batch = data(3)[1]
    found = []
    for words, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        alone = {"input_ids": words[None, : mask.sum()]}
        with torch.no_grad():
            found.append(divergences(old(**alone).logits, model(**alone).logits)[0, :-1])
    lwf.before_step(batch if with_labels else {k: v for k, v in batch.items() if k != "labels"})
    torch.testing.assert_close(lwf.penalty().detach(), torch.cat(found).mean(), rtol=1e-4, atol=0)


def test_lwf_leaves_out_the_words_without_a_label():
    model, lwf, old, data = moved("a tag for each word", lambda m: LwF(m, 1.0, temperature=1.0))
    batch = data(3)[1]
    batch["labels"][0, :4] = -100
    lwf.before_step(batch)
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    with torch.no_grad():
        found = divergences(old(**inputs).logits, model(**inputs).logits)
    expected = found[batch["labels"] != -100].mean()
    torch.testing.assert_close(lwf.penalty().detach(), expected, rtol=1e-4, atol=0)


def test_lwf_holds_numbers_by_half_their_squared_distance():
    model, lwf, old, data = moved("a number for each text", lambda model: LwF(model, 1.0))
    batch = data(3)[1]
    lwf.before_step(batch)
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    with torch.no_grad():
        expected = (old(**inputs).logits - model(**inputs).logits).square().mean() / 2
    torch.testing.assert_close(lwf.penalty().detach(), expected)


@pytest.mark.parametrize("name", [n for n in MODELS if n not in ("flags of texts",)])
def test_replay_of_all_is_the_loss_of_the_model_on_what_was_drawn(name):
    model, replay, _, _ = moved(name, lambda model: Replay(model, 1.0, batch_size=9))
    replay.before_step()
    total, number = 0.0, 0
    for _, part in replay._batch:
        for n in range(len(part)):
            row = part.take(torch.tensor([n]))
            if isinstance(row.inputs, tuple):
                loss, count = F.cross_entropy(model(*row.inputs)[0], row.target), 1
            elif "scale" in row.inputs:
                loss, count = F.cross_entropy(model(**row.inputs)["logits"], row.target), 1
            else:
                labels = row.target[..., 1:] if name == "next words" else row.target
                count = int((labels != -100).sum())
                loss = model(**row.inputs, labels=row.target).loss
            if count == 0:  # a text of one word, of which the model has no loss
                continue
            total, number = total + count * loss.detach(), number + count
    scale = 0.5 if name == "a number for each text" else 1.0  # half the squared error
    constant = 0.5 * torch.tensor(2 * torch.pi).log() if scale == 0.5 else 0.0
    expected = scale * total / number + constant
    torch.testing.assert_close(replay.penalty().detach(), expected, rtol=1e-4, atol=1e-5)


def test_replay_keeps_batches_of_several_lengths_apart():
    _, replay, _, data = moved("classes of texts", lambda model: Replay(model, batch_size=400))
    assert replay.n_stored == sum(len(batch["labels"]) for batch in data(0))
    replay.before_step()
    kept = {tuple(row.tolist()) for batch in data(0) for row in batch["input_ids"]}
    drawn = {tuple(r.tolist()) for _, part in replay._batch for r in part.inputs["input_ids"]}
    assert drawn == kept


@pytest.mark.parametrize("method", ["LwF", "replay"])
def test_on_the_hooks_of_an_optimizer_it_sees_what_the_model_is_called_with(method):
    model, data = made("next words")
    model.train()
    regularizer = METHODS[method](model, 3.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with regularizer.attach(optimizer):
        for seed in range(2):
            for batch in data(seed):
                optimizer.zero_grad()
                model(**batch).loss.backward()
                alone = model.transformer.h[0].mlp.c_fc.weight.grad.clone()
                optimizer.step()
                added = model.transformer.h[0].mlp.c_fc.weight.grad - alone
                assert (added.abs().max() > 0) == (seed > 0)
            regularizer.consolidate(data(seed))


@pytest.mark.parametrize("method", [LwF, Replay])
def test_a_state_of_another_likelihood_is_refused(method):
    model, data = nn.Linear(3, 1), (torch.randn(6, 3), torch.rand(6, 1).round())
    of_numbers = method(model, likelihood="gaussian")
    of_function = method(model, likelihood=lambda output: torch.distributions.Laplace(output, 1.0))
    for one in (of_numbers, of_function):
        one.consolidate(data)
    with pytest.raises(ValueError, match=r"reads outputs as Gaussian.* but .* Bernoulli"):
        method(model, likelihood="bernoulli").load_state_dict(of_numbers.state_dict())
    with pytest.raises(ValueError, match="a function: give it again"):
        method(model).load_state_dict(of_function.state_dict())


def test_a_model_is_called_by_position_and_by_name_at_once():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(3, 4)

        def forward(self, x, *, scale=1.0):
            return self.body(x) * scale

    model, x, y = Scaled(), torch.randn(8, 3), torch.arange(8) % 4
    lwf, optimizer = LwF(model, 1.0, temperature=1.0), torch.optim.SGD(model.parameters(), lr=0.1)
    lwf.consolidate((x, y))
    old = copy.deepcopy(model)
    nn.init.ones_(model.body.weight)
    with lwf.attach(optimizer):
        F.cross_entropy(model(x, scale=3.0), y)
        optimizer.step()
    with torch.no_grad():
        expected = divergences(old(x, scale=3.0), model(x, scale=3.0)).mean()
    torch.testing.assert_close(lwf.penalty().detach(), expected, rtol=1e-4, atol=1e-6)
