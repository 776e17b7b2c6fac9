import pytest
import torch
from torch import nn

from ewc_lib.experiments.cost.models import BENCHMARKS, GPT2, Transformer, cnn


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
    one, other = benchmark.model().state_dict(), benchmark.model().state_dict()
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


def test_norms_change_what_the_network_computes():
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = cnn(norms=True).eval()
    norms = [module for module in net if isinstance(module, nn.BatchNorm2d)]
    plain = nn.Sequential(*(module for module in net if not isinstance(module, nn.BatchNorm2d)))
    assert len(norms) == 3
    assert not torch.allclose(net(x), plain(x), atol=1e-3)


def test_transformer_sees_the_order_of_tokens():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Transformer(vocabulary=5, length=4, width=8, heads=2)
    output = model(torch.tensor([[0, 1, 2, 3], [1, 0, 2, 3]]))
    assert not torch.allclose(output[0], output[1], atol=1e-5)


def small_gpt2():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GPT2(vocabulary=7, length=5, width=8, layers=2, heads=2)


def test_gpt2_does_not_look_ahead():
    tokens = torch.tensor([[0, 1, 2, 3, 4], [0, 1, 2, 6, 5]])
    output = small_gpt2()(tokens)
    torch.testing.assert_close(output[0, :3], output[1, :3])
    assert not torch.allclose(output[0, 3:], output[1, 3:], atol=1e-5)


def test_gpt2_reads_and_writes_with_the_same_weights():
    model = small_gpt2()
    assert model.head.weight is model.token.weight
    assert "head.weight" not in dict(model.named_parameters())


def test_the_target_of_a_token_is_the_next_one():
    ((inputs, targets),) = BENCHMARKS["gpt2"].batches(3)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
