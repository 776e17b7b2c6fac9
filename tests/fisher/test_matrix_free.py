import weakref

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator, cg
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset

from ewc_lib import fisher_information
from ewc_lib._parameters import ravel, unravel
from ewc_lib.fisher import MatrixFree
from ewc_lib.likelihood.outputs import Categorical, Gaussian
from tests.scenarios import (
    BATCH_SIZES,
    CLASSES,
    SCENARIOS,
    N,
    cut,
    estimate,
    oracle,
    relative_error,
    same,
    slow_path_allowed,
    trace_of,
)
from tests.zoo import ZOO, zoo_truth

KINDS = ["exact", "sketch", "sampled", "empirical"]
each_kind = pytest.mark.parametrize("kind", KINDS)


def close(found, expected, tolerance=1e-10):
    assert relative_error(found, expected) < tolerance


def matrix_free(case, size=N, **options):
    return MatrixFree(case.model, cut(case.x, case.y, size), case.likelihood, **options)


def vector(F, seed=0):
    """Draw a vector."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in F.shapes.items()
    }


def product(F, v):
    """Multiply, and write the result in one row."""
    with slow_path_allowed():
        found = F @ v
    assert {name: t.shape for name, t in found.items()} == F.shapes
    return ravel(found)[0]


def dot(v, w):
    return sum((v[name] * w[name]).sum() for name in v)


# The same as with the matrix

each_scenario = pytest.mark.parametrize("name", [s for s in SCENARIOS if s != "embedding_bag"])


@pytest.mark.parametrize("kind", ["exact", "empirical"])
@each_scenario
def test_the_product_is_that_with_the_definition(name, kind):
    F = matrix_free(SCENARIOS[name](), 3, kind=kind)
    v = vector(F)
    close(product(F, v), oracle(name, kind) @ ravel(v)[0])


@pytest.mark.parametrize("kind", ["sketch", "sampled"])
@each_scenario
def test_the_product_of_a_random_kind_is_that_with_the_matrix_of_the_same_draws(name, kind):
    case = SCENARIOS[name]()
    dense, F = estimate(case, kind=kind, structure="dense"), matrix_free(case, 3, kind=kind)
    v = vector(F)
    close(product(F, v), ravel(dense @ v)[0])


@each_kind
@pytest.mark.parametrize("name", ["mlp_gaussian", "tied_weights", "sequence_of_labels"])
def test_the_product_does_not_depend_on_the_batches(name, kind):
    case = SCENARIOS[name]()
    dense = estimate(case, kind=kind, structure="dense", draws=2)
    for size in BATCH_SIZES:
        F = matrix_free(case, size, kind=kind, draws=2)
        v = vector(F)
        close(product(F, v), ravel(dense @ v)[0])


@pytest.mark.parametrize("kind", ["sketch", "sampled"])
def test_a_random_kind_is_one_matrix_for_each_state_of_the_generator(kind):
    case = SCENARIOS["mlp_categorical"]()
    sources = [torch.Generator().manual_seed(seed) for seed in (1, 1, 2, 0)]
    before = [source.get_state() for source in sources]
    F, again, other, zero = (matrix_free(case, kind=kind, generator=source) for source in sources)
    v = vector(F)
    assert same(zero @ v, matrix_free(case, kind=kind) @ v)
    for source, state in zip(sources, before, strict=True):
        assert same(source.get_state(), state)
    assert same(F @ v, F @ v)
    assert same(F @ v, again @ v)
    assert not same(F @ v, other @ v)
    generator = torch.Generator().manual_seed(1)
    dense = estimate(case, kind=kind, structure="dense", generator=generator)
    close(product(F, v), ravel(dense @ v)[0])


@pytest.mark.parametrize(
    "name",
    [
        "attention",
        "encoder_layer",
        "gpt2_sdpa",
        "bert_eager",
        "instance_norm1d",
        "lora_trained",
        "tied_embedding",
        "experts_by_index",
        "gru",
        "checkpoint",
        "compiled",
        "custom_function",
        "two_inputs_as_a_dict",
    ],
)
def test_the_product_follows_every_way_to_write_a_model(name):
    case = ZOO[name]()
    F = MatrixFree(case.model, [(case.x, case.y)], case.likelihood)
    v = vector(F)
    close(product(F, v), zoo_truth(name).dense("exact") @ ravel(v)[0])


def test_an_operation_without_a_second_derivative_is_named_by_torch():
    F = matrix_free(SCENARIOS["embedding_bag"]())
    with pytest.raises(NotImplementedError, match="'_embedding_bag_backward'"):
        F @ vector(F)


# A linear map


@each_kind
@pytest.mark.parametrize("name", ["cnn_with_norms", "attention", "module_called_twice"])
def test_the_map_is_linear_symmetric_and_never_negative(name, kind):
    F = matrix_free(SCENARIOS[name](), kind=kind)
    u, v = vector(F, 1), vector(F, 2)
    Fu, Fv = F @ u, F @ v
    combined = F @ {name: 2 * u[name] - v[name] for name in u}
    close(ravel(combined)[0], ravel({name: 2 * Fu[name] - Fv[name] for name in u})[0])
    assert dot(u, Fv) == pytest.approx(float(dot(v, Fu)), rel=1e-10)
    assert dot(u, Fu) > 0
    assert F.quadratic(u) == pytest.approx(float(dot(u, Fu)), rel=1e-12)
    assert not ravel(F @ {name: torch.zeros_like(t) for name, t in u.items()})[0].any()


def test_the_quadratic_form_is_a_number_without_a_graph():
    """It does not pass for a function of the vector, of which it would have half the gradient."""
    F = matrix_free(SCENARIOS["mlp_categorical"]())
    v = {name: t.requires_grad_() for name, t in vector(F).items()}
    assert not F.quadratic(v).requires_grad
    assert not any(t.requires_grad for t in (F @ v).values())


def test_another_library_solves_with_it_by_conjugate_gradients():
    case, damping = SCENARIOS["mlp_categorical"](), 1e-2
    F, dense = matrix_free(case), estimate(case, structure="dense")
    b, shapes = vector(F), F.shapes
    size = sum(shape.numel() for shape in shapes.values())

    def damped(x):
        x = torch.from_numpy(x)
        return (ravel(F @ unravel(x, shapes))[0] + damping * x).numpy()

    operator = LinearOperator((size, size), matvec=damped, dtype=np.float64)
    found, failed = cg(operator, ravel(b)[0].numpy(), rtol=1e-12)
    assert not failed
    close(torch.from_numpy(found), ravel(dense.solve(b, damping))[0], 1e-8)


# A flat vector, and what is asked by products alone


def whole(name="mlp_categorical", **options):
    """A map, and its matrix."""
    case = SCENARIOS[name]()
    return matrix_free(case, 3, **options), estimate(case, structure="dense", **options).to_dense()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_flat_vector_is_one_in_the_order_of_the_shapes(dtype):
    F, matrix = whole()
    v = vector(F)
    row = ravel(v)[0].to(dtype)
    found = F @ row
    assert (found.shape, found.dtype) == (row.shape, torch.float64)
    close(found, matrix @ row.double())
    close(F.quadratic(row), row.double() @ matrix @ row.double())
    for shape in [(len(row) + 1,), (len(row), 1)]:
        for use in (F.__matmul__, F.quadratic, F.solve):
            with pytest.raises(ValueError, match=rf"must have shape \({len(row)},\), got"):
                use(torch.ones(shape))


@pytest.mark.parametrize("name", ["mlp_categorical", "cnn_with_norms", "attention"])
def test_it_solves_a_damped_system(name):
    F, matrix = whole(name)
    v, damping = vector(F), 1e-2
    row = ravel(v)[0]
    damped = matrix + damping * torch.eye(len(matrix), dtype=torch.float64)
    expected = torch.linalg.solve(damped, row)
    found = F.solve(v, damping)
    assert {name: t.shape for name, t in found.items()} == F.shapes
    assert torch.equal(ravel(found)[0], F.solve(row, damping))
    close(ravel(found)[0], expected, 1e-6)
    close(F.solve(row, damping, tolerance=1e-13), expected, 1e-11)


def test_without_damping_it_solves_what_is_in_its_range():
    F, matrix = whole()
    b = matrix @ ravel(vector(F))[0]
    close(F.solve(b, tolerance=1e-10), torch.linalg.pinv(matrix, hermitian=True) @ b, 1e-5)


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("name", ["mlp_categorical", "mlp_gaussian", "attention"])
def test_it_finds_its_largest_eigenvalues(name, k):
    F, matrix = whole(name)
    expected = torch.linalg.eigvalsh(matrix).flip(0)[:k]
    close(F.eigenvalues(k), expected, 1e-7)


def test_an_eigenvalue_that_is_there_for_every_output_is_found_as_often():
    """For a linear model with Gaussian outputs the matrix has one equal block for each."""
    torch.manual_seed(0)
    model, x, y = nn.Linear(3, 4).double(), torch.randn(10, 3).double(), torch.zeros(10, 4).double()
    F = MatrixFree(model, (x, y), "gaussian")
    inputs = torch.cat([x, torch.ones(10, 1).double()], 1)
    expected = torch.linalg.eigvalsh(inputs.mT @ inputs / 10).flip(0)
    close(F.eigenvalues(5), torch.cat([expected[:1].repeat(4), expected[1:2]]), 1e-8)


@each_kind
def test_trace_and_diagonal_are_found_within_their_errors(kind):
    F, matrix = whole(kind=kind)
    trace, diagonal = F.trace(64), F.diagonal(64)
    assert abs(float(trace.value - matrix.trace())) < 4 * float(trace.standard_error)
    assert {name: t.shape for name, t in diagonal.value.items()} == F.shapes
    off = ravel(diagonal.value)[0] - matrix.diagonal()
    error = ravel(diagonal.standard_error)[0]
    assert (off.abs() < 5 * error + 1e-12).all()
    assert 0.5 < float((off / error).square().mean()) < 2
    close(sum(t.sum() for t in diagonal.value.values()), trace.value)


def test_it_is_shown_in_one_line():
    F, matrix = whole(n_samples=4)
    expected = f"MatrixFree(kind='exact', n_samples=4, parameters={len(matrix)}, "
    assert repr(F) == expected + "dtype=torch.float64, device='cpu')"


def test_sums_are_kept_in_the_precision_that_is_asked_for():
    case = SCENARIOS["mlp_categorical"]()
    model, data = case.model.float(), [(case.x.float(), case.y)]
    plain, fine = (
        MatrixFree(model, data),
        MatrixFree(model, data, dtype=torch.float64, device="cpu"),
    )
    assert (plain.dtype, fine.dtype, fine.device) == (
        torch.float32,
        torch.float64,
        torch.device("cpu"),
    )
    v = vector(plain)
    assert {t.dtype for t in (fine @ v).values()} == {torch.float64}
    assert {t.dtype for t in fine.solve(v, 0.1).values()} == {torch.float64}
    assert fine.eigenvalues().dtype == fine.trace(2).value.dtype == torch.float64
    close(product(fine, v), product(plain, v).double(), 1e-5)


# Data and parameters


def test_labels_that_are_ignored_do_not_count():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES)).double()
    x, y = torch.randn(N, 3, 4, dtype=torch.float64), torch.randint(0, CLASSES, (N, 3))
    y[:, 1] = -100
    likelihood = Categorical(ignore_index=-100)
    for kind in KINDS:
        F = MatrixFree(model, [(x, y)], likelihood, kind=kind)
        dense = fisher_information(model, [(x, y)], likelihood, kind=kind, structure="dense")
        v = vector(F)
        close(product(F, v), ravel(dense @ v)[0])
    F = MatrixFree(model, [(x, y)], likelihood)
    without = MatrixFree(model, [(x[:, [0, 2]], y[:, [0, 2]])])
    close(product(F, v), product(without, v))


@pytest.mark.parametrize("params", ["0.*", ["2.bias"], lambda name, p: p.dim() == 2])
def test_params_choose_a_part_of_the_matrix(params):
    case = SCENARIOS["mlp_categorical"]()
    F = matrix_free(case, params=params)
    dense = estimate(case, structure="dense", params=params)
    assert F.shapes == dense.shapes
    v = vector(F)
    close(product(F, v), ravel(dense @ v)[0])


@pytest.mark.parametrize("n_samples", [1, 3, N])
def test_n_samples_are_used_exactly(n_samples):
    case = SCENARIOS["mlp_categorical"]()
    F = matrix_free(case, 3, n_samples=n_samples)
    v = vector(F)
    first = case._replace(x=case.x[:n_samples], y=case.y[:n_samples])
    close(product(F, v), product(matrix_free(first), v))


def test_data_come_as_loader_tuple_or_list():
    case = SCENARIOS["mlp_categorical"]()
    loader = DataLoader(TensorDataset(case.x, case.y), batch_size=3, shuffle=True)
    expected, v = None, vector(matrix_free(case))
    for data in (loader, (case.x, case.y), [(case.x, case.y)]):
        F = MatrixFree(case.model, data)
        for _ in range(2):
            found = product(F, v)
            expected = found if expected is None else expected
            close(found, expected)


def test_a_loader_is_not_read_before_a_product_is_asked_for():
    """It would draw from the global random state, and start its workers."""
    case = SCENARIOS["mlp_categorical"]()

    class Unread:
        def __iter__(self):
            raise AssertionError

    MatrixFree(case.model, Unread())
    loader = DataLoader(TensorDataset(case.x, case.y), shuffle=True)
    before = torch.get_rng_state()
    MatrixFree(case.model, loader)
    assert same(torch.get_rng_state(), before)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_products_of_half_precision_models_are_summed_in_single_precision(half, precision):
    """In half precision, 4096 and one is 4096."""
    model = nn.Linear(1, 1, bias=False, dtype=half)
    data = [(torch.tensor([[x]], dtype=half), torch.zeros(1, 1)) for x in (64.0, *[1.0] * 15)]
    F = MatrixFree(model, data, Gaussian(), precision=precision)
    found = (F @ {"weight": torch.ones(1, 1)})["weight"]
    assert found.dtype == torch.float32
    assert float(found) * 16 == 4096 + 15


def test_vectors_may_have_another_precision_than_the_model():
    case = SCENARIOS["mlp_categorical"]()
    single = MatrixFree(case.model.float(), [(case.x.float(), case.y)])
    v = vector(single)
    close(product(single, v).double(), oracle("mlp_categorical", "exact") @ ravel(v)[0], 1e-4)


class Dependence(nn.Module):
    """An output that depends on some parameters, on no chosen one, or on none at all."""

    def __init__(self, detach=False):
        super().__init__()
        self.linear = nn.Linear(4, CLASSES)
        self.idle = nn.Parameter(torch.ones(2))
        self.detach = detach

    def forward(self, x):
        return self.linear(x.detach()).detach() if self.detach else self.linear(x)


@pytest.mark.parametrize(
    ("detach", "params", "informed"),
    [
        (False, None, {"linear.weight", "linear.bias"}),
        (False, "idle", set()),
        (True, None, set()),
    ],
    ids=["some", "none chosen", "none at all"],
)
def test_parameters_that_the_output_does_not_depend_on_have_no_information(
    detach, params, informed
):
    torch.manual_seed(0)
    data = [(torch.randn(N, 4), torch.zeros(N, dtype=torch.long))]
    F = MatrixFree(Dependence(detach).double(), [(x.double(), y) for x, y in data], params=params)
    found = F @ vector(F)
    assert {name for name, t in found.items() if t.any()} == informed
    assert {name: t.shape for name, t in found.items()} == F.shapes


# A large vocabulary


class Sizes(TorchDispatchMode):
    """Remember the size of the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor):
                self.largest = max(self.largest, leaf.numel())
        return output


