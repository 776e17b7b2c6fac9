"""The measured tables of the book, from the command line."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

from ewc_lib.experiments import beyond_diagonal, language_models, report
from ewc_lib.experiments.cost_report import RESULT, table
from ewc_lib.experiments.fisher_cost import fisher_cost, profile
from ewc_lib.experiments.fisher_variants import FISHER_VARIANTS
from ewc_lib.experiments.folders import OUTPUT
from ewc_lib.experiments.laplace_50 import LAPLACE_50
from ewc_lib.experiments.models import BENCHMARKS
from ewc_lib.experiments.overhead import overhead, overheads
from ewc_lib.experiments.peers import CONTESTANTS
from ewc_lib.experiments.permuted_mnist import PERMUTED_MNIST
from ewc_lib.experiments.protocols import Experiment, measure
from ewc_lib.experiments.split_mnist import SPLIT_MNIST
from ewc_lib.experiments.stability import STABILITY

EXPERIMENTS = (SPLIT_MNIST, FISHER_VARIANTS, PERMUTED_MNIST, STABILITY, LAPLACE_50)
"""All experiments on streams of tasks."""

FOLDER = "book/results in a checkout, elsewhere ./results"
"""What the help says of :data:`.OUTPUT`."""

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode="markdown")


@app.callback()
def main() -> None:
    """Measure the tables of the book again.

    Each experiment writes one JSON file, with the commit, the versions, the machine and the
    command behind its numbers. The chapters read these files.
    """


@app.command("fisher-cost", epilog=f"Sections: {', '.join(BENCHMARKS)}, linearity.")
def fisher_cost_command(
    sections: Annotated[
        list[str] | None,
        typer.Argument(metavar="SECTION", help="What to measure; by default everything."),
    ] = None,
    repetitions: Annotated[int, typer.Option(min=1, help="Runs of each contestant.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="Threads of PyTorch.")] = 2,
    output: Annotated[
        Path, typer.Option(help="The file to write.", show_default=f"{RESULT.name} in {FOLDER}")
    ] = OUTPUT / RESULT.name,
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LIBRARY",
            help="Measure only this one; may be given several times. By default all of "
            f"{', '.join(CONTESTANTS)}.",
        ),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Drop what the file holds.")] = False,
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
    one to two hours on two cores. Each section is saved when it is done: if the run is stopped, the
    same command goes on where it was, unless the code or the settings have changed since.

    The other libraries come with `pip install 'ewc_lib[peers]'`; what is missing is reported
    and left out.

    Set OMP_WAIT_POLICY=PASSIVE in the environment. Otherwise threads that wait for each other
    burn the cores that others need, and the times mean little.
    """
    try:
        if profiled is not None:
            model, kind = profiled
            if model not in BENCHMARKS:
                raise ValueError(f"unknown model {model!r}; there are {', '.join(BENCHMARKS)}")
            typer.echo(profile(BENCHMARKS[model], kind, threads))
            return
        if os.environ.get("OMP_WAIT_POLICY", "").upper() != "PASSIVE":
            typer.echo("Warning: OMP_WAIT_POLICY=PASSIVE is not set; times may be wrong.", err=True)
        if unknown := set(only or ()) - set(CONTESTANTS):
            raise ValueError(f"unknown {unknown}; there are {', '.join(CONTESTANTS)}")
        result = fisher_cost(
            output,
            sections or (),
            contestants={name: CONTESTANTS[name] for name in only or CONTESTANTS},
            repetitions=repetitions,
            threads=threads,
            fresh=fresh,
        )
    except ValueError as problem:
        raise typer.BadParameter(str(problem)) from problem
    typer.echo(table(result))


def _add_command(experiment: Experiment) -> None:
    def command(
        preset: Annotated[
            str | None,
            typer.Option(help="The protocol; by default the first, or digits without MNIST."),
        ] = None,
        data: Annotated[
            str | None,
            typer.Option(
                metavar="PATH", help="A local copy of MNIST; by default that of $EWC_DATA."
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
        fresh: Annotated[bool, typer.Option("--fresh", help="Drop what the file holds.")] = False,
    ) -> None:
        try:
            result = measure(
                experiment,
                preset=preset,
                root=data,
                seeds=seeds,
                out=out,
                device=device,
                workers=workers,
                fresh=fresh,
            )
        except (ValueError, FileNotFoundError) as problem:
            raise typer.BadParameter(str(problem)) from problem
        except KeyboardInterrupt:
            typer.echo("Stopped. What was finished is saved; the same command goes on.", err=True)
            raise typer.Exit(130) from None
        typer.echo(report.table(result))

    presets = f"Presets: {', '.join(experiment.protocols)}."
    app.command(experiment.name, help=f"{experiment.summary}\n\n{RESUMED}", epilog=presets)(command)


@app.command("overhead")
def overhead_command(
    rounds: Annotated[int, typer.Option(min=4, help="Steps of each form.")] = 200,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="The folder of results.", show_default=FOLDER)
    ] = OUTPUT,
) -> None:
    """Time that the penalty adds to a training step, after one task and after fifty.

    Takes about a minute on one core.
    """
    for row in overheads(overhead(out / "overhead.json", rounds=rounds)):
        typer.echo(f"{row.form:10} {row.tasks:3} tasks  {row.share:+.1%} of a plain step")


def _add_comparison(name: str, module: ModuleType, default: int, description: str) -> None:
    """Add the command of an experiment that needs no images from elsewhere."""

    def command(
        seeds: Annotated[int, typer.Option(min=2, help="Seeds of each row.")] = default,
        out: Annotated[
            Path, typer.Option(metavar="DIR", help="The folder of results.", show_default=FOLDER)
        ] = OUTPUT,
        workers: Annotated[int, typer.Option(min=1, help="Processes of one thread.")] = 1,
        fresh: Annotated[bool, typer.Option("--fresh", help="Drop what the file holds.")] = False,
    ) -> None:
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
    beyond_diagonal,
    10,
    "Two tasks of digits with every structure of the Fisher information, over many strengths.\n\n"
    "Takes about half an hour on one core.",
)
_add_comparison(
    "language-models",
    language_models,
    3,
    "A small language model learns documentation, then source code, with and without penalties "
    "and adapters.\n\nTakes about an hour on one core.",
)

RESUMED = (
    "Each run is saved when it is done. If the command is stopped, the same command goes on where "
    "it was. A bar shows how long it still takes; without MNIST, a demonstration on small images "
    "takes less than a minute, and its results are marked as such."
)

for _experiment in EXPERIMENTS:
    _add_command(_experiment)


if __name__ == "__main__":
    app()
