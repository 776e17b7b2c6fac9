import math
import re
from types import SimpleNamespace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import (
    BertConfig,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
)

from ewc_lib.continual import (
    accuracy,
    average_accuracy,
    backward_transfer,
    forgetting,
    forward_transfer,
    learning_accuracy,
    min_accuracy,
)


def test_accuracy_is_the_share_of_right_answers():
    logits = torch.eye(4)
    assert accuracy(nn.Identity(), (logits, torch.tensor([0, 1, 2, 3]))) == 1
    assert accuracy(nn.Identity(), (logits, torch.tensor([0, 1, 0, 0]))) == 0.5


def test_accuracy_runs_in_eval_mode_and_gives_the_modes_back():
    model = nn.Sequential(nn.Dropout(0.999), nn.Identity())
    model[1].eval()
    assert accuracy(model, (torch.eye(8), torch.arange(8))) == 1
    assert [m.training for m in model.modules()] == [True, True, False]


def test_long_data_are_classified_in_pieces():
    sizes = []

    class Spy(nn.Identity):
        def forward(self, x):
            sizes.append(len(x))
            return x

    x = torch.eye(2).repeat(6000, 1)
    assert accuracy(Spy(), (x, torch.tensor([0, 1]).repeat(6000))) == 1
    assert sizes == [10_000, 2000]


EYE, OWN = torch.eye(4), torch.tensor([0, 1, 0, 0])


class Logits(nn.Module):
    """A model of another library."""

    def forward(self, features):
        return SimpleNamespace(logits=features)


@pytest.mark.parametrize(
    ("model", "data"),
    [
        (nn.Identity(), DataLoader(TensorDataset(EYE, OWN), batch_size=3)),
        (nn.Identity(), TensorDataset(EYE, OWN)),
        (nn.Identity(), [(EYE[:1], OWN[:1]), (EYE[1:], OWN[1:])]),
        (Logits(), [{"features": EYE, "labels": OWN}]),
        (Logits(), (EYE.numpy(), OWN.int().numpy())),
    ],
    ids=["loader", "data set", "list", "dicts", "arrays"],
)
def test_accuracy_takes_data_in_every_form(model, data):
    assert accuracy(model, data) == 0.5


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.int32])
def test_labels_of_a_sequence_that_are_ignored_do_not_count(dtype):
    logits = torch.eye(5).expand(2, 5, 5)[:, :3]
    labels = torch.tensor([[0, 1, -100], [-100, -100, 0]], dtype=dtype)
    assert accuracy(nn.Identity(), (logits, labels)) == pytest.approx(2 / 3)
    assert accuracy(nn.Identity(), (logits, labels), ignore_index=0) == pytest.approx(1 / 4)
    assert math.isnan(accuracy(nn.Identity(), (logits, labels * 0 - 100)))


WORDS = torch.randint(13, (7, 6), generator=torch.Generator().manual_seed(0))
SIZES = {"vocab_size": 13, "num_labels": 13}
GPT2 = {"n_layer": 1, "n_head": 2, "n_embd": 8, "n_positions": 6}
BERT = {
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "hidden_size": 8,
    "intermediate_size": 8,
    "max_position_embeddings": 6,
}


def test_a_causal_language_model_is_asked_for_the_word_that_follows():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**SIZES, **GPT2))
    with torch.no_grad():
        best = model.eval()(WORDS).logits.argmax(-1)
    model.train()
    labels = torch.cat([WORDS[:, :1], best[:, :-1]], 1)
    labels[3:, 2] = (labels[3:, 2] + 1) % 13
    labels[:, 4] = -100
    nothing = {"input_ids": WORDS, "labels": torch.full_like(WORDS, -100)}
    batches = [nothing, {"input_ids": WORDS, "labels": labels}]
    assert accuracy(model, batches) == pytest.approx(24 / 28)
    assert all(module.training for module in model.modules())
    assert accuracy(model, [({"input_ids": WORDS}, best)]) == 1.0  # a pair says where labels are


def test_labels_of_each_word_are_compared_where_they_are():
    torch.manual_seed(0)
    model = BertForTokenClassification(BertConfig(**SIZES, **BERT)).eval()
    with torch.no_grad():
        best = model(WORDS).logits.argmax(-1)
    assert accuracy(model, [{"input_ids": WORDS, "labels": best}]) == 1.0


def test_pixels_are_classified_on_the_second_axis():
    labels = torch.randint(5, (2, 3, 4), generator=torch.Generator().manual_seed(0))
    logits = nn.functional.one_hot(labels, 5).movedim(-1, 1)
    wrong = labels.clone()
    wrong[0, 0] = (wrong[0, 0] + 1) % 5
    assert accuracy(nn.Identity(), (logits, labels)) == 1
    assert accuracy(nn.Identity(), (logits, wrong)) == pytest.approx(20 / 24)


def test_where_the_classes_may_be_on_two_axes_one_is_chosen():
    logits = torch.tensor([[[0.0, 1.0], [2.0, 3.0]]])
    labels = torch.tensor([[1, 1]])
    with pytest.raises(ValueError, match=r"axis 1 or on the last axis.*class_dim= of accuracy"):
        accuracy(nn.Identity(), (logits, labels))
    for axis, wanted in ((1, [[1, 1]]), (2, [[1, 1]]), (-1, [[1, 1]])):
        assert accuracy(nn.Identity(), (logits, torch.tensor(wanted)), class_dim=axis) == 1
    assert accuracy(nn.Identity(), (-logits, labels), class_dim=1) == 0