@each_kind
def test_a_vocabulary_of_fifty_thousand_words_needs_no_matrix_over_it(kind):
    words, width, n = 50_000, 2, 3
    model = nn.Linear(width, words, bias=False)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(n, width, generator=generator), torch.arange(n)
    F = MatrixFree(model, [(x, y)], kind=kind)
    V = torch.randn(words, width, generator=generator)
    with Sizes() as sizes:
        found = (F @ {"weight": V})["weight"]
    assert sizes.largest <= 2 * n * words
    if kind == "exact":  # the closed form of softmax regression
        p, along = model(x).detach().softmax(1), x @ V.mT
        inner = p * (along - (p * along).sum(1, keepdim=True))
        close(found, inner.mT @ x / n, 1e-4)


# The model as it is


def test_a_model_that_changes_between_products_is_seen():
    case = SCENARIOS["mlp_categorical"]()
    F = matrix_free(case)
    v = vector(F)
    before = product(F, v)
    with torch.no_grad():
        case.model[0].weight.mul_(0.5)
    scaled = product(F, v)
    case.model[2].bias = nn.Parameter(case.model[2].bias.detach() + 1)
    replaced = product(F, v)
    for found in (scaled, replaced):
        assert relative_error(found, before) > 0.01
    assert relative_error(replaced, scaled) < 1  # a shift of all logits changes nothing
    close(replaced, ravel(estimate(case, structure="dense") @ v)[0])


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("bad", [False, True], ids=["success", "exception in the second batch"])
@each_kind
def test_leaves_no_trace(kind, bad, mode):
    case = SCENARIOS["cnn_with_norms"]()
    case.model.train()
    y = case.y.clone()
    y[-1] = 9 if bad else 0
    F = MatrixFree(case.model, cut(case.x, y, 4), kind=kind)
    before = trace_of(case.model)
    with mode():
        v = vector(F)
        if bad:
            with pytest.raises(ValueError, match="observation 7"):
                F @ v
        else:
            F @ v
    assert same(trace_of(case.model), before)


