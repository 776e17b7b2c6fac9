"""Processes that torchrun starts, against one process that has all data."""

import os
import re
import subprocess
import sys
from functools import cache, reduce
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from ewc_lib import EWC, Fisher
from ewc_lib import fisher_information as in_one_process
from ewc_lib.errors import EmptyData
from ewc_lib.fisher import Diagonal
from ewc_lib.integrations.distributed import all_reduce, fisher_information
from tests.integrations.ranks import (
    ATTACHED,
    CASES,
    METHODS,
    STRUCTURES,
    WAYS,
    N,
    as_batches,
    images,
    learned,
    part,
    precision_and_penalty,
    towers,
    trained,
    words,
)
from tests.scenarios import relative_error

EXACT = 1e-12


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Start some processes, once for all tests, and return what each has found."""

    @cache
    def start(count):
        folder = tmp_path_factory.mktemp("ranks")
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        worker = [f"--nproc-per-node={count}", "-m", "tests.integrations.ranks", str(folder)]
        done = subprocess.run(
            [*torchrun, *worker],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr
        return [torch.load(folder / f"{rank}.pt") for rank in range(count)]

    return start


FOUR = pytest.param(4, marks=pytest.mark.slow)
"""Two ranks meet in the same ways; of four, one has no data and some are in the middle."""


@pytest.fixture(params=[2, FOUR])
def ranks(request, start):
    return start(request.param)


@pytest.fixture
def alone():
    """One process that is a group by itself."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def everywhere(ranks, check):
    """Return what a check found on every rank, after a look that it found no error."""
    found = [results[check] for results in ranks]
    assert not any(isinstance(result, str) for result in found), found
    return found


def same_everywhere(ranks, check, pick=lambda found: found):
    """Return the Fisher information that every rank has, bit by bit."""
    first, *others = (pick(found) for found in everywhere(ranks, check))
    for other in others:
        assert other.keys() == first.keys()
        assert all(torch.equal(other[key], first[key]) for key in first)
    return Fisher.from_state_dict(first)


def assert_same(found, expected, tolerance=EXACT):
    assert type(found) is type(expected)
    assert found.n_samples == expected.n_samples
    assert found.paths == expected.paths
    assert list(found.shapes) == list(expected.shapes)
    assert relative_error(found.to_dense(), expected.to_dense()) < tolerance


def assert_alike(found, expected, tolerance=EXACT):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert relative_error(found[name], value) < tolerance, name


def assert_trained(found, expected):
    torch.testing.assert_close(found["penalty"], expected["penalty"], rtol=EXACT, atol=0)
    for stage in ("in the loss", "added", "step"):
        assert found[stage].keys() == expected[stage].keys()
        for name, value in expected[stage].items():
            assert relative_error(found[stage][name], value) < EXACT, (stage, name)


def merged(ranks, own):
    """Pool what one process finds in the shard of each rank."""
    model, x, y = images()
    shards = [(rank, part(rank, len(ranks))) for rank in range(len(ranks))]
    return reduce(
        lambda F, G: F.pool(G),
        [own(model, as_batches(x[s], y[s]), rank) for rank, s in shards if s.start < s.stop],
    )


