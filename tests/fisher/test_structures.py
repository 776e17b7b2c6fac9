"""Every form of a Fisher information answers every question as its whole matrix does."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial, reduce

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from safetensors.torch import load_file, save_file
from torch import nn

from ewc_lib import fisher_information
from ewc_lib.fisher import (
    BlockDiagonal,
    Dense,
    Diagonal,
    EigenKronecker,
    Fisher,
    Kronecker,
    LowRank,
)
from ewc_lib.fisher.structures import check_shapes
from ewc_lib.fisher.structures.base import NotKept
from ewc_lib.fisher.structures.states import encode
from tests.scenarios import PROPERTY, SCENARIOS, estimate, same

DOUBLE = torch.float64
SHAPES = {"layer.weight": (2, 3), "path.scale": (), "layer.bias": (3,)}
LAYERS = {
    "linear": ({"w": (2, 3), "b": (2,)}, False),
    "no bias": ({"w": (3, 2)}, False),
    "transposed": ({"w": (3, 2), "b": (2,)}, True),
    "transposed, no bias": ({"w": (3, 2)}, True),
    "square": ({"w": (2, 2)}, False),
    "convolution": ({"w": (2, 2, 1, 2), "b": (2,)}, False),
    "transposed convolution": ({"w": (2, 1, 2)}, True),
}
IN_GROUPS = {
    "grouped": ({"w": (4, 2, 2), "b": (4,)}, False, 2),
    "depthwise": ({"w": (3, 1, 2)}, False, 3),
    "transposed and grouped": ({"w": (4, 1, 3)}, True, 2),
    "pointwise, transposed and grouped": ({"w": (4, 2, 1), "b": (4,)}, True, 2),
}
ALL_LAYERS = {**{name: (*layer, 1) for name, layer in LAYERS.items()}, **IN_GROUPS}


# One of each, always the same for the same seed, of full rank or singular


def randn(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def sizes(shapes):
    return {name: torch.Size(shape) for name, shape in shapes.items()}


def count(shapes):
    return sum(math.prod(shape) for shape in shapes.values())


def paths(shapes):
    return dict(zip(shapes, ("rule", "generic", "unused"), strict=False))


def basis(size, seed):
    return torch.linalg.qr(randn(size, size, seed=seed)).Q.contiguous()


def factor(size, rank, seed, groups=1):
    if groups > 1:
        return torch.stack([factor(size, rank, seed + 100 * group) for group in range(groups)])
    directions = basis(size, seed)[:, :rank]
    return directions * (randn(rank, seed=seed).square() + 0.1) @ directions.mT


def diagonal(seed=0, singular=False, n=20, kind="exact", shapes=SHAPES):
    values = {
        name: randn(*shape, seed=seed + k).square() + 0.1
        for k, (name, shape) in enumerate(shapes.items())
    }
    if singular:
        next(iter(values.values())).view(-1)[:1] = 0
    return Diagonal(n, kind, paths(shapes), values)


def dense(seed=0, singular=False, n=20, kind="exact", shapes=SHAPES):
    size = count(shapes)
    root = randn(size, size // 2 if singular else size, seed=seed)
    return Dense(n, kind, paths(shapes), root @ root.mT, sizes(shapes))


def lowrank(seed=0, singular=False, n=20, kind="exact", shapes=SHAPES):
    size = count(shapes)
    rank = size // 3 if singular else size
    values = randn(rank, seed=seed).square() + 0.1
    directions = basis(size, seed)[:, :rank].clone()
    return LowRank(n, kind, paths(shapes), directions, values, sizes(shapes))


def kronecker(seed=0, singular=False, n=20, kind="exact", layer="linear", prefix=""):
    shapes, transposed, groups = ALL_LAYERS[layer]
    first, *others = shapes["w"]
    outputs = math.prod(others) if transposed else first // groups
    inputs = count(shapes) // (groups * outputs)
    B = factor(outputs, outputs, seed, groups)
    A = factor(inputs, inputs - 1 if singular else inputs, seed + 1, groups)
    shapes = {prefix + name: torch.Size(shape) for name, shape in shapes.items()}
    return Kronecker(n, kind, paths(shapes), B, A, shapes, transposed)


def eigenkronecker(seed=0, singular=False, n=20, kind="exact", layer="linear", prefix=""):
    F = kronecker(0, False, n, kind, layer, prefix)  # the same eigenvectors for every seed
    moments = randn(*F.size, seed=seed).square() + 0.1
    if singular:
        moments[..., 0, 1:] = 0
    return EigenKronecker(n, kind, F.paths, moments, *F.bases, F.shapes, F.transposed)


def blocks(*parts, seed=0, singular=False, n=20, kind="exact", order=None):
    made = tuple(part(seed=seed, singular=singular, n=n, kind=kind) for part in parts)
    found = {name: path for block in made for name, path in block.paths.items()}
    return BlockDiagonal(n, kind, {name: found[name] for name in order or found}, made)


def only(make, *names):
    return partial(make, shapes={name: SHAPES[name] for name in names})


MAKERS: dict[str, Callable[..., Fisher]] = {
    "diagonal": diagonal,
    "dense": dense,
    "low rank": lowrank,
    "a block a parameter": partial(blocks, *(only(dense, name) for name in SHAPES)),
    "a block a module": partial(
        blocks,
        only(dense, "layer.weight", "layer.bias"),
        only(diagonal, "path.scale"),
        order=list(SHAPES),
    ),
    "Kronecker in blocks": partial(
        blocks,
        partial(kronecker, layer="transposed", prefix="1."),
        only(diagonal, "path.scale"),
        partial(kronecker, layer="no bias", prefix="0."),
        order=["0.w", "1.b", "path.scale", "1.w"],
    ),
    "eigen-Kronecker in blocks": partial(
        blocks,
        partial(eigenkronecker, layer="convolution", prefix="1."),
        only(lowrank, "path.scale"),
        order=["1.b", "path.scale", "1.w"],
    ),
    **{f"Kronecker {layer}": partial(kronecker, layer=layer) for layer in ALL_LAYERS},
    **{f"eigen-Kronecker {layer}": partial(eigenkronecker, layer=layer) for layer in ALL_LAYERS},
}
HAVE_SUMS = {name: make for name, make in MAKERS.items() if not name.startswith("Kronecker")}

every = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
every_with_sums = pytest.mark.parametrize("make", HAVE_SUMS.values(), ids=HAVE_SUMS)
either = pytest.mark.parametrize("singular", [False, True], ids=["regular", "singular"])


def vector(F, seed=1, requires_grad=False):
    return {
        name: randn(*shape, seed=seed + k).requires_grad_(requires_grad)
        for k, (name, shape) in enumerate(F.shapes.items())
    }


def flat(F, v):
    return torch.cat([v[name].reshape(-1) for name in F.shapes])


def identity(F):
    return torch.eye(count(F.shapes), dtype=DOUBLE)


def rank(F):
    return int(torch.linalg.matrix_rank(F.to_dense(), hermitian=True))


def close(found, expected, rtol=1e-10):
    assert torch.allclose(found, expected, rtol=rtol, atol=1e-12)


# Each question against the whole matrix


@every
def test_shapes_and_diagonal_are_those_of_the_parameters(make):
    F = make()
    assert {name: d.shape for name, d in F.diagonal().items()} == F.shapes
    assert list(F.diagonal()) == list(F.shapes) == list(F.paths)
    close(flat(F, F.diagonal()), F.to_dense().diagonal())
    assert F.to_dense().shape == identity(F).shape


@pytest.mark.parametrize(
    "name", ["diagonal", "dense", "low rank", "a block a parameter", "a block a module"]
)
def test_the_order_of_the_parameters_is_that_of_the_model(name):
    assert list(MAKERS[name]().shapes.items()) == list(sizes(SHAPES).items())


@every
@either
def test_the_whole_matrix_is_symmetric_and_positive_semidefinite(make, singular):
    matrix = make(singular=singular).to_dense()
    close(matrix, matrix.mT)
    assert torch.linalg.eigvalsh(matrix).min() > -1e-12


@every
def test_product_with_a_vector(make):
    F = make()
    v = vector(F)
    product = F @ v
    close(flat(F, product), F.to_dense() @ flat(F, v))
    assert {name: t.shape for name, t in product.items()} == F.shapes


@every
def test_names_and_not_the_order_of_a_vector_count(make):
    F = make()
    v = vector(F)
    backwards = dict(reversed(v.items()))
    assert same(flat(F, F @ backwards), flat(F, F @ v))
    assert torch.equal(F.quadratic(backwards), F.quadratic(v))
    assert same(flat(F, F.solve(backwards, 0.1)), flat(F, F.solve(v, 0.1)))


@every
@either
def test_a_flat_vector_is_one_in_the_order_of_the_shapes(make, singular):
    F = make(singular=singular)
    v = vector(F)
    row = flat(F, v)
    for found, expected in [(F @ row, F @ v), (F.solve(row, 0.3), F.solve(v, 0.3))]:
        assert found.shape == row.shape
        assert torch.equal(found, flat(F, expected))
    close(F @ row, F.to_dense() @ row)
    row.requires_grad_()
    assert torch.equal(F.quadratic(row), F.quadratic(v))
    (gradient,) = torch.autograd.grad(F.quadratic(row), row)
    close(gradient, 2 * F.to_dense() @ row)


@every
@either
def test_quadratic_form_and_its_gradient(make, singular):
    F = make(singular=singular)
    v = vector(F, requires_grad=True)
    value = F.quadratic(v)
    close(value, flat(F, v) @ F.to_dense() @ flat(F, v))
    value.backward()
    gradient = flat(F, {name: t.grad for name, t in v.items()})
    close(gradient, 2 * F.to_dense() @ flat(F, v).detach())


@every
@either
def test_a_damped_solution(make, singular):
    F = make(singular=singular)
    v = vector(F)
    expected = torch.linalg.solve(F.to_dense() + 0.3 * identity(F), flat(F, v))
    close(flat(F, F.solve(v, damping=0.3)), expected)


@every
@either
def test_a_solution_without_damping_is_the_pseudo_inverse(make, singular):
    F = make(singular=singular)
    v = vector(F)
    assert (rank(F) < count(F.shapes)) == singular
    pseudo_inverse = torch.linalg.pinv(F.to_dense(), hermitian=True)
    close(flat(F, F.solve(v)), pseudo_inverse @ flat(F, v), rtol=1e-9)


def test_eigenvalues_of_the_size_of_a_rounding_error_are_zeros():
    tiny = 5 * torch.finfo(DOUBLE).eps
    F, E = lowrank(singular=True), eigenkronecker()
    values, moments = F.eigenvalues.clone(), E.second_moments.clone()
    values[1], moments[1, 2] = tiny * values.max(), tiny * moments.max()
    for G in (replace(F, eigenvalues=values), replace(E, second_moments=moments)):
        pseudo_inverse = torch.linalg.pinv(G.to_dense(), hermitian=True)
        v = vector(G)
        close(flat(G, G.solve(v)), pseudo_inverse @ flat(G, v), rtol=1e-9)
        assert G.logdet() == -torch.inf


@every
@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_a_solution_is_differentiable_also_where_there_is_no_information(make, damping):
    F = make(singular=True)
    v, w = vector(F, 1, requires_grad=True), vector(F, 5)
    (flat(F, F.solve(v, damping)) @ flat(F, w)).backward()
    gradient = flat(F, {name: t.grad for name, t in v.items()})
    close(gradient, flat(F, F.solve(w, damping)))


@every
def test_trace(make):
    close(make().trace(), make().to_dense().trace())


@every
@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_log_determinant(make, damping):
    F = make()
    expected = torch.linalg.slogdet(F.to_dense() + damping * identity(F)).logabsdet
    close(F.logdet(damping), expected)


@every
@pytest.mark.parametrize("seed", range(5))
def test_the_log_determinant_of_a_singular_matrix_is_minus_infinity(make, seed):
    F = make(seed=seed, singular=True)
    assert F.logdet() == -torch.inf
    expected = torch.linalg.slogdet(F.to_dense() + 0.3 * identity(F)).logabsdet
    close(F.logdet(damping=0.3), expected)


@every
def test_no_information_at_all(make):
    F = 0 * make()
    v = vector(F)
    assert F.trace() == 0
    assert not flat(F, F.solve(v)).any()
    close(flat(F, F.solve(v, damping=2.0)), flat(F, v) / 2)
    assert F.logdet() == -torch.inf
    assert [row.share for row in F.report()] == [0] * len(F.shapes)


def test_a_low_rank_of_zero_is_no_information():
    F = 0 * lowrank() + 0 * lowrank()
    assert F.directions.shape == (10, 0)
    v = vector(F)
    assert not flat(F, F.solve(v)).any()
    close(flat(F, F.solve(v, damping=2.0)), flat(F, v) / 2)
    close(F.logdet(damping=2.0), torch.tensor(10 * math.log(2), dtype=DOUBLE))
    assert same((F + lowrank()).to_dense().shape, (10, 10))
    close((F + lowrank()).to_dense(), lowrank().to_dense())


@every
def test_the_report_names_path_and_what_is_kept_and_share(make):
    F = make()
    report = F.report()
    assert {row.parameter: row.path for row in report} == F.paths
    assert {row.parameter: row.keeps for row in report} == F.keeps
    for row in report:
        assert row.share == pytest.approx(float(F.diagonal()[row.parameter].sum() / F.trace()))
    assert sum(row.share for row in report) == pytest.approx(1)


KEPT = {
    "diagonal": ["diagonal"] * 3,
    "dense": ["dense"] * 3,
    "low rank": ["lowrank"] * 3,
    "a block a parameter": ["block"] * 3,
    "a block a module": ["block", "diagonal", "block"],
    "Kronecker in blocks": ["kronecker", "kronecker", "diagonal", "kronecker"],
    "eigen-Kronecker in blocks": ["eigenkronecker", "lowrank", "eigenkronecker"],
    "Kronecker grouped": ["kronecker"] * 2,
    "eigen-Kronecker depthwise": ["eigenkronecker"],
}


@pytest.mark.parametrize(("name", "expected"), KEPT.items(), ids=KEPT)
def test_what_is_kept_of_each_parameter_is_told_in_the_order_of_the_parameters(name, expected):
    F = MAKERS[name]()
    assert F.keeps == dict(zip(F.shapes, expected, strict=True))


@every
def test_conversion(make):
    F = make()
    F.solve(vector(F))
    single = F.to("cpu", torch.float32)
    assert single.to_dense().dtype == torch.float32
    assert all(d.dtype == torch.float32 for d in single.diagonal().values())
    assert all(t.dtype == torch.float32 for t in (single @ as_single(vector(F))).values())
    assert all(t.dtype == torch.float32 for t in single.solve(as_single(vector(F))).values())
    assert torch.allclose(single.to_dense().double(), F.to_dense(), rtol=1e-5, atol=1e-5)
    assert (single.n_samples, single.kind, single.paths) == (F.n_samples, F.kind, F.paths)
    assert F.to(device="meta").trace().device.type == "meta"


@every
def test_precision_and_device_are_those_of_the_numbers(make):
    F = make()
    assert (F.dtype, F.device) == (DOUBLE, torch.device("cpu"))
    assert (F.to(dtype=torch.float32).dtype, F.to("meta").device.type) == (torch.float32, "meta")


def test_the_precision_of_parameters_that_differ_is_the_widest():
    values = {"a": torch.ones(1, dtype=torch.float32), "b": torch.ones(1, dtype=DOUBLE)}
    F = Diagonal(1, "exact", dict.fromkeys(values, "rule"), values)
    assert F.dtype == F.to_dense().dtype == DOUBLE


@every
def test_it_is_shown_in_one_line_without_a_number_of_its_own(make):
    shown = repr(make())
    expected = f"(kind='exact', n_samples=20, parameters={count(make().shapes)}, "
    assert expected + "dtype=torch.float64, device='cpu')" in shown
    assert shown.startswith(type(make()).__name__)
    assert "\n" not in shown


def test_blocks_are_counted_by_their_form():
    shown = repr(MAKERS["Kronecker in blocks"]())
    assert shown.startswith("BlockDiagonal[2 Kronecker, 1 Diagonal](kind='exact'")


def as_single(v):
    return {name: t.float() for name, t in v.items()}


# Eigenvectors are found once


@pytest.mark.parametrize(
    ("make", "expected"),
    [(diagonal, 0), (dense, 1), (lowrank, 0), (kronecker, 2), (eigenkronecker, 0)],
)
def test_eigenvectors_are_found_once_and_only_when_they_are_needed(make, expected, monkeypatch):
    F, calls, eigh = make(), [], torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda m: calls.append(m) or eigh(m))
    F @ vector(F), F.quadratic(vector(F)), F.diagonal(), F.to_dense(), F.state_dict()
    assert not calls
    for seed in range(3):
        F.solve(vector(F, seed), damping=seed)
        F.logdet(damping=seed)
    assert len(calls) == expected


@every
def test_eigenvectors_of_one_are_not_taken_for_those_of_another(make):
    F = make()
    v = vector(F)
    before = F.solve(v)
    for other in (3 * F, F.pool(make(seed=1)), F.to(dtype=DOUBLE) * 0.5):
        matrix = torch.linalg.pinv(other.to_dense(), hermitian=True)
        close(flat(F, other.solve(v)), matrix @ flat(F, v), rtol=1e-9)
    assert same(F.solve(v), before)


# The Kronecker structures against gradients


def layer_with_gradient(layer):
    """A layer with one observation at one position: the gradient and the two factors of it."""
    F = kronecker(layer=layer)
    transposed = F.transposed
    p = vector(F, requires_grad=True)
    w, bias = p["w"], p.get("b")
    if layer == "convolution":
        x = randn(1, *w.shape[1:], seed=7)
        output = nn.functional.conv2d(x, w, bias).flatten()
    elif layer == "transposed convolution":
        x = randn(2, 1, seed=7)
        output = nn.functional.conv_transpose1d(x, w).flatten()
    else:
        x = randn(len(w) if transposed else w.shape[1], seed=7)
        output = x @ (w if transposed else w.mT) + (0 if bias is None else bias)
    g = randn(len(output), seed=8)
    output.backward(g)
    a = x.flatten() if bias is None else torch.cat([x.flatten(), torch.ones(1, dtype=DOUBLE)])
    return F, flat(F, {name: t.grad for name, t in p.items()}), g, a


@pytest.mark.parametrize("layer", LAYERS)
def test_factors_of_one_observation_give_the_outer_product_of_its_gradient(layer):
    F, gradient, g, a = layer_with_gradient(layer)
    F = replace(F, output_factor=g.outer(g), input_factor=a.outer(a))
    close(F.to_dense(), gradient.outer(gradient))


@pytest.mark.parametrize("layer", LAYERS)
def test_second_moments_keep_the_diagonal_in_the_basis_of_the_eigenvectors(layer):
    """What makes it the closest matrix with these eigenvectors."""
    F, gradient, g, a = layer_with_gradient(layer)
    outputs, inputs = F.bases
    moments = (outputs.mT @ g.outer(a) @ inputs).square()
    E = EigenKronecker(1, "exact", F.paths, moments, outputs, inputs, F.shapes, F.transposed)
    _, eigenvectors = torch.linalg.eigh(F.to_dense())  # of distinct eigenvalues: unique
    exact = eigenvectors.mT @ gradient.outer(gradient) @ eigenvectors
    close(eigenvectors.mT @ E.to_dense() @ eigenvectors, exact.diagonal().diag(), rtol=1e-9)
    close(E.trace(), gradient.square().sum())


def test_eigenvalues_of_kronecker_factors_as_second_moments_change_nothing():
    F = kronecker()
    (B, U), (A, V) = torch.linalg.eigh(F.output_factor), torch.linalg.eigh(F.input_factor)
    E = EigenKronecker(20, "exact", F.paths, B.outer(A), U, V, F.shapes)
    close(E.to_dense(), F.to_dense())


@pytest.mark.parametrize("make", [kronecker, eigenkronecker])
@pytest.mark.parametrize("layer", IN_GROUPS)
def test_a_layer_in_groups_is_one_layer_for_each_group(layer, make):
    F = make(layer=layer)
    shapes, _, groups = IN_GROUPS[layer]
    own = sizes({name: (shape[0] // groups, *shape[1:]) for name, shape in shapes.items()})
    places = torch.arange(count(shapes)).split([math.prod(shape) for shape in shapes.values()])
    rest = F.to_dense().clone()
    for group in range(groups):
        tensors = {name: getattr(F, name)[group] for name in F._TENSORS}
        G = replace(F, parameter_shapes=own, **tensors)
        at = torch.cat([place.chunk(groups)[group] for place in places])
        close(rest[at[:, None], at], G.to_dense())
        rest[at[:, None], at] = 0
    assert not rest.any()


@pytest.mark.parametrize("make", [kronecker, eigenkronecker])
def test_a_group_with_little_information_is_not_taken_for_a_rounding_error(make):
    F = make(layer="grouped")
    name = F._TENSORS[0]
    faint = getattr(F, name) * torch.tensor([1, 1e-20], dtype=DOUBLE)[:, None, None]
    G, v = replace(F, **{name: faint}), vector(F)
    solution, expected = G.solve(v), F.solve(v)
    assert torch.isfinite(G.logdet())
    close(solution["w"][:2], expected["w"][:2])
    close(solution["w"][2:] / 1e20, expected["w"][2:])


@pytest.mark.parametrize("make", [kronecker, eigenkronecker])
def test_the_memory_layout_of_the_factors_does_not_matter(make):
    F = make()
    side = {field for field in ("output_factor", "output_basis") if hasattr(F, field)}.pop()
    G = replace(F, **{side: getattr(F, side).mT.contiguous().mT})
    assert not getattr(G, side).is_contiguous()
    close(G.to_dense(), F.to_dense())
    close(flat(F, G.solve(vector(F), 0.1)), flat(F, F.solve(vector(F), 0.1)))


@pytest.mark.parametrize("make", [kronecker, eigenkronecker])
def test_sizes_that_do_not_belong_to_the_parameters_are_refused(make):
    F = make()
    with pytest.raises(ValueError, match=r"factors of 'w' are of \(2, 4\) instead of \(2, 3\)"):
        replace(F, parameter_shapes=sizes({"w": (2, 3)}))
    with pytest.raises(ValueError, match=r"'w' are of \(2, 4\) instead of \(3, 3\)"):
        replace(F, parameter_shapes=sizes({"w": (2, 3), "b": (3,)}), transposed=True)
    for others in ({"b": (3,)}, {"b": (2,), "c": (2,)}):
        with pytest.raises(ValueError, match=r"one bias of shape \(2,\) at most, got {'b'"):
            replace(F, parameter_shapes=sizes({"w": (2, 3), **others}))
    F = make(layer="grouped")
    with pytest.raises(ValueError, match=r"'w' are of \(2, 2, 5\) instead of \(2, 2, 3\)"):
        replace(F, parameter_shapes=sizes({"w": (4, 2, 1), "b": (4,)}))
    with pytest.raises(ValueError, match=r"one bias of shape \(4,\) at most, got {'b'"):
        replace(F, parameter_shapes=sizes({"w": (4, 2, 2), "b": (2,)}))
    with pytest.raises(ValueError, match="factors of 'w' are of different numbers of groups"):
        replace(F, **{F._TENSORS[-1]: getattr(F, F._TENSORS[-1])[0]})


# Sums, multiples and pools


@every
def test_multiples(make):
    F = make()
    for multiple in (2 * F, F * 2):
        close(multiple.to_dense(), 2 * F.to_dense())
        assert (multiple.n_samples, multiple.kind, multiple.paths) == (20, "exact", F.paths)


@every_with_sums
@either
def test_sums(make, singular):
    F, G = make(seed=0, n=20, singular=singular), make(seed=1, n=5, singular=singular)
    close((F + G).to_dense(), F.to_dense() + G.to_dense())
    assert (F + G).n_samples == 25
    assert type(F + G) is type(F)


@every
def test_quotients(make):
    F = make()
    close((F / 4).to_dense(), F.to_dense() / 4)
    assert ((F / 4).n_samples, (F / 4).paths) == (20, F.paths)
    with pytest.raises(ZeroDivisionError):
        F / 0


@every
@pytest.mark.parametrize("two", [2, np.float32(2), np.float64(2), torch.tensor(2.0)])
def test_a_number_may_come_from_any_library(make, two):
    F = make()
    for found in (two * F, F * two, F / (1 / two)):
        close(found.to_dense(), 2 * F.to_dense())


@every_with_sums
@either
def test_differences(make, singular):
    F, G = make(seed=0, n=20, singular=singular), make(seed=1, n=5, singular=singular)
    D = F - G
    assert (type(D), D.n_samples) == (type(F), 25)
    matrix = F.to_dense() - G.to_dense()
    close(D.to_dense(), matrix)
    v = vector(F)
    close(flat(F, D @ v), matrix @ flat(F, v))
    close(D.quadratic(v), flat(F, v) @ matrix @ flat(F, v))
    close((F + G - G).to_dense(), F.to_dense())
    close((F - F).to_dense(), torch.zeros_like(matrix))
    assert not flat(F, (F - F).solve(v)).any()


@every_with_sums
def test_an_indefinite_difference_is_solved_with_its_negative_eigenvalues(make):
    D = make(seed=0) - 2 * make(seed=1)
    eigenvalues = torch.linalg.eigvalsh(D.to_dense())
    assert eigenvalues[0] < 0 < eigenvalues[-1]
    v = vector(D)
    close(D.to_dense() @ flat(D, D.solve(v)), flat(D, v), 1e-8)
    assert D.logdet().isnan()


@every_with_sums
def test_a_pool_is_the_mean_over_all_observations(make):
    F, G = make(seed=0, n=20), make(seed=1, n=5)
    close(F.pool(G).to_dense(), (20 * F.to_dense() + 5 * G.to_dense()) / 25)
    assert type(F.pool(G)) is type(F)


@pytest.mark.parametrize("layer", ALL_LAYERS)
def test_a_pool_of_kronecker_products_averages_each_factor(layer):
    F, G = kronecker(0, n=20, layer=layer), kronecker(5, n=5, layer=layer)
    pooled = F.pool(G)
    close(pooled.output_factor, (20 * F.output_factor + 5 * G.output_factor) / 25)
    close(pooled.input_factor, (20 * F.input_factor + 5 * G.input_factor) / 25)


def test_blocks_are_pooled_one_by_one():
    make = MAKERS["Kronecker in blocks"]
    F, G = make(seed=0, n=20), make(seed=1, n=5)
    for found, ours, theirs in zip(F.pool(G).blocks, F.blocks, G.blocks, strict=True):
        close(found.to_dense(), ours.pool(theirs).to_dense())


@every
def test_pools_may_be_taken_in_any_order(make):
    parts = [make(seed=seed, n=n) for seed, n in enumerate([20, 5, 1])]
    F, G, H = parts
    assert F.pool(G).pool(H).n_samples == 26
    expected = reduce(lambda one, other: one.pool(other), parts).to_dense()
    close(F.pool(G.pool(H)).to_dense(), expected)
    close(H.pool(F).pool(G).to_dense(), expected)


@pytest.mark.parametrize(
    "structure",
    ["diagonal", "block", "module", "dense", "kronecker", "kronecker-reduce", "lowrank"],
)
def test_a_pool_of_two_parts_is_one_run_over_all_data(structure):
    model = nn.Linear(3, 4).double()
    x, y = randn(11, 3, seed=0), torch.arange(11) % 4
    first, second, whole = (
        fisher_information(model, (x[rows], y[rows]), structure=structure)
        for rows in (slice(0, 8), slice(8, 11), slice(0, 11))
    )
    pooled = Fisher.from_state_dict(first.state_dict()).pool(second)
    close(pooled.to_dense(), whole.to_dense())
    assert (pooled.n_samples, pooled.paths) == (11, whole.paths)


def test_the_rank_of_a_sum_is_no_larger_than_it_must_be():
    F, G = lowrank(0, singular=True), lowrank(1, singular=True)
    assert [len(H.eigenvalues) for H in (F, F + G, F + G + F, F.pool(F))] == [3, 6, 6, 3]
    assert len((lowrank(0) + lowrank(1)).eigenvalues) == 10
    close((F + G).directions.mT @ (F + G).directions, torch.eye(6, dtype=DOUBLE))


@pytest.mark.parametrize(
    ("one", "other", "both"),
    [
        ("unused", "rule", "rule"),
        ("generic", "rule", "generic"),
        ("generic", "loop", "loop"),
        ("unused", "unused", "unused"),
    ],
)
@every_with_sums
def test_what_is_computed_in_two_ways_is_told_by_the_slower(make, one, other, both):
    F, G = (replace(make(), paths=dict.fromkeys(make().paths, path)) for path in (one, other))
    for H in (F + G, G + F, F.pool(G), G.pool(F)):
        assert set(H.paths.values()) == {both}


@every
def test_only_the_paths_of_its_own_parameters_count(make):
    F = make()
    G = replace(F, paths=F.paths | {"elsewhere": "loop"}) if type(F) is not BlockDiagonal else F
    assert "path.elsewhere" not in G.state_dict()
    assert G.pool(F).paths == F.pool(G).paths == F.paths


@every
def test_arithmetic_leaves_its_operands_alone(make):
    F, G = make(seed=0), make(seed=1)
    v = vector(F)
    before = F.to_dense().clone(), G.to_dense().clone(), flat(F, v).clone()
    F.pool(G), 2 * F, F @ v, F.solve(v), F.quadratic(v), F.logdet(), F.to(dtype=torch.float32)
    if make in HAVE_SUMS.values():
        F + G
    assert same((F.to_dense(), G.to_dense(), flat(F, v)), before)


examples = given(
    seed=st.integers(0, 999),
    singular=st.booleans(),
    damping=st.floats(0.1, 1e3),
    factor=st.floats(1e-3, 1e3),
)


@every
@examples
@PROPERTY
def test_a_solution_solves_and_a_determinant_scales(make, seed, singular, damping, factor):
    F = make(seed=seed, singular=singular)
    v = vector(F, seed)
    x = F.solve(v, damping)
    close(flat(F, F @ x) + damping * flat(F, x), flat(F, v), rtol=1e-9)
    close(flat(F, F.solve(F @ (F.solve(v)))), flat(F, F.solve(v)), rtol=1e-6)
    grown = (factor * F).logdet(factor * damping)
    close(grown, F.logdet(damping) + count(F.shapes) * math.log(factor))


@every
@examples
@PROPERTY
def test_sums_traces_and_pools_belong_together(make, seed, singular, damping, factor):
    F = make(seed=seed, singular=singular)
    close(F.trace(), torch.stack([d.sum() for d in F.diagonal().values()]).sum())
    close((factor * F).trace(), factor * F.trace())
    close(F.pool(F).to_dense(), F.to_dense())
    close(F.pool(F).logdet(damping), F.logdet(damping))
    if make in HAVE_SUMS.values():
        close((F + F).to_dense(), (2 * F).to_dense())
        close((F + factor * F).trace(), (1 + factor) * F.trace())


# State


def check_restored(G, F):
    assert type(G) is type(F)
    assert torch.equal(G.to_dense(), F.to_dense())
    assert G.to_dense().dtype == F.to_dense().dtype
    assert (G.shapes, G.paths, G.kind, G.n_samples) == (F.shapes, F.paths, F.kind, F.n_samples)
    assert list(G.shapes) == list(F.shapes)
    v = {name: t.to(F.to_dense()) for name, t in vector(F).items()}
    assert same(G.solve(v, 0.1), F.solve(v, 0.1))


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_state_dict_holds_everything(make, dtype):
    F = make(kind="empirical").to(dtype=dtype)
    state = F.state_dict()
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    check_restored(Fisher.from_state_dict(state), F)


@every
def test_a_state_dict_goes_through_safetensors(make, tmp_path):
    F = make()
    save_file(F.state_dict(), tmp_path / "fisher.safetensors")
    state = load_file(tmp_path / "fisher.safetensors")
    assert list(state) != list(F.state_dict())  # the format does not keep the order
    check_restored(Fisher.from_state_dict(state), F)


@every
def test_a_state_dict_goes_through_a_file(make, tmp_path):
    F = make()
    torch.save(F.state_dict(), tmp_path / "fisher.pt")
    check_restored(Fisher.from_state_dict(torch.load(tmp_path / "fisher.pt")), F)


@pytest.mark.parametrize("structure", ["diagonal", "dense"])
def test_a_state_dict_of_a_network_goes_through_a_file(structure, tmp_path):
    F = estimate(SCENARIOS["tied_weights"](), structure=structure)
    torch.save(F.state_dict(), tmp_path / "fisher.pt")
    check_restored(Fisher.from_state_dict(torch.load(tmp_path / "fisher.pt")), F)


@every
def test_a_state_dict_shares_no_memory(make):
    F = make()
    before = F.to_dense().clone()
    state = F.state_dict()
    restored = Fisher.from_state_dict(state)
    for tensor in state.values():
        if tensor.is_floating_point():
            tensor.zero_()
    assert torch.equal(F.to_dense(), before)
    assert torch.equal(restored.to_dense(), before)


@pytest.mark.parametrize(
    ("F", "own"),
    [
        (diagonal(), {f"diagonal.{name}": d for name, d in diagonal().diagonal().items()}),
        (
            dense(),
            {f"shape.{name}": torch.tensor(shape) for name, shape in SHAPES.items()}
            | {"matrix": dense().matrix},
        ),
    ],
    ids=["diagonal", "dense"],
)
def test_the_format_of_a_state_does_not_change(F, own):
    state = {
        "structure": encode(type(F).__name__),
        "kind": encode("exact"),
        "n_samples": torch.tensor(20),
        "parameters": encode("\n".join(SHAPES)),
        **{f"path.{name}": encode(path) for name, path in paths(SHAPES).items()},
        **own,
    }
    assert same(F.state_dict(), state)
    check_restored(Fisher.from_state_dict(state), F)


def without(F, key):
    state = F.state_dict()
    del state[key]
    return state


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, r"has no \['kind', 'n_samples', 'parameters', 'structure'\]"),
        (nn.Linear(2, 2).state_dict(), r"not the state of a Fisher: it has no \['kind'"),
        (without(diagonal(), "kind"), r"has no \['kind'\]"),
        (without(dense(), "shape.path.scale"), "has no 'shape.path.scale'"),
        (without(kronecker(), "transposed"), "has no 'transposed'"),
        (without(eigenkronecker(), "input_basis"), "has no 'input_basis'"),
        (without(lowrank(), "eigenvalues"), "has no 'eigenvalues'"),
        (without(MAKERS["a block a module"](), "block.0.matrix"), "has no 'matrix'"),
        (
            {
                key: t
                for key, t in MAKERS["a block a module"]().state_dict().items()
                if not key.startswith("block.1.")
            },
            r"\['layer.weight', 'path.scale', 'layer.bias'\] must be in one block, got",
        ),
        (
            diagonal().state_dict() | {"structure": torch.tensor([66], dtype=torch.uint8)},
            "unknown structure 'B'",
        ),
    ],
)
def test_a_foreign_state_dict_is_refused(state, message):
    with pytest.raises(ValueError, match=message):
        Fisher.from_state_dict(state)


# What is refused

WRONG = {
    "missing": (lambda v, name: v.pop(name), "{0!r} is missing"),
    "unexpected": (lambda v, name: v.update(head=torch.ones(1)), "'head' is not expected"),
    "shape": (
        lambda v, name: v.update({name: torch.ones(9, 9)}),
        r"{0!r} is given in shape \(9, 9\) instead of \({1}\)",
    ),
}


@every
@pytest.mark.parametrize("method", ["__matmul__", "quadratic", "solve"])
@pytest.mark.parametrize(("spoil", "message"), WRONG.values(), ids=WRONG)
def test_a_vector_that_does_not_match_is_named(make, method, spoil, message):
    F = make()
    v = vector(F)
    name, shape = next(iter(F.shapes.items()))
    spoil(v, name)
    message = message.format(name, str(tuple(shape))[1:-1])
    with pytest.raises(ValueError, match=f"parameters do not match: {message}"):
        getattr(F, method)(v)


def test_every_mismatch_is_listed():
    expected = {"a": torch.Size([2]), "b": torch.Size([3]), "c": torch.Size([])}
    given = {"a": torch.Size([2]), "b": torch.Size([3, 1]), "d": torch.Size([])}
    message = (
        r"'c' is missing; 'd' is not expected; 'b' is given in shape \(3, 1\) instead of \(3,\)"
    )
    with pytest.raises(ValueError, match=message):
        check_shapes(expected, given)
    check_shapes(expected, dict(reversed(expected.items())))


@every
@pytest.mark.parametrize("damping", [-1e-9, math.nan])
def test_a_negative_damping_is_refused(make, damping):
    F = make()
    for use in (lambda: F.solve(vector(F), damping), lambda: F.logdet(damping)):
        with pytest.raises(ValueError, match=f"damping must not be negative, got {damping}"):
            use()


def add(F, G):
    return F + G


def subtract(F, G):
    return F - G


def pool(F, G):
    return F.pool(G)


both = pytest.mark.parametrize("combine", [add, subtract, pool])


@both
@every
def test_only_like_can_be_combined_with_like(make, combine):
    F, other = make(), dense() if type(make()) is not Dense else diagonal()
    message = f"cannot add a {type(other).__name__} to a {type(F).__name__}"
    with pytest.raises(TypeError, match=message):
        combine(F, other)
    with pytest.raises(TypeError):
        combine(F, 1)
    with pytest.raises(ValueError, match="kind 'sketch' to one of 'exact'"):
        combine(F, make(kind="sketch"))


@both
@pytest.mark.parametrize("make", [diagonal, dense, lowrank])
def test_only_the_same_parameters_can_be_combined(make, combine):
    message = "'layer.weight' is missing; 'other' is not expected; .* more"
    with pytest.raises(ValueError, match=message):
        combine(make(), make(shapes={"other": (2,)}))


@both
@pytest.mark.parametrize("make", [dense, lowrank])
def test_matrices_over_parameters_in_another_order_cannot_be_combined(make, combine):
    F = make()
    backwards = replace(F, parameter_shapes=dict(reversed(F.shapes.items())))
    with pytest.raises(ValueError, match="in another order"):
        combine(F, backwards)


@both
@pytest.mark.parametrize("make", [kronecker, eigenkronecker])
def test_a_transposed_weight_cannot_be_combined_with_one_that_is_not(make, combine):
    F = make(layer="square")
    with pytest.raises(ValueError, match="one is transposed and one is not"):
        combine(F, replace(F, transposed=True))


@both
@pytest.mark.parametrize("make", [kronecker, eigenkronecker])
def test_weights_with_other_groups_cannot_be_combined(make, combine):
    F, shapes = make(layer="no bias"), sizes({"w": (3, 2)})
    tensors = {
        name: randn(3, *getattr(make(layer="depthwise"), name).shape[1:], seed=0)
        for name in F._TENSORS
    }
    G = replace(F, parameter_shapes=shapes, **tensors)
    assert F.shapes == G.shapes
    with pytest.raises(ValueError, match="different numbers of groups"):
        combine(F, G)


@both
@pytest.mark.parametrize("field", ["output_basis", "input_basis"])
def test_moments_in_different_eigenvectors_cannot_be_combined(field, combine):
    F = eigenkronecker()
    other = replace(F, **{field: -getattr(F, field)})
    with pytest.raises(ValueError, match="second moments of 'w' in different eigenvectors"):
        combine(F, other)


@both
def test_parameters_in_other_blocks_cannot_be_combined(combine):
    F, G = MAKERS["a block a parameter"](), MAKERS["a block a module"]()
    message = (
        r"blocks of \[\['layer.weight', 'layer.bias'\], \['path.scale'\]\] "
        r"to blocks of \[\['layer.weight'\], \['path.scale'\], \['layer.bias'\]\]"
    )
    with pytest.raises(ValueError, match=message):
        combine(F, G)


@pytest.mark.parametrize("name", sorted(MAKERS.keys() - HAVE_SUMS.keys()))
def test_the_sum_of_kronecker_products_is_refused_and_points_to_the_pool(name):
    F = MAKERS[name]()
    for combine in (add, subtract):
        with pytest.raises(TypeError, match=r"is not a Kronecker product; .* use F.pool\(G\)"):
            combine(F, MAKERS[name](seed=1))


@pytest.mark.parametrize("name", [name for name in MAKERS if "diagonal" not in name])
def test_a_vector_of_another_precision_is_refused_where_it_would_be_rounded(name):
    F = MAKERS[name]().to(dtype=torch.float32)
    message = r"the vector is torch\.float64 and the matrix torch\.float32; convert one"
    for use in (F.__matmul__, F.quadratic, F.solve):
        for v in (vector(F), flat(F, vector(F))):
            with pytest.raises(ValueError, match=message):
                use(v)


@every
def test_what_is_no_number_does_not_scale(make):
    F = make()
    for wrong in (F, "2", torch.ones(2), None):
        with pytest.raises(TypeError):
            F * wrong
        with pytest.raises(TypeError):
            F / wrong


@every
def test_a_vector_in_another_form_is_refused_with_the_forms_that_there_are(make):
    F = make()
    size = count(F.shapes)
    for use in (F.__matmul__, F.quadratic, F.solve):
        for shape in [(size + 1,), (size, 1), ()]:
            message = rf"a flat vector must have shape \({size},\), got \({str(shape)[1:-1]}\)"
            with pytest.raises(ValueError, match=message):
                use(torch.ones(shape, dtype=DOUBLE))
        for wrong in (list(vector(F).values()), F, None):
            with pytest.raises(ValueError, match=f"one flat tensor; got {type(wrong).__name__}"):
                use(wrong)


@pytest.mark.parametrize(
    ("given_blocks", "message"),
    [
        ((only(dense, "layer.weight"),), r"got \['layer.weight'\]"),
        ((dense, only(diagonal, "path.scale")), r"got .*'layer.bias', 'path.scale'\]"),
        ((only(dense, "layer.weight"), partial(diagonal, shapes={"a": (), "b": ()})), "'a', 'b'"),
        ((partial(dense, kind="sketch"),), "kind 'sketch' instead of 20 and 'exact'"),
        ((partial(dense, n=7),), "is of 7 observations"),
    ],
)
def test_blocks_that_do_not_belong_together_are_refused(given_blocks, message):
    with pytest.raises(ValueError, match=message):
        BlockDiagonal(20, "exact", paths(SHAPES), tuple(make() for make in given_blocks))


# Other parameters


def larger(F, by=1):
    """The shapes of a model that has grown along every axis, but for a number."""
    return {name: torch.Size(n + by for n in shape) for name, shape in F.shapes.items()}


def in_larger(F, shapes):
    """The whole matrix with zeros for what is new, entry by entry."""
    places = {}
    for name, shape in shapes.items():
        for index in np.ndindex(*shape):
            places[name, index] = len(places)
    old = [places[n, i] for n, shape in F.shapes.items() for i in np.ndindex(*shape)]
    matrix = torch.zeros(len(places), len(places), dtype=DOUBLE)
    matrix[torch.tensor(old)[:, None], torch.tensor(old)] = F.to_dense()
    return matrix


UNGROUPED = {
    name: make
    for name, make in MAKERS.items()
    if not any(name.endswith(f"ronecker {layer}") for layer in IN_GROUPS)
}


@pytest.mark.parametrize("make", UNGROUPED.values(), ids=UNGROUPED)
@either
def test_what_has_grown_has_its_old_entries_first_and_zeros_behind_them(make, singular):
    F = make(singular=singular)
    shapes = larger(F)
    if any(len(name.split(".")[-1]) == 1 for name in shapes):  # a layer, whose bias is its outputs
        outputs = {n[:-1]: _outputs(F, n) + 1 for n in F.shapes if n.endswith("w")}
        shapes |= {n: torch.Size([outputs[n[:-1]]]) for n in F.shapes if n.endswith("b")}
    grown = F._embedded(shapes)
    assert grown.shapes == shapes
    close(grown.to_dense(), in_larger(F, shapes))
    v = vector(grown)
    close(flat(grown, grown @ v), in_larger(F, shapes) @ flat(grown, v))
    close(flat(grown, grown.solve(v, 0.3)), _damped(grown, 0.3) @ flat(grown, v))
    assert grown.paths == F.paths
    assert F._embedded(dict(F.shapes)).to_dense().equal(F.to_dense())


def _damped(F, damping):
    return torch.linalg.inv(F.to_dense() + damping * identity(F))


def _outputs(F, name):
    """The outputs of the layer of a weight."""
    layer = next((b for b in getattr(F, "blocks", [F]) if name in b.shapes), F)
    shape = layer.shapes[name]
    return shape[1] if getattr(layer, "transposed", False) else shape[0]


@pytest.mark.parametrize("layer", ["grouped", "transposed and grouped"])
@pytest.mark.parametrize("make", [kronecker, eigenkronecker])
def test_channels_in_groups_may_grow_inwards_but_not_in_their_number(make, layer):
    F = make(layer=layer)
    weight, *biases = F.shapes
    inwards = {weight: torch.Size([F.shapes[weight][0], *(n + 1 for n in F.shapes[weight][1:])])}
    if layer == "grouped":
        inwards |= {bias: F.shapes[bias] for bias in biases}
        close(F._embedded(inwards).to_dense(), in_larger(F, inwards))
    more = {weight: torch.Size([2 * F.shapes[weight][0], *F.shapes[weight][1:]])}
    with pytest.raises(NotKept, match=r"'w' has grown from \(4, .* groups|pairs of factors"):
        F._embedded(more)


SCALES = (0.5, 2.0, 3.0)


@every
@pytest.mark.parametrize("which", [slice(1), slice(1, None), slice(None)], ids=str)
def test_a_part_is_the_block_of_its_parameters_times_their_scales(make, which):
    F = make()
    names = list(F.shapes)[which]
    if not names:
        pytest.skip("one parameter only")
    for numbers in (SCALES, [1.0] * 3, [2.0] * 3):
        scales = dict(zip(names, numbers, strict=False)) | dict.fromkeys(names[3:], 2.0)
        v = {n: torch.full(s, scales.get(n, 0.0), dtype=DOUBLE) for n, s in F.shapes.items()}
        whole = flat(F, v)[:, None] * F.to_dense() * flat(F, v)
        own = flat(F, v) != 0
        if _parts_eigenvectors(F, scales):
            with pytest.raises(NotKept, match="share their eigenvectors"):
                F._congruent(scales)
            continue
        part = F._congruent(scales)
        assert list(part.shapes) == [name for name in F.shapes if name in scales]
        close(part.to_dense(), whole[own][:, own])
        x = vector(part)
        close(flat(part, part.solve(x, 0.3)), _damped(part, 0.3) @ flat(part, x))
        if set(scales.values()) == {1.0}:
            close(F._within(names).to_dense(), whole[own][:, own])


def _parts_eigenvectors(F, scales):
    """Whether a weight and its bias, which have their eigenvectors together, are told apart."""
    layers = [b for b in getattr(F, "blocks", [F]) if isinstance(b, EigenKronecker)]
    numbers = [[scales.get(name) for name in layer.shapes] for layer in layers]
    return any(weight is not None and {weight, *biases} != {weight} for weight, *biases in numbers)


@every
def test_other_names_are_no_other_matrix(make):
    F = make()
    names = {name: f"new.{name}" for name in F.shapes}
    renamed = F._renamed(names)
    assert list(renamed.shapes) == list(names.values())
    assert renamed.paths == {names[name]: path for name, path in F.paths.items()}
    assert renamed.to_dense().equal(F.to_dense())
    v = vector(F)
    found = renamed @ {names[name]: x for name, x in v.items()}
    assert all(found[names[name]].equal(x) for name, x in (F @ v).items())


FREE = {
    "diagonal": diagonal,
    "dense": dense,
    "low rank": lowrank,
    "blocks": lambda seed, shapes: blocks(
        *(partial(dense, shapes={name: shape}) for name, shape in shapes.items()), seed=seed
    ),
    "one block": lambda seed, shapes: blocks(partial(dense, shapes=shapes), seed=seed),
    "blocks of two": lambda seed, shapes: blocks(
        partial(dense, shapes=dict(list(shapes.items())[:2])),
        *(partial(diagonal, shapes={n: s}) for n, s in list(shapes.items())[2:]),
        seed=seed,
    ),
}
SIDES = {
    "others": ({"a": (2,), "b": (2, 2)}, {"c": (3,), "d": ()}),
    "one in common": ({"a": (2,), "b": (2, 2)}, {"b": (2, 2), "c": (3,)}),
    "one more": ({"a": (2,), "c": (3,)}, {"a": (2,), "b": (2, 2), "c": (3,)}),
    "the same": ({"a": (2,), "b": (2, 2)}, {"a": (2,), "b": (2, 2)}),
}


@pytest.mark.parametrize(("ours", "theirs"), SIDES.values(), ids=SIDES)
@pytest.mark.parametrize("make", FREE.values(), ids=FREE)
def test_two_that_hold_different_parameters_have_a_sum(make, ours, theirs):
    F, G = make(seed=1, shapes=ours), make(seed=2, shapes=theirs)
    shapes = sizes({name: {**ours, **theirs}[name] for name in sorted({**ours, **theirs})})
    both = F._united(G, shapes)
    close(both.to_dense(), in_larger(F, shapes) + in_larger(G, shapes))
    assert list(both.shapes) == list(shapes)
    assert both.n_samples == F.n_samples + G.n_samples
    assert type(both) is type(F)
    known = {n for F in (F, G) for n in F.paths if F.paths[n] != "unused"}
    assert {name for name, path in both.paths.items() if path != "unused"} == known


def test_blocks_with_other_parameters_are_summed_in_several_groups():
    """Two groups of one side that share a group of the other become one block."""
    shapes = sizes({"a": (2,), "b": (3,), "c": (2,), "d": ()})
    F = blocks(*(partial(dense, shapes={name: shapes[name]}) for name in "acd"), seed=1)
    G = blocks(partial(dense, shapes={n: shapes[n] for n in "abc"}), seed=2)
    both = F._united(G, shapes)
    assert [sorted(block.shapes) for block in both.blocks] == [["d"], ["a", "b", "c"]]
    close(both.to_dense(), in_larger(F, shapes) + in_larger(G, shapes))


def test_diagonals_that_hold_different_parameters_each_keep_their_precision():
    F = Diagonal(1, "exact", {"a": "rule"}, {"a": torch.ones(2)})
    G = Diagonal(1, "exact", {"b": "rule"}, {"b": torch.ones(2, dtype=DOUBLE)})
    both = F._united(G, {"a": torch.Size([2]), "b": torch.Size([2])})
    assert {name: value.dtype for name, value in both.values.items()} == {
        "a": torch.float32,
        "b": DOUBLE,
    }


def test_two_of_different_kinds_or_forms_are_not_united():
    F = FREE["blocks"](seed=0, shapes={"a": (2,)})
    G = blocks(partial(dense, shapes={"b": (2,)}), kind="sampled")
    with pytest.raises(ValueError, match="kind 'sampled'"):
        F._united(G, sizes({"a": (2,), "b": (2,)}))
    with pytest.raises(TypeError, match="Diagonal"):
        F._united(diagonal(shapes={"b": (2,)}), sizes({"a": (2,), "b": (2,)}))
