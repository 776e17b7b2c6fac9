"""What has no scores is refused by its name."""

import copy

import pytest
import torch
from torch import nn

from ewc_lib import fisher_information
from ewc_lib._checking import check_finite_parameters, check_modules
from ewc_lib.fisher import MatrixFree


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_the_first_parameter_that_is_not_finite_is_named(bad):
    parameters = {"a": torch.ones(2), "b": torch.tensor([1.0, bad]), "c": torch.tensor([bad])}
    with pytest.raises(ValueError, match="parameter 'b' holds NaN or infinite"):
        check_finite_parameters(parameters)
    check_finite_parameters({"a": parameters["a"]})


def test_parameters_without_values_are_named():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    with pytest.raises(ValueError, match=r"parameter '1\.weight' is on the meta device"):
        check_finite_parameters(dict(model.named_parameters()))


def test_buffers_of_a_lazy_module_are_to_be_given_a_shape_first():
    model = nn.Sequential(nn.Linear(2, 2), nn.LazyBatchNorm1d(affine=False))
    with pytest.raises(ValueError, match=r"'1\.running_mean' of a lazy .* run the model once"):
        check_modules(model)
    model(torch.ones(2, 2))
    check_modules(model)


def test_a_model_that_was_made_in_inference_mode_is_to_be_copied():
    with torch.inference_mode():
        model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"'weight' was made .* copy\.deepcopy\(model\)"):
        check_modules(model)
    check_modules(copy.deepcopy(model))


DOUBLE = torch.ones(3, 4, dtype=torch.float64)
INPUTS = {
    "linear": (nn.Linear(4, 2), DOUBLE),
    "convolution": (nn.Sequential(nn.Conv1d(1, 2, 4), nn.Flatten()), DOUBLE.unsqueeze(1)),
    "normalisation": (nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2)), DOUBLE),
    "whole numbers": (nn.Linear(4, 2), DOUBLE.long()),
    "no indices": (nn.Sequential(nn.Embedding(4, 2), nn.Flatten()), DOUBLE.float()),
}


@pytest.mark.parametrize(("model", "x"), INPUTS.values(), ids=INPUTS)
def test_inputs_of_another_dtype_than_the_model_are_told_with_what_to_do(model, x):
    data = (x, torch.zeros(3, dtype=torch.long))
    message = r"with parameters of torch\.float32, cannot take .* inputs\.to\(dtype\)"

    def multiply(model, data):
        return MatrixFree(model, data) @ torch.ones(sum(p.numel() for p in model.parameters()))

    for use in (fisher_information, multiply):
        with pytest.raises(ValueError, match=message):
            use(model, data)


def test_other_errors_of_a_model_are_its_own():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        fisher_information(nn.Linear(3, 2), (torch.ones(3, 4), torch.zeros(3, dtype=torch.long)))