class TestManyProcesses:
    @pytest.mark.parametrize(("kind", "structure"), CASES)
    def test_every_rank_has_what_one_process_finds_in_all_data(self, ranks, kind, structure):
        model, x, y = images()
        expected = in_one_process(model, (x, y), kind=kind, structure=structure)
        found = same_everywhere(ranks, "cases", lambda found: found[f"{kind} {structure}"])
        assert found.n_samples == N
        assert_same(found, expected)

    def test_every_rank_has_the_penalty_of_all_data(self, ranks):
        model, x, y = images()
        ewc = EWC(model, strength=10.0)
        ewc.consolidate((x, y))
        with torch.no_grad():
            for p in model.parameters():
                p += 1
        assert ewc.penalty() > 0
        for found in everywhere(ranks, "elastic_weight_consolidation"):
            torch.testing.assert_close(found, ewc.penalty().detach(), rtol=EXACT, atol=0)

    @pytest.mark.parametrize("method", METHODS)
    def test_a_task_that_is_finished_together_is_that_of_all_data(self, ranks, method):
        model, x, y = images()
        regularizer = METHODS[method](model)
        regularizer.consolidate((x, y))
        n, precision, penalty = precision_and_penalty(regularizer)
        for found in everywhere(ranks, "consolidated"):
            assert found[method][0] == n == N
            assert relative_error(found[method][1], precision) < EXACT
            torch.testing.assert_close(found[method][2], penalty, rtol=EXACT, atol=0)

    @pytest.mark.parametrize("method", METHODS)
    def test_a_process_that_shall_work_for_itself_does(self, ranks, method):
        for rank, results in enumerate(ranks):
            model, x, y = images()
            own = part(rank, len(ranks))
            if own.start == own.stop:
                assert results["consolidated_each_for_itself"].startswith("EmptyData")
                continue
            regularizer = METHODS[method](model)
            regularizer.consolidate((x[own], y[own]))
            n, precision, penalty = precision_and_penalty(regularizer)
            found = results["consolidated_each_for_itself"][method]
            assert found[0] == n
            assert torch.equal(found[1], precision)
            assert torch.equal(found[2], penalty)

    def test_some_of_the_ranks_finish_a_task_together(self, ranks):
        model, x, y = images()
        first, last = part(0, len(ranks)), part(len(ranks) - 1, len(ranks))
        both = torch.cat([x[first], x[last]]), torch.cat([y[first], y[last]])
        found = same_everywhere([ranks[0], ranks[-1]], "consolidated_by_some")
        assert_same(found, in_one_process(model, both))
        for results in ranks[1:-1]:
            assert "is not in the group" in results["consolidated_by_some"]

    def test_two_tasks_have_other_random_numbers_and_so_have_two_ranks(self, ranks):
        for found in everywhere(ranks, "consolidated_twice"):
            one, two, of_ranks = (Fisher.from_state_dict(state).to_dense() for state in found)
            assert relative_error(one, two) > 1e-3
            assert relative_error(one, of_ranks) > 1e-3

    def test_ranks_with_other_parameters_are_refused(self, ranks):
        (error,) = {results["other_parameters_on_one_rank"] for results in ranks}
        assert error.startswith("ValueError: the parameters on rank 1 have other values than those")

    def test_all_ranks_have_the_running_statistics_of_the_first(self, ranks):
        model, x, y = images()
        model.norm.running_mean += 0.1
        found = everywhere(ranks, "running_statistics_of_the_first_rank")
        assert all(rank["own kept"] for rank in found)
        picked = same_everywhere(ranks, "running_statistics_of_the_first_rank", lambda f: f["F"])
        expected = in_one_process(model, (x, y))
        assert relative_error(picked.to_dense(), expected.to_dense()) < EXACT

    def test_a_model_in_a_wrapper_trains_as_one_process_on_all_data(self, ranks):
        if len(ranks) > 2:
            pytest.skip("one of four ranks has no data to train on")
        model, x, y = images()
        ewc = EWC(model, strength=10.0)
        ewc.consolidate((x, y))
        parts = [part(rank, len(ranks)) for rank in range(len(ranks))]
        expected = trained(model, ewc, *((x[own], y[own]) for own in parts))
        for found in everywhere(ranks, "trained_in_a_wrapper"):
            assert_trained(found, expected)

    @pytest.mark.parametrize("n", [N, 1])
    def test_what_a_sampler_repeats_does_not_count(self, ranks, n):
        model, x, y = images()
        found = same_everywhere(ranks, "sampled_for_all_ranks", lambda found: found[n])
        assert found.n_samples == n
        assert_same(found, in_one_process(model, (x[:n], y[:n])))

    @pytest.mark.parametrize("split", [False, True])
    def test_what_accelerate_repeats_in_the_last_batch_does_not_count(self, ranks, split):
        model, x, y = images()
        found = same_everywhere(ranks, "dispatched_by_accelerate", lambda found: found[split])
        assert_same(found, in_one_process(model, (x, y)))

    def test_batches_that_one_rank_hands_out_meet_no_layers(self, ranks):
        model, x, y = images()
        expected = in_one_process(model, (x, y)).diagonal()
        for found in everywhere(ranks, "dispatched_by_accelerate"):
            assert_alike(found["sharded"], expected)

    @pytest.mark.parametrize("kind", ["sketch", "sampled"])
    def test_each_rank_draws_its_own_random_numbers(self, ranks, kind):
        def seeded(model, data, rank):
            generator = torch.Generator().manual_seed(rank)
            return in_one_process(model, data, kind=kind, generator=generator)

        found = same_everywhere(ranks, "random", lambda found: found[kind])
        assert_same(found, merged(ranks, seeded))

    def test_a_generator_of_the_user_is_used_as_it_is(self, ranks):
        def seeded(model, data, rank):
            generator = torch.Generator().manual_seed(100 + rank)
            return in_one_process(model, data, kind="sketch", generator=generator)

        assert_same(same_everywhere(ranks, "given_generator"), merged(ranks, seeded))

    def test_half_precision_models_are_summed_in_single_precision(self, ranks):
        model, x, y = images()
        expected = in_one_process(model.bfloat16(), (x.bfloat16(), y))
        found = same_everywhere(ranks, "half_precision")
        assert found.to_dense().dtype == torch.float32
        assert_same(found, expected, 1e-6)

    def test_a_rank_without_observations_has_what_the_others_find(self, ranks):
        model, x, y = images()
        rest = slice(part(0, len(ranks)).stop, None)
        expected = in_one_process(model, (x[rest], y[rest]), structure="kronecker")
        assert_same(same_everywhere(ranks, "first_rank_is_empty"), expected)

    def test_no_observation_on_any_rank_is_an_error(self, ranks):
        expected = "EmptyData: data is empty: no rank holds an observation"
        assert {results["all_ranks_are_empty"] for results in ranks} == {expected}

    def test_a_rank_that_fails_is_named_on_all_others(self, ranks):
        *others, failed = [results["one_rank_fails"] for results in ranks]
        error = "ValueError: label 100 of observation 0 is outside the 3 classes of the output"
        assert failed == error
        assert set(others) == {f"RuntimeError: rank {len(ranks) - 1} failed: {error}"}

    def test_the_others_are_told_the_first_line_of_a_message(self, ranks):
        failed, *others = [results["one_rank_fails_while_it_reads"] for results in ranks]
        assert failed == "OSError: the disk is gone\nand with it the data"
        assert set(others) == {"RuntimeError: rank 0 failed: OSError: the disk is gone"}

    def test_structures_that_do_not_add_up_are_refused_before_any_work(self, ranks):
        for found in everywhere(ranks, "structures_that_do_not_add_up"):
            assert found.keys() == {"eigenkronecker", "lowrank"}
            for structure, error in found.items():
                assert error.startswith(f"ValueError: structure='{structure}': the eigenvectors")

    def test_ranks_of_other_parameters_are_refused_on_all_ranks(self, ranks):
        (error,) = {results["ranks_of_other_parameters"] for results in ranks}
        last = len(ranks) - 1
        assert error.startswith(f"ValueError: rank {last} does not fit rank 0: parameters do not")
        assert "'conv.weight' is not expected" in error

    def test_ranks_of_other_dtypes_are_refused_on_all_ranks(self, ranks):
        (error,) = {results["ranks_of_other_dtypes"] for results in ranks}
        assert error.startswith(f"ValueError: rank {len(ranks) - 1} does not fit rank 0: the param")
        assert error.endswith("of another order or dtype")

    def test_what_was_computed_before_is_weighed_by_its_observations(self, ranks):
        model, x, y = images()
        parts = [in_one_process(model, (x[:n], y[:n])) for n in range(5, 5 + len(ranks))]
        expected = reduce(lambda F, G: F.pool(G), parts)
        assert_same(same_everywhere(ranks, "computed_before"), expected)

    def test_a_wrapper_for_training_does_not_make_ranks_wait_in_forward(self, ranks):
        model, x, y = images()
        expected = in_one_process(model, (x, y))
        found = same_everywhere(ranks, "wrapped")
        assert list(found.shapes) == [f"module.{name}" for name in expected.shapes]
        assert relative_error(found.to_dense(), expected.to_dense()) < EXACT

    def test_a_group_takes_the_data_of_its_ranks_only(self, ranks):
        model, x, y = images()
        first, last = part(0, len(ranks)), part(len(ranks) - 1, len(ranks))
        both = torch.cat([x[first], x[last]]), torch.cat([y[first], y[last]])
        members = [ranks[0], ranks[-1]]
        found = same_everywhere(members, "some_of_the_ranks")
        assert_same(found, in_one_process(model, both))
        for results in ranks[1:-1]:
            assert "is not in the group" in results["some_of_the_ranks"]

    def test_a_rank_outside_the_group_is_refused(self, ranks):
        model, x, y = images()
        first, *others = [results["first_rank_alone"] for results in ranks]
        own = part(0, len(ranks))
        assert_same(Fisher.from_state_dict(first), in_one_process(model, (x[own], y[own])))
        assert all("is not in the group" in error for error in others)


