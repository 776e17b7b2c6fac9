import torch

from ewc_lib import data
from ewc_lib.continual import permute_pixels


def test_every_image_keeps_its_pixels_in_one_common_new_order():
    a = data.digits()
    b = permute_pixels(a, seed=3)
    before, after = (torch.cat([task.x_train, task.x_test]) for task in (a, b))
    order = [int((before == after[:, i : i + 1]).all(0).nonzero()[0]) for i in range(64)]
    assert torch.equal(before[:, order], after)
    assert not torch.equal(before, after)


def test_labels_stay():
    a = data.digits()
    b = permute_pixels(a, seed=3)
    assert torch.equal(a.y_train, b.y_train)
    assert torch.equal(a.y_test, b.y_test)


def test_the_seed_chooses_the_permutation_and_the_global_state_is_not_used():
    a = data.digits()
    before = torch.random.get_rng_state()
    same = [permute_pixels(a, seed=1).x_train for _ in range(2)]
    assert torch.equal(*same)
    assert not torch.equal(same[0], permute_pixels(a, seed=2).x_train)
    assert torch.equal(before, torch.random.get_rng_state())
