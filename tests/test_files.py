"""Files of Fisher informations and penalties, and the cards on them."""

import json
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import ewc_lib
from ewc_lib import EWC, Fisher, Gaussian, fisher_information
from ewc_lib.files import card, read, write
from ewc_lib.regularizers import EWCDR, L2, MAS, SI, KroneckerLaplace, RWalk
from tests.scenarios import same

STRUCTURES = ["diagonal", "block", "module", "dense", "kronecker", "eigenkronecker", "lowrank"]
each_structure = pytest.mark.parametrize("structure", STRUCTURES)


def network(dtype=torch.float32, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).to(dtype)


def task(seed=0, n=12, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, generator=generator).to(dtype)
    return x, torch.randint(3, (n,), generator=generator)


def move(model):
    with torch.no_grad():
        for p in model.parameters():
            p += 0.5


@pytest.fixture
def path(tmp_path):
    return tmp_path / "fisher.safetensors"


def saved(path, model=None, **options):
    """Save the Fisher information of a model."""
    model = model or network()
    dtype = next(model.parameters()).dtype
    F = fisher_information(model, task(dtype=dtype))
    F.save(path, model=model, **options)
    return model, F


# What is in a file


@each_structure
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_fisher_information_comes_back_bit_by_bit(structure, dtype, path):
    model = network(dtype)
    F = fisher_information(model, task(dtype=dtype), structure=structure)
    F.save(path, model=model)
    found = Fisher.load(path, model)
    assert type(found) is type(F)
    assert same(found.state_dict(), F.state_dict())
    assert (found.likelihood, found.tolerance) == (F.likelihood, F.tolerance)


def test_the_card_says_what_is_in_the_file(path):
    model = network()
    F = fisher_information(model, (task()[0], task()[0]), Gaussian(sigma=0.5), n_samples=7)
    F.save(path, model=model, data="normal noise, seed 0")
    found = card(path)
    assert found["holds"] == "Fisher"
    assert (found["structure"], found["kind"], found["n_samples"]) == ("Diagonal", "exact", 7)
    assert found["likelihood"] == "Gaussian(sigma=0.5)"
    assert found["data"] == "normal noise, seed 0"
    assert found["tolerance"] == F.tolerance
    assert found["versions"] == {"ewc_lib": ewc_lib.__version__, "torch": torch.__version__}
    of = found["parameters"]["0.weight"]
    assert (of["shape"], of["path"], of["keeps"], of["dtype"]) == (
        [4, 3],
        "rule",
        "diagonal",
        "float32",
    )
    assert list(found["parameters"]) == [name for name, _ in model.named_parameters()]


def test_the_card_is_read_without_the_tensors(path, monkeypatch):
    saved(path)
    monkeypatch.setattr("safetensors.torch.load_file", None)
    assert card(path)["holds"] == "Fisher"


def test_any_reader_of_safetensors_finds_the_numbers_under_plain_names(path):
    _, F = saved(path)
    tensors = load_file(path)
    for name, values in F.diagonal().items():
        assert torch.equal(tensors[f"diagonal.{name}"], values)
    assert all(tensor.dtype != torch.uint8 for tensor in tensors.values())
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["format"] == "pt"


def test_the_words_of_the_caller_are_anything_that_json_holds(path):
    data = {"name": "Ziffern \u2014 手写", "tasks": [0, 1], "shuffled": False, "none": None}
    saved(path, data=data)
    assert card(path)["data"] == data


@pytest.mark.parametrize("data", [float("nan"), {1, 2}, torch.ones(2)])
def test_other_words_are_refused_and_nothing_is_written(data, path):
    with pytest.raises((TypeError, ValueError), match=r"^data has to be .* JSON"):
        saved(path, data=data)
    assert list(path.parent.iterdir()) == []


def test_the_hash_of_a_card_is_that_of_names_shapes_and_values(tmp_path):
    first, again, other = (tmp_path / name for name in "abc")
    saved(first)
    saved(again)
    saved(other, network(seed=1))
    assert card(first)["hash"] == card(again)["hash"] != card(other)["hash"]


def test_tensors_that_share_memory_or_lie_across_are_saved(path):
    long = torch.arange(12.0)
    state = {
        "all": long,
        "part": long[2:5],
        "again": long,
        "across": long.reshape(3, 4).T,
        "expanded": torch.ones(1).expand(3),
        "empty": torch.zeros(0, 2),
        "number": torch.tensor(3),
        "complex": torch.randn(2, 3, dtype=torch.complex128).T.conj(),
        "small complex": torch.randn(3, dtype=torch.complex64),
        "text": torch.tensor(list("déjà".encode()), dtype=torch.uint8),
    }
    write(path, state, {"holds": "EWC", "parameters": {}})
    found, said = read(path, "EWC")
    assert same(found, state)
    assert said["holds"] == "EWC"