@pytest.mark.filterwarnings("ignore:vmap cannot follow Words:RuntimeWarning")
class TestShardedParameters:
    @pytest.fixture(params=["sharded", "sharded_and_replicated"])
    def found(self, request, ranks):
        return everywhere(ranks, request.param)

    def test_they_have_a_diagonal_that_is_sharded_in_the_same_way(self, found):
        assert all(rank["placed like the parameters"] for rank in found)

    def test_the_diagonal_is_that_of_whole_parameters(self, found):
        model, x, y = words()
        expected = in_one_process(model, (x, y)).diagonal()
        for rank in found:
            assert rank["diagonal"].keys() == expected.keys()
            for name, value in expected.items():
                assert relative_error(rank["diagonal"][name], value) < EXACT

    def test_a_sharded_diagonal_computes_like_a_whole_one(self, found):
        model, x, y = words()
        F = in_one_process(model, (x, y))
        for rank in found:
            assert relative_error(rank["quadratic"], F.quadratic(F.diagonal())) < EXACT
            assert rank["shares"] == pytest.approx([row.share for row in F.report()], rel=EXACT)

    def test_other_structures_are_whole_on_every_rank(self, found):
        model, x, y = words()
        expected = in_one_process(model, (x, y), structure="kronecker").to_dense()
        for rank in found:
            assert relative_error(rank["kronecker"], expected) < EXACT

    def test_the_model_trains_on_as_before(self, found):
        """Its gradients, taken before and after, add up to twice those of a whole model."""
        model, x, y = words()
        nn.functional.cross_entropy(model(x), y).backward()
        expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        for rank in found:
            assert rank["untouched"]
            assert rank["gradients"].keys() == expected.keys()
            for name, gradient in expected.items():
                assert relative_error(rank["gradients"][name], 2 * gradient) < EXACT

    @pytest.mark.parametrize("structure", STRUCTURES)
    def test_they_train_as_whole_ones_do(self, ranks, structure):
        model, x, y = words()
        ewc = EWC(model, strength=10.0, structure=structure)
        ewc.consolidate((x, y))
        expected = trained(model, ewc, (x, y))
        for found in everywhere(ranks, "trained_sharded"):
            assert_trained(found[structure], expected)

    def test_states_go_from_whole_models_to_sharded_ones_and_back(self, ranks):
        for found in everywhere(ranks, "states_go_over"):
            assert found[0] > 0
            for other in found[1:]:
                torch.testing.assert_close(other, found[0], rtol=EXACT, atol=0)

    def test_a_rank_that_fails_is_named_on_all_others(self, ranks):
        failed, *others = [results["sharded_and_one_rank_fails"] for results in ranks]
        assert failed.startswith("ValueError: label 10")
        assert set(others) == {f"RuntimeError: rank 0 failed: {failed}"}


