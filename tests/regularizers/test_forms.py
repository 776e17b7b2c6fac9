"""Every method takes models and batches as people have them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from torch import nn
from torch.utils.data import DataLoader

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
    config = transformers.BertConfig(**TINY, num_labels=3, **options)
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
    "a number for each text": (
        lambda: bert(problem_type="regression") if False else regression(),
        batches("numbers"),
    ),
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


def regression():
    transformers = pytest.importorskip("transformers")
    return transformers.BertForSequenceClassification(transformers.BertConfig(**TINY, num_labels=1))


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
    if method == "EWC-DR" and name in ("next words", "a number for each text", "flags of texts"):
        pytest.skip("it is about classes")
    if method == "Kronecker Laplace" and name == "next words":
        pytest.skip("a tied table has no factors")
    model, data = made(name)
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
