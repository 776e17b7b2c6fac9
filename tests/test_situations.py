"""Situations in which people have met wrong numbers or errors, as small programs of a user.

Each compares with one observation at a time, or with the same calculation in full precision.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Independent, Normal, StudentT
from torch.utils.data import DataLoader, TensorDataset

from ewc_lib import EWC, fisher_information, freeze_norms
from ewc_lib.continual import train
from ewc_lib.fisher import Categorical
from ewc_lib.regularizers import MAS, SI, AdapterEWC, LwF, Replay


def classifier(inputs=4, classes=3, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, classes))


def observations(n=24, inputs=4, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, inputs, generator=generator), torch.arange(n) % classes


def language_model():
    transformers = pytest.importorskip("transformers")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=40, n_positions=12)
        ).eval()


def squares_of_own_loss(model, batch, count):
    """Square the gradient of the sum over tokens of the model's own loss, text by text."""
    found = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for n in range(len(batch["labels"])):
        one = {key: value[n : n + 1] for key, value in batch.items()}
        model.zero_grad()
        (model(**one).loss * count(one["labels"])).backward()
        for name, p in model.named_parameters():
            found[name] += p.grad.square() / len(batch["labels"])
    return found


def test_2_the_labels_of_a_collator_are_shifted_as_the_model_shifts_them():
    model = language_model()
    ids = torch.randint(40, (4, 10), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :4] = -100
    batch = {"input_ids": ids, "labels": labels}
    found = fisher_information(model, [batch], kind="empirical").diagonal()
    wanted = squares_of_own_loss(model, batch, lambda labels: (labels[:, 1:] != -100).sum())
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("fused", [False, True])
def test_3_a_gradient_scaler_does_not_weaken_the_penalty_or_inflate_a_path(fused):
    def trained(scaled):
        model, (x, y) = classifier(), observations()
        ewc, si = EWC(model, 5.0), SI(model, 5.0)
        ewc.consolidate((x, y))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
        si.attach(optimizer)
        ewc.attach(optimizer)
        scaler = torch.amp.GradScaler("cpu", enabled=scaled)
        for _ in range(5):
            optimizer.zero_grad()
            scaler.scale(F.cross_entropy(model(x), (y + 1) % 3)).backward()
            scaler.step(optimizer)
            scaler.update()
        return ewc.penalty().item(), si.consolidate(None).trace().item()

    assert trained(True) == pytest.approx(trained(False), rel=1e-4)


@pytest.mark.parametrize("structure", ["diagonal", "dense", "kronecker", "lowrank"])
def test_3b_a_penalty_in_a_region_of_autocast_is_that_outside(structure):
    model, data = classifier(), observations()
    ewc = EWC(model, 5.0, structure=structure)
    ewc.consolidate(data)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1
    outside = ewc.penalty()
    with torch.autocast("cpu", torch.bfloat16):
        within = ewc.penalty()
    assert torch.equal(within, outside)


def test_3c_steps_of_half_precision_add_up_to_those_of_single_precision():
    def left(dtype):
        model = classifier().bfloat16().to(dtype)
        ewc = EWC(model, 100.0)
        ewc.consolidate((observations()[0].to(dtype), observations()[1]))
        with torch.no_grad():
            for p in model.parameters():
                p.copy_((p.float() * 1.01).bfloat16())
        optimizer, before = torch.optim.SGD(model.parameters(), lr=1e-2), ewc.penalty().item()
        ewc.attach(optimizer)
        for _ in range(100):
            optimizer.step()
        return ewc.penalty().item() / before

    assert left(torch.bfloat16) == pytest.approx(left(torch.float32), rel=0.02)


def test_4_a_regression_is_trained_by_the_likelihood_of_its_regularizer():
    torch.manual_seed(0)
    model, x = nn.Linear(4, 1), observations()[0]
    y = x @ torch.tensor([[1.0], [2.0], [-1.0], [0.5]])
    with pytest.raises(ValueError, match="criterion"):
        train(model, (x, y), steps=1, seed=0)
    ewc = EWC(model, 0.0, likelihood="gaussian")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True)
    train(model, loader, steps=200, seed=0, regularizer=ewc, optimizer=optimizer)
    assert F.mse_loss(model(x), y) < 1e-3