class TestLayerByLayer:
    def test_no_rank_ever_holds_the_whole_model_or_as_much_of_anything_like_it(self, ranks):
        """Weights of blocks, their gradients and their sums: of 8 blocks, fewer than 6 in all."""
        model, x, y = towers()
        expected = in_one_process(model, (x, y)).diagonal()
        for found in everywhere(ranks, "layer_by_layer"):
            assert found["n"] == N
            assert_alike(found["F"], expected)
            assert 0 < found["most"] < 6 * model.blocks[0][1].weight.nbytes

    @pytest.mark.parametrize("way", WAYS)
    def test_it_is_right_in_whatever_way_the_model_is_sharded(self, ranks, way):
        model, x, y = towers()
        if way == "frozen":
            model.blocks[1:5].requires_grad_(False)
        if way == "half":
            model, x = model.bfloat16(), x.bfloat16()
        expected = in_one_process(model, (x, y)).diagonal()
        for found in everywhere(ranks, "sharded_in_other_ways"):
            assert found[way]["n"] == N
            assert_alike(found[way]["F"], expected, 1e-5 if way == "half" else EXACT)

    def test_ranks_draw_random_numbers_of_their_own(self, ranks):
        model, x, y = towers()
        parts = [(rank, part(rank, len(ranks))) for rank in range(len(ranks))]
        expected = reduce(
            lambda F, G: F.pool(G),
            [
                in_one_process(
                    model,
                    as_batches(x[own], y[own]),
                    kind="sketch",
                    generator=torch.Generator().manual_seed(rank),
                )
                for rank, own in parts
                if own.start < own.stop
            ],
        ).diagonal()
        for found in everywhere(ranks, "random_and_sharded"):
            assert_alike(found, expected)

    def test_a_group_without_some_who_share_the_parameters_is_refused(self, ranks):
        first, *others = [results["sharded_over_others"] for results in ranks]
        assert re.match(r"ValueError: ranks \[1.*\] share the parameters of the model", first)
        assert all("is not in the group" in error for error in others)

    def test_a_part_that_is_not_finite_is_an_error_on_all_ranks(self, ranks):
        expected = "ValueError: parameter 'head.weight' holds NaN or infinite values"
        assert {results["nan_in_one_part"] for results in ranks} == {expected}


