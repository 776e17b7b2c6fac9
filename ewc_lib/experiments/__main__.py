"""The measured tables of the book, from the command line.

A command imports what it measures when it runs, so that help comes at once. What the help says
about other modules therefore stands here a second time.
"""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated

import typer

from ewc_lib.experiments.runs.folders import OUTPUT

if TYPE_CHECKING:
    from ewc_lib.experiments.cost.benchmarks import Benchmark
    from ewc_lib.experiments.runs.protocols import Experiment

SECTIONS = ("mlp", "cnn", "cnn-norms", "transformer", "gpt2", "linearity")
"""What ``fisher-cost`` measures."""

LARGE = ("resnet18", "gpt2-124m")
"""What it measures on an accelerator only."""

LIBRARIES = (
    "ewc_lib",
    "nngeometry",
    "BackPACK",
    "curvlinops",
    "laplace",
    "laplace (BackPACK)",
    "ASDL",
    "opacus",
    "torch.func",
    "loop",
)
"""The libraries that it compares."""

STREAMS = {
    "forgetting": "Digits, then the same with shuffled pixels: EWC, L2, plain and joint training.",
    "split-mnist": "Five tasks of two digits, in the task-, domain- and class-incremental "
    "scenario.",
    "split-chosen": "Five tasks of two digits; every method's settings chosen alike, on validation "
    "images.",
    "fisher-variants": "Task-incremental split MNIST with six importances, each over many "
    "strengths.",
    "importances": "Permuted MNIST with thirteen importances, the strength of each chosen on "
    "held-out images.",
    "permuted-mnist": "Ten tasks with permuted pixels; presets of several publications.",
    "stability": "Five permuted tasks at strengths from 0.1 to 1e12, with SGD and with Adam.",
    "split-cifar10": "Task-incremental split CIFAR-10 with six importances, norms moving or "
    "frozen.",
    "laplace-50": "Fifty permuted tasks: diagonal against Kronecker-factored precision.",
}
"""The experiments on streams of tasks, by name, and what each is about."""

PRESETS = {
    "laplace-50": ("mnist", "longer", "ten", "digits"),
    "permuted-mnist": ("small", "three-scenarios", "kirkpatrick", "zenke", "digits"),
    "split-cifar10": ("cifar10", "digits"),
}
"""The protocols of the experiments that have more than MNIST and its demonstration."""

FOLDER = "book/results in a checkout, elsewhere ./results"
"""What the help says of :data:`.OUTPUT`."""

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode="markdown")


@app.callback()
def main() -> None:
    """Measure the tables of the book again.

    Each experiment writes one JSON file, with the commit, the versions, the machine and the
    command behind its numbers. The chapters read these files.
    """


ROOMS = {"beyond-diagonal": "structures", "fine-tuning": "language", "language-models": "language"}
"""Where the experiments are that are not on streams of tasks."""


def experiment(name: str) -> Experiment:
    """Import an experiment on a stream of tasks."""
    found: Experiment = getattr(module_of(name), name.replace("-", "_").upper())
    return found


def module_of(name: str) -> ModuleType:
    """Import the module of an experiment."""
    room = ROOMS.get(name, "streams")
    return import_module(f"ewc_lib.experiments.{room}.{name.replace('-', '_')}")


