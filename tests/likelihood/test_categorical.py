"""Class labels: those of the next token, and classes on any axis."""

import pytest
import torch
import torch.nn.functional as F

from ewc_lib.likelihood import Categorical
from ewc_lib.likelihood.outputs import output_distribution
from tests.scenarios import same

NEXT = Categorical(next_token=True)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def some_output(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def labels(*shape, classes, seed=1):
    return torch.randint(classes, shape, generator=generator(seed))


def test_a_next_token_is_scored_by_the_position_before_it():
    output, text = some_output(4, 6, 5), labels(4, 6, classes=5)
    text[0, :3] = text[1, 4] = text[2] = -100
    losses = F.cross_entropy(output[:, :-1].mT, text[:, 1:], reduction="none").sum(1)
    NEXT.check(output, text)
    torch.testing.assert_close(NEXT.log_prob(output, text), -losses)
    assert same(NEXT.mask(text), F.pad(text[:, 1:] != -100, (0, 1)))


def test_the_first_token_and_the_last_position_say_nothing():
    output, text = some_output(2, 4, 5), labels(2, 4, classes=5)
    other_output, other_text = output.clone(), text.clone()
    other_output[:, -1] += 1 + torch.arange(5)
    other_text[:, 0] = 99  # outside the classes
    NEXT.check(output, other_text)
    assert same(NEXT.log_prob(other_output, other_text), NEXT.log_prob(output, text))


def test_a_bad_next_token_is_named():
    text = torch.zeros(3, 4, dtype=torch.long)
    text[1, 2] = 7
    with pytest.raises(ValueError, match="label 7 of observation 11 is outside the 5 classes"):
        NEXT.check(torch.zeros(3, 4, 5), text, first=10)


def test_next_tokens_need_a_sequence():
    with pytest.raises(ValueError, match=r"next tokens must be \[N, T\], got \(4, 5\) and \(4,\)"):
        NEXT.check(torch.zeros(4, 5), torch.zeros(4, dtype=torch.long))


def test_next_tokens_are_drawn_from_the_position_before_them():
    sure = torch.tensor([[2, 0, 1]])
    output = 100 * F.one_hot(sure, 3).double()
    assert NEXT.sample(output, generator())[0, 1:].tolist() == [2, 0]
    NEXT.check(output, NEXT.sample(output, generator()))


def test_outcomes_of_next_tokens_have_one_first_token():
    output = some_output(2, 3, 4)
    values, p = NEXT.outcomes(output)
    assert values.shape == p.shape == (4, 2, 3)
    assert p[:, :, 0].tolist() == [[1, 1], [0, 0], [0, 0], [0, 0]]
    torch.testing.assert_close(p[:, :, 1:], output.softmax(-1).movedim(-1, 0)[:, :, :-1])


def test_next_token_has_a_name():
    assert output_distribution("next-token") == NEXT


@pytest.mark.parametrize("class_dim", [1, 2, -2, -1, 3])
@pytest.mark.parametrize("method", ["log_prob", "sample", "outcomes", "mask", "invalid"])
def test_an_axis_of_classes_is_the_last_one_moved(class_dim, method):
    last, target = some_output(4, 2, 6, 3), labels(4, 2, 6, classes=3)
    target[0, 1, 2] = -100
    moved, there, here = (
        last.movedim(-1, class_dim),
        Categorical(class_dim=class_dim),
        Categorical(),
    )
    there.check(moved, target)
    if method == "log_prob":
        assert same(there.log_prob(moved, target), here.log_prob(last, target))
    elif method == "sample":
        assert same(there.sample(moved, generator()), here.sample(last, generator()))
    elif method == "outcomes":
        pairs = zip(there.outcomes(moved), here.outcomes(last), strict=True)
        assert all(same(a, b) for a, b in pairs)
    elif method == "mask":
        assert same(there.mask(target), target != -100)
    else:
        last[2, 1, 3] = -torch.inf
        assert same(there.invalid(moved).movedim(class_dim, -1), here.invalid(last))
        assert there.invalid(moved).any()


def test_log_prob_of_classes_on_axis_one_is_minus_the_cross_entropy():
    output, target = some_output(3, 4, 5, 6), labels(3, 5, 6, classes=4)
    losses = F.cross_entropy(output, target, reduction="none").sum((1, 2))
    torch.testing.assert_close(Categorical(class_dim=1).log_prob(output, target), -losses)


def test_where_both_axes_fit_an_image_one_has_to_be_chosen():
    output, target = torch.zeros(2, 3, 3, 3), torch.zeros(2, 3, 3, dtype=torch.long)
    with pytest.raises(ValueError, match=r"class_dim=1\) or Categorical\(class_dim=-1"):
        Categorical().check(output, target)
    Categorical(class_dim=1).check(output, target)
    Categorical(class_dim=-1).check(output, target)
    Categorical().check(output[0], target[0])  # a sequence has its classes on the last axis


@pytest.mark.parametrize("shape", [(2, 3, 5, 6), (2, 3, 5)])
def test_classes_on_axis_one_are_pointed_at(shape):
    target = torch.zeros(shape[0], *shape[2:], dtype=torch.long)
    with pytest.raises(ValueError, match=r"choose Categorical\(class_dim=1\)"):
        Categorical().check(torch.zeros(shape), target)


@pytest.mark.parametrize("class_dim", [3, -3, -4, 7])
def test_an_axis_that_the_output_does_not_have_is_refused(class_dim):
    with pytest.raises(ValueError, match=f"for class_dim={class_dim}, got"):
        Categorical(class_dim=class_dim).check(torch.zeros(2, 3, 4), torch.zeros(2, 3).long())


def test_the_axis_of_the_observations_holds_no_classes():
    with pytest.raises(ValueError, match="class_dim=0 is the axis of the observations"):
        Categorical(class_dim=0)


def test_soft_labels_are_refused_with_what_works():
    output = some_output(3, 4)
    with pytest.raises(ValueError, match=r"soft labels.* any integer labels do"):
        Categorical().check(output, output.softmax(-1))
