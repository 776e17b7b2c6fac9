"""What has no scores is refused by its name."""

import pytest
import torch

from ewc_lib._checking import check_finite_parameters


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_the_first_parameter_that_is_not_finite_is_named(bad):
    parameters = {"a": torch.ones(2), "b": torch.tensor([1.0, bad]), "c": torch.tensor([bad])}
    with pytest.raises(ValueError, match="parameter 'b' holds NaN or infinite"):
        check_finite_parameters(parameters)
    check_finite_parameters({"a": parameters["a"]})