@app.command(
    "fisher-cost",
    epilog=f"Sections: {', '.join(SECTIONS)}; with --device cuda also {', '.join(LARGE)}.",
)
def fisher_cost_command(
    sections: Annotated[
        list[str] | None,
        typer.Argument(metavar="SECTION", help="What to measure; by default everything."),
    ] = None,
    repetitions: Annotated[int, typer.Option(min=1, help="Runs of each contestant.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="Threads of PyTorch.")] = 2,
    device: Annotated[
        str,
        typer.Option(help="cpu or cuda; $CUDA_VISIBLE_DEVICES chooses the card."),
    ] = "cpu",
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="The folder of results.", show_default=FOLDER)
    ] = OUTPUT,
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LIBRARY",
            help="Measure only this one; may be given several times. By default all of "
            f"{', '.join(LIBRARIES)}.",
        ),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Drop what the file holds.")] = False,
    counted: Annotated[
        bool,
        typer.Option(
            "--count",
            help="Measure nothing; count the kernels that a run starts on an accelerator, in "
            "multiples of those of a plain pass, and how often it waits for a number.",
        ),
    ] = False,
    profiled: Annotated[
        tuple[str, str] | None,
        typer.Option(
            "--profile",
            metavar="MODEL KIND",
            help="Measure nothing; print where the time of one run goes. KIND is exact, sketch, "
            "sampled, empirical, or plain for the forward and backward pass.",
        ),
    ] = None,
) -> None:
    """Time and memory of the diagonal Fisher information, here and in other libraries.

    The unit of time is one plain forward and backward pass over the same data. Everything takes
    one to two hours on two cores. Each run is saved when it is done: if the command is stopped, it
    goes on where it was, unless the code or the settings have changed since.

    On a graphics card there are more data and two larger models, and it takes some minutes:
    `python -m ewc_lib.experiments fisher-cost --device cuda --repetitions 3` writes
    fisher_cost_cuda.json, with the name of the card.

    The other libraries come with `pip install 'ewc_lib[peers]'`; what is missing is reported
    and left out.

    Set OMP_WAIT_POLICY=PASSIVE in the environment. Otherwise threads that wait for each other
    burn the cores that others need, and the times mean little.
    """
    from ewc_lib.experiments.cost import counts, fisher_cost, measure, report, tables
    from ewc_lib.experiments.cost.benchmarks import benchmarks
    from ewc_lib.experiments.cost.peers import CONTESTANTS

    try:
        measure.require(device)
        models = benchmarks(device)
        if counted:
            names = sections or [name for name in models if name not in LARGE]
            typer.echo(counts.table(counts.count_all({n: _known(n, models) for n in names})))
            return
        if profiled is not None:
            model, kind = profiled
            typer.echo(measure.profile(_known(model, models), kind, threads))
            return
        if os.environ.get("OMP_WAIT_POLICY", "").upper() != "PASSIVE":
            typer.echo("Warning: OMP_WAIT_POLICY=PASSIVE is not set; times may be wrong.", err=True)
        if unknown := set(only or ()) - set(CONTESTANTS):
            raise ValueError(f"unknown {unknown}; there are {', '.join(CONTESTANTS)}")
        result = fisher_cost.fisher_cost(
            out / report.result_name(device),
            sections or (),
            device=device,
            contestants={name: CONTESTANTS[name] for name in only or CONTESTANTS},
            repetitions=repetitions,
            threads=threads,
            fresh=fresh,
        )
    except ValueError as problem:
        raise typer.BadParameter(str(problem)) from problem
    typer.echo(tables.table(result))


def _known(name: str, models: dict[str, Benchmark]) -> Benchmark:
    if name not in models:
        raise ValueError(f"unknown model {name!r}; there are {', '.join(models)}")
    return models[name]


def _setting(word: str) -> tuple[str, list[str]]:
    """Read ``name=value,value``."""
    name, equals, values = word.partition("=")
    if not (name and equals and values):
        raise ValueError(f"--only takes SETTING=VALUES, as in method=EWC,SI, got {word!r}")
    return name, values.split(",")


def _add_command(name: str, summary: str) -> None:
    def command(
        preset: Annotated[
            str | None,
            typer.Option(help="The protocol; by default the first, or digits without MNIST."),
        ] = None,
        data: Annotated[
            str | None,
            typer.Option(
                metavar="PATH", help="A local copy of the images; by default that of $EWC_DATA."
            ),
        ] = None,
        seeds: Annotated[
            int | None,
            typer.Option(min=1, help="Seeds of each row; by default 5, and 1 without MNIST."),
        ] = None,
        device: Annotated[
            str, typer.Option(help="cpu, cuda, ...; auto takes an accelerator if there is one.")
        ] = "auto",
        out: Annotated[
            Path, typer.Option(metavar="DIR", help="The folder of results.", show_default=FOLDER)
        ] = OUTPUT,
        workers: Annotated[
            int | None,
            typer.Option(min=1, help="Processes of one thread; by default one for each core."),
        ] = None,
        only: Annotated[
            list[str] | None,
            typer.Option(
                metavar="SETTING=VALUES",
                help="Do the runs with one of these values, as in --only method=EWC,SI; may be "
                "given for several settings.",
            ),
        ] = None,
        fresh: Annotated[bool, typer.Option("--fresh", help="Drop what the file holds.")] = False,
    ) -> None:
        from ewc_lib.experiments.runs import protocols, report

        try:
            result = protocols.measure(
                experiment(name),
                preset=preset,
                root=data,
                seeds=seeds,
                out=out,
                device=device,
                workers=workers,
                only=dict(_setting(word) for word in only or ()),
                fresh=fresh,
            )
        except (ValueError, FileNotFoundError) as problem:
            raise typer.BadParameter(str(problem)) from problem
        except KeyboardInterrupt:
            typer.echo("Stopped. What was finished is saved; the same command goes on.", err=True)
            raise typer.Exit(130) from None
        typer.echo(report.table(result))

    presets = f"Presets: {', '.join(PRESETS.get(name, ('mnist', 'digits')))}."
    app.command(name, help=f"{summary}\n\n{RESUMED}", epilog=presets)(command)


