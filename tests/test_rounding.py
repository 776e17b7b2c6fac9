import pytest
import torch

from ewc_lib._rounding import Rests, is_coarse

HALF = torch.bfloat16, torch.float16


@pytest.mark.parametrize("dtype", HALF)
def test_small_steps_add_up(dtype):
    place, rests = {"w": torch.ones(3, dtype=dtype)}, Rests()
    single = {"w": torch.ones(3)}
    for _ in range(1000):
        whole = rests.whole(place, single)
        rests.write_(place, {"w": whole["w"] + 1e-4})
    torch.testing.assert_close(
        place["w"].float() + rests.values["w"], torch.full((3,), 1.1), rtol=1e-4, atol=0
    )
    torch.testing.assert_close(place["w"], torch.full((3,), 1.1).to(dtype))


def test_what_others_do_in_between_stays():
    place, rests = {"w": torch.ones(3, dtype=torch.bfloat16)}, Rests()
    rests.write_(place, {"w": torch.full((3,), 1.001)})
    place["w"].add_(1.0)
    torch.testing.assert_close(rests.whole(place, rests.values)["w"], torch.full((3,), 2.001))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_is_kept_of_full_precision(dtype):
    place, rests = {"w": torch.ones(3, dtype=dtype)}, Rests()
    rests.write_(place, {"w": torch.full((3,), 1.5, dtype=dtype)})
    assert place["w"][0] == 1.5
    assert not rests.values
    assert rests.whole(place, place)["w"] is place["w"]


def test_coarse_is_half_precision_alone():
    assert all(is_coarse(torch.ones(1, dtype=dtype)) for dtype in HALF)
    fine = torch.float32, torch.float64, torch.complex64, torch.int8
    assert not any(is_coarse(torch.ones(1, dtype=dtype)) for dtype in fine)
