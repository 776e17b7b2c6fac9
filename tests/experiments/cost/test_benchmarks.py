import pickle

import pytest
import torch

from ewc_lib.experiments.cost.benchmarks import BENCHMARKS, LARGE, _built, benchmarks
from ewc_lib.experiments.cost.models import GPT2, resnet


@pytest.fixture(params=BENCHMARKS)
def benchmark(request):
    return BENCHMARKS[request.param]


def test_each_model_fits_its_data(benchmark):
    (inputs, targets), *_ = benchmark.batches(2)
    output = benchmark.model()(inputs)
    assert output.shape[:-1] == targets.shape
    assert targets.max() < output.shape[-1]


def test_models_and_data_are_the_same_every_time_and_leave_the_random_state_alone(benchmark):
    before = torch.get_rng_state()
    one = benchmark.model().state_dict()
    _built.cache_clear()
    other = benchmark.model().state_dict()
    data = torch.cat([targets for _, targets in benchmark.batches(5)])
    again = torch.cat([targets for _, targets in benchmark.batches(5)])
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(data, again)
    assert len(data.unique()) > 1


def test_models_are_in_eval_mode(benchmark):
    assert not any(module.training for module in benchmark.model().modules())


def test_batches_hold_all_observations_and_the_last_one_what_is_left(benchmark):
    n = 2 * benchmark.batch_size + 3
    sizes = [len(targets) for _, targets in benchmark.batches(n)]
    assert sizes == [benchmark.batch_size, benchmark.batch_size, 3]


def test_exact_is_out_of_reach_for_the_language_model_only():
    assert [name for name, benchmark in BENCHMARKS.items() if not benchmark.exact] == ["gpt2"]


def test_the_target_of_a_token_is_the_next_one():
    ((inputs, targets),) = BENCHMARKS["gpt2"].batches(3)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_the_large_models_are_a_residual_network_and_gpt2():
    small = {"resnet18": resnet((1,), 2), "gpt2-124m": GPT2(50_257, 256, 2, 1, 1)}
    for name, model in small.items():
        (inputs, targets), *_ = LARGE[name].batches(2)
        assert model(inputs).shape[:-1] == targets.shape
        assert targets.max() < model(inputs).shape[-1]
    with torch.device("meta"):
        assert sum(p.numel() for p in LARGE["gpt2-124m"].build().parameters()) == 124_439_808


def test_a_processor_measures_what_it_always_has():
    assert benchmarks() == benchmarks("cpu") == BENCHMARKS
    assert all(benchmark.device == "cpu" for benchmark in BENCHMARKS.values())


def test_an_accelerator_measures_more_data_and_larger_models_in_the_same_batches():
    there = benchmarks("cuda")
    assert list(there) == [*BENCHMARKS, *LARGE]
    assert all(benchmark.device == "cuda" for benchmark in there.values())
    for name, here in BENCHMARKS.items():
        assert there[name].n >= here.n
        assert there[name]._replace(n=here.n, device="cpu") == here


def test_a_model_and_its_data_are_made_on_the_device():
    there = BENCHMARKS["cnn"]._replace(device="meta")
    assert {tensor.device.type for tensor in there.model().state_dict().values()} == {"meta"}
    assert {part.device.type for batch in there.batches(200) for part in batch} == {"meta"}


def test_a_model_that_was_changed_is_not_given_out_again():
    model = BENCHMARKS["mlp"].model()
    with torch.no_grad():
        next(model.parameters()).zero_()
    assert next(BENCHMARKS["mlp"].model().parameters()).any()


@pytest.mark.parametrize("name", [*BENCHMARKS, *LARGE])
def test_benchmarks_can_be_sent_to_another_process(name):
    sent = benchmarks("cuda")[name]
    again = pickle.loads(pickle.dumps(sent))
    assert (again.title, again.n, again.device) == (sent.title, sent.n, "cuda")


def test_a_model_is_built_in_the_default_precision_of_the_moment():
    before = torch.get_default_dtype()
    for dtype in (torch.float32, torch.float64, torch.float32):
        torch.set_default_dtype(dtype)
        try:
            assert {p.dtype for p in BENCHMARKS["mlp"].model().parameters()} == {dtype}
        finally:
            torch.set_default_dtype(before)