def test_no_graph_outlives_the_product():
    case = SCENARIOS["mlp_categorical"]()
    outputs = []
    case.model.register_forward_hook(lambda m, a, out: outputs.append(weakref.ref(out)))
    F = matrix_free(case)
    found = F @ vector(F)
    assert outputs
    assert all(output() is None for output in outputs)
    assert all(t.grad_fn is None for t in found.values())


# Refusals


def spoiled(**changes):
    """Return a call of the constructor with something wrong."""
    case = SCENARIOS["mlp_categorical"]()
    data = cut(case.x, case.y, 3)
    options = {"model": case.model, "data": data, "likelihood": case.likelihood} | changes
    return lambda: MatrixFree(**options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": iter([])}, "iterator, which can be read only once; give a list"),
        ({"data": (batch for batch in [])}, "iterator, which can be read only once"),
        ({"kind": "sampeld"}, "kind must be one of .* got 'sampeld'"),
        ({"draws": 0}, "draws must be at least 1, got 0"),
        ({"params": "0.wieght"}, "did you mean '0.weight'"),
        ({"params": nn.Linear(1, 1)}, "a Linear that is no part of this Sequential"),
        ({"n_samples": 0}, "n_samples must be at least 1"),
        ({"generator": 0}, "generator must be a torch.Generator, got 0"),
        ({"dtype": torch.int8}, "dtype must be a real"),
        ({"device": "gpu"}, "device must be one of PyTorch"),
        ({"likelihood": "normal"}, "likelihood must be one of .* got 'normal'"),
    ],
)
def test_a_wrong_argument_is_refused_at_once(changes, message):
    with pytest.raises(ValueError, match=message):
        spoiled(**changes)()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.pop("0.bias"), "'0.bias' is missing"),
        (lambda v: v.update(other=v["0.bias"]), "'other' is not expected"),
        (
            lambda v: v.update({"0.bias": torch.ones(2)}),
            r"'0.bias' is given in shape \(2,\) instead of",
        ),
    ],
    ids=["missing", "unknown", "shape"],
)
def test_a_vector_that_does_not_match_the_parameters_is_refused_by_name(change, message):
    F = matrix_free(SCENARIOS["mlp_categorical"]())
    v = vector(F)
    change(v)
    for refuse in (F.__matmul__, F.quadratic):
        with pytest.raises(ValueError, match=message):
            refuse(v)


