import torch
from torch import nn

from ewc_lib.experiments.cost.models import GPT2, Transformer, cnn, resnet


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


def test_the_residual_network_is_that_of_eighteen_layers():
    model = resnet()
    weights = [p for p in model.parameters() if p.dim() > 1]
    projections = [p for p in weights if p.shape[-2:] == (1, 1)]
    assert len(weights) - len(projections) == 18
    assert sum(p.numel() for p in model.parameters()) == 11_220_132


def test_a_stage_of_the_residual_network_halves_the_image_and_doubles_the_width():
    with torch.random.fork_rng(devices=[]):
        model = resnet((1, 1, 1), width=4, classes=7).eval()
    shapes, x = [], torch.zeros(2, 3, 16, 16)
    for layer in model:
        x = layer(x)
        shapes.append(tuple(x.shape[1:]))
    assert shapes[3:6] == [(4, 16, 16), (8, 8, 8), (16, 4, 4)]
    assert shapes[-1] == (7,)


def test_a_residual_block_adds_to_what_comes_in():
    with torch.random.fork_rng(devices=[]):
        block = resnet((1,), width=4)[3].eval()
    x = torch.rand(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.nn.init.zeros_(block.norm2.weight)
    torch.nn.init.zeros_(block.norm2.bias)
    torch.testing.assert_close(block(x), x)
