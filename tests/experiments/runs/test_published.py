from ewc_lib.experiments import __main__ as command
from ewc_lib.experiments.runs.protocols import METHODS
from ewc_lib.experiments.runs.published import PUBLISHED, published
from ewc_lib.experiments.streams.fisher_variants import VARIANTS
from ewc_lib.experiments.streams.permuted_mnist import PERMUTED_MNIST


def test_published_rows_are_rows_of_ours():
    assert {p.experiment.split()[0] for p in PUBLISHED} <= command.STREAMS.keys()
    scenarios = {"task", "domain", "class"}
    arg_max = PERMUTED_MNIST.protocols["three-scenarios"]["methods"]
    for p in PUBLISHED:
        first, _, rest = p.row.partition(" ")
        method = rest if first in scenarios else p.row
        assert method in {*METHODS, *VARIANTS, *arg_max}
        assert 0 < p.value < 100


def test_a_number_is_found_by_its_experiment_and_row():
    assert published("split-mnist", "task EWC").error == 0.15
    assert published("split-mnist", "task MAS") is None
    keys = [(p.experiment, p.row) for p in PUBLISHED]
    assert len(set(keys)) == len(keys)