def test_a_model_that_mixes_observations_is_refused():
    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, CLASSES)

        def forward(self, x):
            h = self.linear(x)
            return h - h.mean(0)

    case = SCENARIOS["mlp_categorical"]()
    F = matrix_free(case._replace(model=Centred().double()))
    with pytest.raises(ValueError, match="mixes observations"):
        F @ vector(F)


def test_a_product_that_overflows_is_refused_by_name():
    model = nn.Linear(3, 2).double()
    nn.init.constant_(model.bias, 720.0)
    data = torch.ones(4, 3).double(), torch.zeros(4, 2).double()
    with pytest.raises(ValueError, match="information of parameter 'weight' is not finite"):
        MatrixFree(model, data, "poisson") @ dict(model.named_parameters())


def test_any_distribution_has_the_products_of_its_matrix():
    def likelihood(f):
        return torch.distributions.StudentT(1 + f[:, 0].exp(), f[:, 1], f[:, 2].exp())

    model = nn.Linear(4, 3).double()
    data = torch.randn(6, 4).double(), torch.randn(6).double()
    v = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    found = MatrixFree(model, data, likelihood) @ v
    expected = fisher_information(model, data, likelihood, structure="dense") @ v
    for name, product in expected.items():
        torch.testing.assert_close(found[name], product)