def test_5_a_classifier_that_grows_keeps_what_it_holds():
    model, data = classifier(), observations()
    ewc = EWC(model, 5.0)
    ewc.consolidate(data)
    old, larger = model[2], nn.Linear(8, 5)
    with torch.no_grad():
        larger.weight[:3], larger.bias[:3] = old.weight, old.bias
    model[2] = larger
    assert ewc.penalty() == 0
    assert ewc.precision.diagonal()["2.weight"][3:].abs().max() == 0
    with torch.no_grad():
        larger.weight[3:] += 1.0
    assert ewc.penalty() == 0


def test_6_what_is_frozen_is_a_constant_and_what_is_new_is_free():
    model, data = classifier(), observations()
    ewc = EWC(model, 5.0)
    ewc.consolidate(data)
    model[0].requires_grad_(False)
    model.append(nn.Linear(3, 3))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    ewc.attach(optimizer)
    x, y = data
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    ewc.consolidate(data)
    assert set(ewc.anchor) == {name for name, _ in model.named_parameters()}


def test_11_several_inputs_are_one_of_a_pair_and_others_are_picked():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = classifier()

        def forward(self, a, b):
            return self.net(a + b)

    model, (x, y) = Two(), observations()
    found = fisher_information(model, [((x, x), y)])
    with pytest.raises(ValueError, match="batch="):
        fisher_information(model, [(x, x, y)])
    picked = fisher_information(model, [(x, x, y)], batch=lambda b: ((b[0], b[1]), b[2]))
    assert torch.equal(found.diagonal()["net.0.weight"], picked.diagonal()["net.0.weight"])


def test_7_outputs_under_masks_and_of_packed_sequences_have_a_sensitivity():
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = nn.GRU(4, 5, batch_first=True), nn.Linear(5, 3)

        def forward(self, x):
            lengths = (x.abs().sum(-1) > 0).sum(1)
            packed = nn.utils.rnn.pack_padded_sequence(
                x, lengths, batch_first=True, enforce_sorted=False
            )
            return self.head(self.rnn(packed)[1][-1])

    torch.manual_seed(0)
    model, x = Tagger(), torch.randn(6, 5, 4)
    x[3:, 3:] = 0
    y = torch.zeros(6, dtype=torch.long)
    found = MAS(model, 1.0).consolidate((x, y)).values
    for name, p in model.named_parameters():
        each = [torch.autograd.grad(model(one[None]).square().sum(), p)[0].abs() for one in x]
        torch.testing.assert_close(found[name], sum(each) / 6, rtol=1e-4, atol=1e-5)


def test_10_a_recurrent_network_goes_by_a_rule():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 3)

        def forward(self, x):
            return self.head(self.rnn(x)[0][:, -1])

    torch.manual_seed(0)
    F_ = fisher_information(Reader(), (torch.randn(6, 5, 4), torch.arange(6) % 3))
    assert set(F_.paths.values()) == {"rule"}


def test_13b_a_part_of_sorted_data_is_drawn_at_random():
    """Labels of the data, sorted by class, decide the empirical kind."""
    model, (x, y) = classifier(), observations(n=600)
    order = y.argsort()
    data = x[order], y[order]
    whole = fisher_information(model, data, kind="empirical").diagonal()["2.bias"]
    part = fisher_information(model, data, kind="empirical", n_samples=200).diagonal()["2.bias"]
    assert (part / whole - 1).abs().max() < 0.2