@pytest.mark.parametrize("shapes", [((4,), (4,)), ((4, 3), (4, 3)), ((4, 3), (4, 1))])
def test_shapes_without_an_axis_of_classes_are_refused(shapes):
    with pytest.raises(ValueError, match=re.escape("an output [N, C] needs labels [N]")):
        accuracy(nn.Identity(), (torch.zeros(shapes[0]), torch.zeros(shapes[1]).long()))


R = torch.tensor([[0.9, 0.2, math.nan], [0.7, 0.8, 0.3], [0.8, 0.5, 1.0]], dtype=torch.float64)
"""Three tasks, the next one measured before it is learned."""

INITIAL = torch.tensor([0.1, 0.15, 0.2], dtype=torch.float64)


@pytest.mark.claim("def-accuracy-matrix")
def test_metrics_are_what_their_formulas_say():
    assert average_accuracy(R) == pytest.approx((0.8 + 0.5 + 1.0) / 3)
    assert backward_transfer(R) == pytest.approx(((0.8 - 0.9) + (0.5 - 0.8)) / 2)
    assert forward_transfer(R, INITIAL) == pytest.approx(((0.2 - 0.15) + (0.3 - 0.2)) / 2)
    assert forgetting(R) == pytest.approx(((0.9 - 0.8) + (0.8 - 0.5)) / 2)
    assert learning_accuracy(R) == pytest.approx((0.9 + 0.8 + 1.0) / 3)


def test_an_accuracy_before_a_task_was_learned_is_nothing_to_forget():
    lucky = R.clone()
    lucky[0, 1] = 1.0
    assert forgetting(lucky) == forgetting(R)


def test_forgetting_is_measured_from_the_best_and_backward_transfer_from_the_first():
    late = torch.tensor([[0.5, 0.0, 0.0], [0.9, 0.5, 0.0], [0.7, 0.5, 0.5]])
    assert forgetting(late) == pytest.approx(0.1)
    assert backward_transfer(late) == pytest.approx(0.1)


@given(st.integers(2, 6), st.integers(0, 1000))
def test_a_network_that_forgets_nothing_and_gains_nothing_has_zero_of_both(T, seed):
    accuracies = torch.rand(T, generator=torch.Generator().manual_seed(seed))
    kept = accuracies.expand(T, T)
    assert forgetting(kept) == backward_transfer(kept) == 0
    assert average_accuracy(kept) == learning_accuracy(kept)


def test_a_single_task_has_an_average_and_no_transfer():
    one = torch.tensor([[0.75]])
    assert average_accuracy(one) == learning_accuracy(one) == 0.75
    for value in (backward_transfer(one), forgetting(one), forward_transfer(one, one[0])):
        assert math.isnan(value)


@pytest.mark.parametrize("shape", [(2, 3), (3,), (0, 0)])
def test_a_matrix_that_is_not_square_is_refused(shape):
    with pytest.raises(ValueError, match=re.escape(f"got {shape}")):
        average_accuracy(torch.zeros(shape))


def test_what_was_not_measured_is_not_taken_for_zero():
    holes = R.clone()
    holes[2, 0] = math.nan
    for value in (average_accuracy(holes), backward_transfer(holes), forgetting(holes)):
        assert math.isnan(value)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_initial_accuracies_of_other_tasks_are_refused(n):
    with pytest.raises(ValueError, match=re.escape(f"initial must have 3 entries, got ({n},)")):
        forward_transfer(R, torch.zeros(n))


def test_the_minimum_counts_what_comes_back_before_the_end_of_a_task():
    R = torch.tensor([[0.9, 0.5, math.nan], [0.8, 0.9, 0.5], [0.7, 0.6, 0.9]])
    lowest = torch.tensor(
        [[math.nan, math.nan, math.nan], [0.2, math.nan, math.nan], [0.75, 0.3, math.nan]]
    )
    assert min_accuracy(R, lowest) == pytest.approx((0.2 + 0.3) / 2)


def test_the_minimum_counts_what_does_not_come_back():
    R = torch.tensor([[0.9, 0.5], [0.1, 0.9]])
    assert min_accuracy(R, torch.tensor([[math.nan, math.nan], [0.2, math.nan]])) == pytest.approx(
        0.1
    )


def test_the_minimum_of_what_diverged_is_nan():
    R = torch.tensor([[0.9, 0.5], [math.nan, math.nan]])
    assert math.isnan(min_accuracy(R, torch.full((2, 2), math.nan)))


def test_the_minimum_needs_what_was_watched():
    with pytest.raises(ValueError, match="give learn"):
        min_accuracy(torch.eye(2), torch.full((2, 2), math.nan))
    some = torch.full((3, 3), math.nan)
    some[1, 0] = 0.5
    with pytest.raises(ValueError, match=r"rows \[2\] were learned"):
        min_accuracy(torch.eye(3), some)
    with pytest.raises(ValueError, match="shape of R"):
        min_accuracy(torch.eye(2), torch.full((3, 3), math.nan))
    assert math.isnan(min_accuracy(torch.eye(1), torch.full((1, 1), math.nan)))