def test_a_file_that_cannot_be_written_leaves_the_old_one(path, monkeypatch):
    model, _ = saved(path, data="old")

    def fails(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr("safetensors.torch.save_file", fails)
    with pytest.raises(OSError, match="the disk is full"):
        saved(path, model, data="new")
    assert card(path)["data"] == "old"
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_that_is_not_there_is_said_as_such(tmp_path):
    with pytest.raises(FileNotFoundError, match="none"):
        saved(tmp_path / "none" / "fisher.safetensors")


# Which model it is for


def test_names_in_a_file_are_those_without_wrappers(path):
    model = network()
    wrapped = nn.DataParallel(torch.compile(model))
    F = fisher_information(wrapped, task())
    F.save(path, model=wrapped)
    assert list(card(path)["parameters"]) == [name for name, _ in model.named_parameters()]
    assert list(Fisher.load(path, model).shapes) == [name for name, _ in model.named_parameters()]
    found = Fisher.load(path, wrapped)
    assert same(found.state_dict(), F.state_dict())


@each_structure
def test_a_file_of_a_plain_model_fits_a_wrapped_one(structure, path):
    model = network()
    fisher_information(model, task(), structure=structure).save(path, model=model)
    wrapped = torch.compile(model)
    ewc = EWC(wrapped, 1.0, structure=structure)
    ewc.remember(Fisher.load(path, wrapped))
    move(model)
    assert ewc.penalty() > 0


@pytest.mark.parametrize("saved_as", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given_as", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_one_checkpoint_is_the_same_in_the_coarser_precision(saved_as, given_as, path):
    """It was published in the wider of the two, and each has a copy of it."""
    widest = max(saved_as, given_as, key=lambda dtype: torch.finfo(dtype).bits)
    published = network(widest)
    F = fisher_information(published, task(dtype=widest))
    F.save(path, model=network(widest).to(saved_as))
    found = Fisher.load(path, network(widest).to(given_as))
    assert list(found.shapes) == list(F.shapes)


@pytest.mark.parametrize("given_as", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_model_with_other_values_is_refused_by_name(given_as, path):
    saved(path)
    other = network()
    with torch.no_grad():
        other[2].bias[1] += 0.1
    other = other.to(given_as)
    with pytest.raises(ValueError, match=r"other values of 1 of 4 parameters: '2\.bias'"):
        Fisher.load(path, other)
    assert Fisher.load(path, other, check_values=False).n_samples == 12


def test_a_model_with_other_names_or_shapes_is_refused_with_both(path):
    saved(path)
    other = network()
    other[2] = nn.Linear(4, 5)
    with pytest.raises(ValueError, match=r"'2\.weight' has shape \(5, 4\) instead of \(3, 4\)"):
        Fisher.load(path, other)
    other = nn.Sequential(nn.Linear(3, 4))
    for check_values in (True, False):
        with pytest.raises(ValueError, match=r"another model: the model has no '2\.weight'"):
            Fisher.load(path, other, check_values=check_values)


def test_a_model_may_have_parameters_besides_and_frozen_ones(path):
    model = network()
    fisher_information(model, task(), params="2.*").save(path, model=model)
    model.requires_grad_(False)
    model.append(nn.Linear(3, 2))
    assert list(Fisher.load(path, model).shapes) == ["2.weight", "2.bias"]


def test_a_file_without_values_warns_if_a_model_is_to_be_compared(path):
    model = network()
    fisher_information(model, task()).save(path)
    assert card(path)["hash"] is None
    with pytest.warns(RuntimeWarning, match="was saved without a model") as warned:
        Fisher.load(path, model)
    assert warned[0].filename == __file__
    Fisher.load(path, model, check_values=False)
    Fisher.load(path)


def test_a_fisher_is_not_saved_with_a_model_that_it_is_not_of(path):
    F = fisher_information(network(), task())
    with pytest.raises(ValueError, match=r"the model has no '2\.weight'"):
        F.save(path, model=nn.Sequential(nn.Linear(3, 4)))
    assert not path.exists()


# Penalties


PENALTIES = {
    "EWC": lambda model: EWC(model, 2.0),
    "online": lambda model: EWC(model, 2.0, "online", decay=0.5),
    "low rank": lambda model: EWC(model, 2.0, structure="lowrank"),
    "L2": lambda model: L2(model, 2.0),
    "MAS": lambda model: MAS(model, 2.0),
    "SI": lambda model: SI(model, 2.0),
    "RWalk": lambda model: RWalk(model, 2.0),
    "EWC-DR": lambda model: EWCDR(model, 2.0),
    "Kronecker": lambda model: KroneckerLaplace(model, 2.0),
}


def learned(name, model):
    """A penalty after two short tasks."""
    penalty, optimizer = PENALTIES[name](model), torch.optim.SGD(model.parameters(), lr=0.1)
    for t in range(2):
        x, y = task(t)
        penalty.before_task()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        penalty.before_step(x)
        optimizer.step()
        penalty.after_step()
        penalty.consolidate((x, y))
    return penalty


@pytest.mark.parametrize("name", PENALTIES)
def test_a_penalty_comes_back_for_a_model_that_has_moved_on(name, path):
    model = network()
    penalty = learned(name, model)
    penalty.save(path, data=["first", "second"])
    move(model)
    found = PENALTIES[name](model)
    found.load(path)
    assert same(found.state_dict(), penalty.state_dict())
    assert found.penalty() > 0
    assert torch.equal(found.penalty(), penalty.penalty())
    said = card(path)
    assert (said["holds"], said["n_tasks"]) == (type(penalty).__name__, 2)
    assert said["data"] == ["first", "second"]


def test_the_card_of_ewc_says_its_settings_and_its_anchor(path):
    model = network()
    ewc = EWC(model, 2.0, "online", decay=0.5, kind="sketch")
    ewc.consolidate(task(), n_samples=5)
    ewc.save(path)
    said = card(path)
    assert (said["mode"], said["decay"], said["kind"]) == ("online", "0.5", "sketch")
    assert (said["strength"], said["budget"]) == (ewc.strength, None)
    ewc.budget = 0.5
    ewc.save(path)
    assert (card(path)["strength"], card(path)["budget"]) == (None, 0.5)
    assert (said["structure"], said["n_samples"]) == ("diagonal", 5)
    assert said["likelihood"].startswith("Categorical(")
    saved(path, model)
    assert said["hash"] == card(path)["hash"]  # the anchor of one task is where the model was


def test_a_penalty_without_a_task_is_saved_as_well(path):
    EWC(network(), 1.0).save(path)
    assert card(path)["parameters"] == {}
    ewc = learned("EWC", network())
    ewc.load(path)
    assert ewc.n_tasks == 0


def test_complex_parameters_are_saved(path):
    class Filter(nn.Module):
        def __init__(self):
            super().__init__()
            self.filter = nn.Parameter(torch.ones(3, dtype=torch.complex64))

        def forward(self, x):
            return torch.fft.irfft(torch.fft.rfft(x) * self.filter, n=4)

    model, data = Filter(), (torch.ones(6, 4), torch.arange(6) % 4)
    ewc = EWC(model, 1.0)
    F = ewc.consolidate(data)
    ewc.save(path)
    found = EWC(model, 1.0)
    found.load(path)
    assert same(found.state_dict(), ewc.state_dict())
    F.save(path, model=model)
    assert same(Fisher.load(path, model).state_dict(), F.state_dict())
    with torch.no_grad():
        model.filter += 1j
    with pytest.raises(ValueError, match="other values"):
        Fisher.load(path, model)


def test_a_fisher_is_no_penalty_and_the_reverse(path):
    model, _ = saved(path)
    with pytest.raises(ValueError, match=r"holds a Fisher, but a EWC .* remember\(Fisher\.load"):
        EWC(model, 1.0).load(path)
    learned("SI", model).save(path)
    with pytest.raises(ValueError, match=r"holds a SI, but a Fisher .* SI\(\.\.\.\)\.load\(path\)"):
        Fisher.load(path)


# What is no such file


def test_what_is_no_file_of_this_kind_is_refused_and_named(tmp_path):
    pickled, plain, short = (tmp_path / name for name in ("pickled", "plain", "short"))
    torch.save({"a": torch.ones(2)}, pickled)
    save_file({"a": torch.ones(2)}, plain)
    saved(tmp_path / "whole")
    short.write_bytes((tmp_path / "whole").read_bytes()[:-9])
    for path, message in [
        (pickled, "damaged, or no"),
        (plain, "no card"),
        (short, "damaged, or no"),
    ]:
        with pytest.raises(ValueError, match=f"{path.name} .*{message}"):
            card(path)
        with pytest.raises(ValueError, match=message):
            Fisher.load(path)
    with pytest.raises(FileNotFoundError):
        card(tmp_path / "none")


def rewrite(path, key, change):
    """Change what a key of the header holds, and nothing else."""
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    save_file(load_file(path), path, header | {key: change(header[key])})


def with_card(change):
    return "ewc_lib", lambda text: json.dumps(change(json.loads(text)))


def without(key):
    return with_card(lambda card: {k: v for k, v in card.items() if k != key})


DAMAGES = {
    "no JSON": ("ewc_lib", lambda text: text[:-5]),
    "no dict": ("ewc_lib", lambda _: "[1]"),
    "a word for a version": with_card(lambda card: card | {"format": "one"}),
    "no version": without("format"),
    "no class": without("holds"),
    "no parameters": without("parameters"),
    "no shape": with_card(lambda card: card | {"parameters": {"0.weight": {}}}),
    "no hash": with_card(
        lambda card: card | {"parameters": {"0.weight": {"shape": [4, 3], "values": {"x": ""}}}}
    ),
    "texts that are none": ("ewc_lib.texts", lambda _: '{"kind": 1}'),
    "a list of texts": ("ewc_lib.texts", lambda _: "[]"),
    "no such complex tensor": ("ewc_lib.complex", lambda _: '["none"]'),
    "no such tensor": ("ewc_lib.sums", lambda _: '{"none": 1}'),
    "sums that are none": ("ewc_lib.sums", lambda _: "1"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_header_is_refused_with_its_path(name, path):
    model, _ = saved(path)
    rewrite(path, *DAMAGES[name])
    with pytest.raises(ValueError, match=r"fisher\.safetensors is damaged"):
        Fisher.load(path, model)


def test_a_wrong_bit_in_any_tensor_is_found_and_the_tensor_named(path):
    ewc = learned("EWC", network())
    ewc.save(path)
    before = ewc.state_dict()
    whole, tensors = path.read_bytes(), load_file(path)
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    for key, value in tensors.items():
        wrong = value.clone()
        wrong.view(-1).view(torch.uint8)[0] ^= 1
        save_file(tensors | {key: wrong}, path, header)
        with pytest.raises(ValueError, match=rf"damaged: the values of \['{key}'\]"):
            ewc.load(path)
    assert same(ewc.state_dict(), before)
    path.write_bytes(whole)
    ewc.load(path)


def test_a_file_from_before_there_were_checksums_loads(path):
    _, F = saved(path)
    with safe_open(path, framework="pt") as file:
        header = {key: text for key, text in file.metadata().items() if key != "ewc_lib.sums"}
    save_file(load_file(path), path, header)
    assert same(Fisher.load(path).state_dict(), F.state_dict())


def test_a_directory_is_refused_as_such(tmp_path):
    for use in (card, Fisher.load, EWC(network(), 1.0).load):
        with pytest.raises(ValueError, match="is a directory"):
            use(tmp_path)


def test_a_path_of_bytes_is_the_same_file(path):
    _, F = saved(bytes(path))
    assert list(path.parent.iterdir()) == [path]
    assert same(Fisher.load(bytes(path)).state_dict(), F.state_dict())


def test_a_card_of_a_later_version_is_refused(path):
    saved(path)
    rewrite(path, *with_card(lambda card: card | {"format": 2}))
    with pytest.raises(ValueError, match="card of version 2; this ewc_lib reads 1"):
        Fisher.load(path)


def test_without_safetensors_the_extra_is_named(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for use in (lambda: saved(path), lambda: card(path), lambda: Fisher.load(path)):
        with pytest.raises(ImportError, match=r"pip install 'ewc_lib\[files\]'"):
            use()


def test_no_file_is_read_or_written_by_pickle(path, monkeypatch):
    def refused(*_, **__):
        raise AssertionError("something was pickled")

    monkeypatch.setattr("pickle.Pickler", refused)
    monkeypatch.setattr("pickle.Unpickler", refused)
    monkeypatch.setattr(torch, "load", refused)
    monkeypatch.setattr(torch, "save", refused)
    model, F = saved(path)
    assert same(Fisher.load(path, model).state_dict(), F.state_dict())
    assert path.read_bytes()[8:9] == b"{"  # after the length of the header, its JSON