class MeanAndSpread(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = classifier(classes=2)

    def forward(self, x):
        return self.net(x)


@pytest.mark.parametrize("kind", ["exact", "sketch", "sampled", "empirical"])
@pytest.mark.parametrize("family", [Normal, lambda m, s: StudentT(4.0, m, s)])
def test_14_any_distribution_of_torch_has_a_fisher_information(kind, family):
    def likelihood(output):
        return family(output[:, 0], output[:, 1].exp())

    model, (x, _) = MeanAndSpread(), observations()
    y = x.sum(1)
    F_ = fisher_information(model, (x, y), likelihood, kind=kind)
    assert F_.trace() > 0


def test_14_several_learned_spreads_are_no_zero():
    def likelihood(output):
        return Independent(Normal(output[:, :1], output[:, 1:].exp()), 1)

    model, (x, _) = MeanAndSpread(), observations()
    F_ = fisher_information(model, (x, x[:, :1]), likelihood).diagonal()
    sigma = model(x)[:, 1].exp()
    torch.testing.assert_close(
        F_["net.2.bias"], torch.stack([(1 / sigma**2).mean(), torch.tensor(2.0)])
    )


def test_15_the_pixels_of_images_have_classes_on_the_axis_that_is_named():
    model = nn.Conv2d(2, 3, 1)
    x, y = torch.randn(4, 2, 5, 5), torch.randint(3, (4, 5, 5))
    found = fisher_information(model, (x, y), Categorical(class_dim=1), kind="empirical")
    wanted = 0
    for image, labels in zip(x, y, strict=True):
        loss = F.cross_entropy(model(image[None]), labels[None], reduction="sum")
        wanted = wanted + torch.autograd.grad(loss, model.bias)[0].square() / 4
    torch.testing.assert_close(found.diagonal()["bias"], wanted)


@pytest.mark.parametrize(
    "criterion",
    [
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0])),
        nn.CrossEntropyLoss(label_smoothing=0.1),
    ],
    ids=["weights", "smoothing"],
)
def test_15_a_loss_without_a_likelihood_is_refused_by_name(criterion):
    with pytest.raises(ValueError, match="not a log-likelihood"):
        fisher_information(classifier(), observations(), criterion=criterion)


def test_9_batch_normalisation_warns_and_keeps_the_first_task_once_it_is_frozen():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2))
    x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] > 0).long()
    train(model, (x, y), steps=200, seed=0)
    ewc = EWC(model, strength=1e9)
    with pytest.warns(RuntimeWarning, match=r"\['1'\].*freeze_norms\(model\)"):
        ewc.consolidate((x, y))

    def accuracy():
        return (model.eval()(x).argmax(1) == y).double().mean().item()

    def after_the_second_task():
        start = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
        train(model, (x + 3, 1 - y), steps=100, seed=0, regularizer=ewc, proximal=True)
        moved = nn.utils.parameters_to_vector(model.parameters()).detach() - start
        assert moved.abs().max() < 1e-3
        return accuracy()

    first, state = accuracy(), {name: v.clone() for name, v in model.state_dict().items()}
    assert after_the_second_task() < first - 0.3
    model.load_state_dict(state)
    freeze_norms(model)
    assert after_the_second_task() > first - 0.01


def test_13_a_state_resumes_in_another_wrapper():
    ewc = EWC(classifier(), strength=2.0)
    ewc.consolidate(observations())
    for wrap in (torch.compile, nn.DataParallel):
        other = classifier(seed=1)
        resumed = EWC(wrap(other), strength=2.0)
        resumed.load_state_dict(ewc.state_dict())
        plain = EWC(other, strength=2.0)
        plain.load_state_dict(resumed.state_dict())
        assert resumed.penalty() > 0
        torch.testing.assert_close(resumed.penalty(), plain.penalty())


@pytest.mark.parametrize("method", ["LwF", "Replay"])
def test_8_methods_that_run_the_model_take_the_batches_of_a_collator(method):
    model = language_model()
    words = torch.randint(40, (8, 6))
    batch = {"input_ids": words, "attention_mask": torch.ones_like(words), "labels": words}
    penalty = {"LwF": LwF, "Replay": Replay}[method](model)
    penalty.consolidate([batch])
    nn.init.normal_(model.lm_head.weight)
    penalty.before_step(batch)
    penalty.add_gradient_()
    assert model.lm_head.weight.grad.abs().max() > 0


def test_8_models_of_peft_are_held_by_the_weights_that_their_adapters_make():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(classifier(), peft.LoraConfig(r=2, target_modules=["0", "2"]))
    ewc = AdapterEWC(model, 1.0)
    ewc.consolidate(observations())
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p += 0.1
    moved = ewc.penalty().item()
    assert moved > 0
    model.merge_and_unload()
    assert ewc.penalty().item() == pytest.approx(moved, rel=1e-4)