@pytest.mark.usefixtures("alone")
class TestOneProcess:
    @pytest.mark.parametrize("structure", STRUCTURES)
    def test_it_finds_what_it_finds_without_a_group(self, structure):
        model, x, y = images()
        expected = in_one_process(model, (x, y), structure=structure)
        assert_same(fisher_information(model, (x, y), structure=structure), expected)

    @pytest.mark.parametrize("structure", ["eigenkronecker", "lowrank"])
    def test_structures_that_do_not_add_up_are_refused(self, structure):
        model, x, y = images()
        with pytest.raises(ValueError, match=f"^structure='{structure}': the eigenvectors"):
            fisher_information(model, (x, y), structure=structure)
        with pytest.raises(ValueError, match=r"of \['.*: the eigenvectors of parts"):
            all_reduce(in_one_process(model, (x, y), structure=structure))

    def test_empty_data_are_an_error(self):
        model, x, y = images()
        with pytest.raises(EmptyData, match=r"^data is empty: no rank"):
            fisher_information(model, (x[:0], y[:0]))

    def test_errors_are_those_of_one_process(self):
        model, x, y = images()
        with pytest.raises(ValueError, match=r"no trainable parameter is named 'hed.weight'"):
            fisher_information(model, (x, y), params="hed.weight")
        with pytest.raises(ValueError, match="Flatten has no trainable parameter"):
            fisher_information(nn.Flatten(), (x, y))

    def test_data_parallel_models_keep_their_names(self):
        model, x, y = images()
        F = fisher_information(nn.DataParallel(model), (x, y), params="module.head.*")
        expected = in_one_process(model, (x, y), params="head.*").diagonal()
        assert list(F.shapes) == ["module.head.weight", "module.head.bias"]
        assert torch.equal(F.diagonal()["module.head.bias"], expected["head.bias"])

    @pytest.mark.parametrize("wrap", [nn.DataParallel, fully_shard], ids=["wrapped", "sharded"])
    def test_modules_and_parameters_are_chosen_though_they_are_exchanged(self, wrap):
        model, x, y = images()
        expected = in_one_process(model, (x, y), params="head.*").diagonal()
        wrapped = wrap(model)
        for params in (model.head, list(model.head.parameters())):
            found = fisher_information(wrapped, (x, y), params=params).diagonal()
            assert [name.removeprefix("module.") for name in found] == list(expected)
            for value, whole in zip(found.values(), expected.values(), strict=True):
                assert torch.equal(getattr(value, "full_tensor", lambda v=value: v)(), whole)
        with pytest.raises(ValueError, match="that is no part of this"):
            fisher_information(wrapped, (x, y), params=nn.Linear(1, 1))

    def test_parameters_of_two_dtypes_keep_theirs(self):
        model = nn.Sequential(nn.Linear(3, 4), Cast(), nn.Linear(4, 2).double())
        data = torch.randn(8, 3), torch.arange(8) % 2
        found, expected = fisher_information(model, data), in_one_process(model, data)
        for name, value in expected.diagonal().items():
            assert found.diagonal()[name].dtype == value.dtype
            assert torch.equal(found.diagonal()[name], value)

    @pytest.mark.filterwarnings("ignore:vmap cannot follow:RuntimeWarning")
    def test_hooks_and_parameters_of_a_sharded_model_come_back_after_an_error(self):
        model, x, y = words()
        fully_shard(model)
        called = []
        model.mix.register_forward_hook(lambda *_: called.append("hook of the user"))
        tables = [t for m in model.modules() for t in (m._forward_pre_hooks, m._forward_hooks)]
        before = [list(table.items()) for table in tables], list(model.parameters())
        with pytest.raises(ValueError, match="label 106"):
            fisher_information(model, (x, y + 106))
        assert ([list(table.items()) for table in tables], list(model.parameters())) == before
        assert called
        assert fisher_information(model, (x, y)).n_samples == N

    def test_without_this_module_a_sharded_model_is_refused(self):
        model, x, y = words()
        fully_shard(model)
        with pytest.raises(ValueError, match=r"'embed.weight' is sharded over processes"):
            in_one_process(model, (x, y))

    def test_a_sharded_result_is_not_added_up_again(self):
        model, x, y = words()
        fully_shard(model)
        F = fisher_information(model, (x, y), params="mix.weight")
        with pytest.raises(ValueError, match="sharded, so it is that of all ranks already"):
            all_reduce(F)

    @pytest.mark.filterwarnings("ignore:FSDP is switching:UserWarning")
    def test_an_older_way_of_sharding_is_refused_by_name(self):
        model, x, y = images()
        wrapped = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
        with pytest.raises(ValueError, match="use fully_shard"):
            fisher_information(wrapped, (x, y))