@app.command("overhead")
def overhead_command(
    network: Annotated[str, typer.Option(help="mlp or resnet18.")] = "mlp",
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    rounds: Annotated[int, typer.Option(min=4, help="Steps of each form.")] = 200,
    threads: Annotated[int, typer.Option(min=1, help="Threads of PyTorch.")] = 2,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="The folder of results.", show_default=FOLDER)
    ] = OUTPUT,
) -> None:
    """Time that the penalty adds to a training step, after one task and after fifty.

    Takes about a minute for the perceptron. The book shows that of the processor; other settings
    have files of their own.
    """
    from ewc_lib.experiments.cost.overhead import NETWORKS, overhead, overheads

    if network not in NETWORKS:
        raise typer.BadParameter(f"unknown network {network!r}; there are {', '.join(NETWORKS)}")
    own = "" if (network, device) == ("mlp", "cpu") else f"_{network}_{device.partition(':')[0]}"
    path = out / f"overhead{own}.json"
    result = overhead(path, network=network, device=device, rounds=rounds, threads=threads)
    for row in overheads(result):
        typer.echo(f"{row.form:10} {row.tasks:3} tasks  {row.share:+.1%} of a plain step")


@app.command("keeping")
def keeping_command(
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="The folder of results.", show_default=FOLDER)
    ] = OUTPUT,
    fresh: Annotated[bool, typer.Option("--fresh", help="Drop what the file holds.")] = False,
) -> None:
    """Memory and time to keep a task of a language model, beside a step of training.

    Takes about two minutes on one core, and eight gigabytes of memory. Each run is saved when it
    is done; the same command goes on where it was.
    """
    from ewc_lib.experiments.cost import keeping

    typer.echo(keeping.table(keeping.keeping(out / "keeping.json", fresh=fresh)))


def _add_comparison(name: str, default: int, description: str) -> None:
    """Add the command of an experiment that needs no images from elsewhere."""

    def command(
        seeds: Annotated[int, typer.Option(min=2, help="Seeds of each row.")] = default,
        out: Annotated[
            Path, typer.Option(metavar="DIR", help="The folder of results.", show_default=FOLDER)
        ] = OUTPUT,
        workers: Annotated[int, typer.Option(min=1, help="Processes of one thread.")] = 1,
        fresh: Annotated[bool, typer.Option("--fresh", help="Drop what the file holds.")] = False,
    ) -> None:

        module = module_of(name)
        path = out / f"{name.replace('-', '_')}.json"
        try:
            result = module.comparison(path, seeds=seeds, workers=workers, fresh=fresh)
        except ValueError as problem:
            raise typer.BadParameter(str(problem)) from problem
        typer.echo(module.table(result))

    saved = "Each run is saved when it is done; the same command goes on where it was."
    app.command(name, help=f"{description} {saved}")(command)


_add_comparison(
    "beyond-diagonal",
    10,
    "Two tasks of digits with every structure of the Fisher information, over many strengths, and "
    "what predicts forgetting.\n\nTakes about a quarter of an hour on one core.",
)
_add_comparison(
    "language-models",
    5,
    "A small language model learns documentation, then source code: fourteen ways to keep the "
    "first, among them EWC, averages of weights, replay and adapters, chosen alike.\n\nTakes about "
    "half an hour on one core.",
)
_add_comparison(
    "fine-tuning",
    3,
    "What keeps an old task while a new one is learned: learning rate, early stopping, averaging, "
    "L2, replay and EWC, on digits and on texts, chosen alike.\n\nTakes about a quarter of an "
    "hour on one core.",
)

RESUMED = (
    "Each run is saved when it is done. If the command is stopped, the same command goes on where "
    "it was. A bar shows how long it still takes; without MNIST, a demonstration on small images "
    "takes less than a minute, and its results are marked as such."
)

for _name, _summary in STREAMS.items():
    _add_command(_name, _summary)


if __name__ == "__main__":
    app()
