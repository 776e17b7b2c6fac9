import pytest

from ewc_lib.experiments.cost.benchmarks import BENCHMARKS
from ewc_lib.experiments.cost.executed import work_of
from ewc_lib.experiments.cost.forecast import (
    CARDS,
    H100,
    PROCESSOR,
    checks,
    diagonal_seconds,
    forecast,
    numbers_of,
    observations_needed,
    plain_seconds,
)
from ewc_lib.experiments.cost.model import SHAPES, Shape
from ewc_lib.experiments.cost.report import Measured

IDEAL = H100._replace(peak_of_squares=H100.peak, bandwidth=float("inf"), link=float("inf"))


@pytest.mark.parametrize("columns", [1, 9])
def test_without_memory_and_links_a_forecast_is_the_count(columns):
    shape = SHAPES["GPT-2"]
    found = forecast(shape, IDEAL, observations=100, columns=columns)
    work = shape.work
    assert found.passes == pytest.approx(work._replace(squares=0).ratio(columns))
    flops = 2 * work._replace(squares=0).diagonal(columns) * 100
    assert found.seconds == pytest.approx(flops / (H100.utilisation * H100.peak))


@pytest.mark.claim("eq-forecast")
def test_a_forecast_is_the_sum_of_passes_products_memory_and_link():
    shape, machine = SHAPES["GPT-2"], H100
    work, speed = shape.work, machine.utilisation
    each = 2 * (work.forward + 3 * work.backward) / (speed * machine.peak)
    each += 2 * (3 * work.shared + work.single) / (speed * machine.peak_of_squares)
    each += 16 * 3 * work.squares / machine.bandwidth
    expected = 100 / 4 * each + 3 / 4 * 8 * shape.parameters / machine.link
    found = forecast(shape, machine, observations=100, ranks=4, columns=3)
    assert found.seconds == pytest.approx(expected)


def test_products_in_float32_and_their_squares_cost_extra():
    shape = SHAPES["GPT-2"]
    ideal = forecast(shape, IDEAL, observations=100, columns=3).seconds
    slower = forecast(
        shape, IDEAL._replace(peak_of_squares=H100.peak / 2), observations=100, columns=3
    )
    products = 2 * 3 * shape.work.shared * 100 / (H100.utilisation * H100.peak)
    assert slower.seconds - ideal == pytest.approx(products)
    moving = forecast(shape, IDEAL._replace(bandwidth=1e12), observations=100, columns=3)
    assert moving.seconds - ideal == pytest.approx(3 * 100 * 16 * shape.work.squares / 1e12)


def test_ranks_share_the_work_and_send_their_results_once():
    shape = SHAPES["GPT-2"]
    alone = forecast(shape, observations=100)
    together = forecast(shape, observations=100, ranks=4)
    assert alone.communication == 0
    assert together.communication == pytest.approx(3 / 4 * 8 * shape.parameters / H100.link)
    assert together.seconds == pytest.approx(alone.seconds / 4 + together.communication)
    assert together.memory == alone.memory == 10 * shape.parameters
    plain = alone.seconds / alone.passes / 4
    assert together.passes == pytest.approx(together.seconds / plain)
    assert together.of_training / alone.of_training == pytest.approx(together.passes / alone.passes)


def test_columns_share_the_products_of_single_positions():
    shape = Shape(layers=2, width=64, vocabulary=100, length=1)
    assert shape.work.shared == 0
    found = forecast(shape, IDEAL, observations=100, columns=3)
    assert found.passes == pytest.approx(shape.work._replace(squares=0).ratio(3))


def test_the_share_of_training_is_that_of_the_tokens():
    shape = SHAPES["GPT-2 XL"]
    found = forecast(shape, IDEAL, observations=100)
    tokens = 100 * shape.length / (20 * shape.parameters)
    assert found.of_training == pytest.approx(found.passes * tokens)


def test_observations_follow_from_the_errors_of_images_and_sketches():
    assert observations_needed(0.1) == pytest.approx(300)
    assert observations_needed(0.1, draws=2) == pytest.approx(200)
    assert observations_needed(0.05, effective=0.5) == pytest.approx(2400)


def test_a_check_compares_passes_of_this_package_with_those_of_its_own_columns():
    works = {"cnn": work_of(BENCHMARKS["cnn"])}
    work, columns = works["cnn"]
    rows = [
        Measured("cnn", "ewc_lib", "sketch", 100, passes=2.0),
        Measured("cnn", "ewc_lib", "exact", 100, passes=8.0),
        Measured("cnn", "loop", "exact", 100, passes=300.0),
        Measured("cnn", "ewc_lib", "sampled", reason="no time"),
        Measured("vgg", "ewc_lib", "sketch", 100, passes=2.0),
    ]
    one, all_columns = checks(rows, works, IDEAL)
    assert one == ("cnn", "sketch", pytest.approx(work._replace(squares=0).ratio()), 2.0)
    exact = work._replace(squares=0).ratio(columns)
    assert all_columns == ("cnn", "exact", pytest.approx(exact), 8.0)
    assert one.ratio == pytest.approx(one.forecast / 2)


@pytest.mark.parametrize("machine", [*CARDS.values(), PROCESSOR], ids=lambda machine: machine.name)
def test_in_single_precision_all_products_have_the_same_speed(machine):
    work = SHAPES["GPT-2"].work._replace(squares=0)
    passes = diagonal_seconds(work, machine, 3) / plain_seconds(work, machine)
    assert passes == pytest.approx(work.ratio(3))


def test_squares_cost_nothing_in_a_cache_and_the_less_the_more_bandwidth():
    work = SHAPES["GPT-2"].work
    one, two, cached = (
        diagonal_seconds(work, machine) / plain_seconds(work, machine)
        for machine in (CARDS["H100"], CARDS["H200"], PROCESSOR)
    )
    assert one > two > cached == pytest.approx(work._replace(squares=0).ratio())


def test_a_device_of_which_nothing_is_known_has_no_numbers():
    assert numbers_of("NVIDIA H200") == CARDS["H200"]
    assert numbers_of("AMD EPYC, 2 threads") is None