class Cast(nn.Module):
    def forward(self, x):
        return x.double()


@pytest.mark.parametrize("method", METHODS)
def test_a_wrapper_whose_processes_are_gone_is_no_obstacle(method):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    model, x, y = images()
    regularizer = METHODS[method](DistributedDataParallel(model))
    dist.destroy_process_group()
    expected = METHODS[method](images()[0])
    regularizer.consolidate((x, y))
    expected.consolidate((x, y))
    assert torch.equal(regularizer.precision.to_dense(), expected.precision.to_dense())


def test_one_process_with_all_data_needs_no_group_and_may_keep_what_does_not_add_up():
    model, x, y = images()
    ewc = EWC(model, strength=1.0, structure="lowrank")
    with pytest.raises(RuntimeError, match="init_process_group"):
        ewc.consolidate((x, y), group=object())
    assert ewc.consolidate((x, y)).n_samples == N


def test_without_a_group_the_error_says_how_to_make_one():
    model, x, y = images()
    with pytest.raises(RuntimeError, match="init_process_group"):
        fisher_information(model, (x, y))
    with pytest.raises(RuntimeError, match="init_process_group"):
        all_reduce(Diagonal(1, "exact", {"a": "rule"}, {"a": torch.ones(2)}))


@pytest.mark.parametrize("name", ATTACHED)
def test_processes_that_train_one_model_stay_together_with_what_is_attached(ranks, name):
    """And do what one process does with all data, unless each draws data of its own."""
    first, *others = (rank["attached"][name] for rank in ranks)
    for other in others:
        assert all(torch.equal(other[n], p) for n, p in first.items())
    if name != "replay":
        for n, p in learned(name, 0, 1, lambda model: model).items():
            torch.testing.assert_close(first[n], p, rtol=EXACT, atol=EXACT)


def test_what_looks_at_data_is_attached_to_the_model_that_averages_gradients(ranks):
    for rank in ranks:
        assert "make it with the model that DistributedDataParallel returns" in str(
            rank["attached_without_the_wrapper"]
        )
