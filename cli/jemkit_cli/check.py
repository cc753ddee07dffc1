"""`jemkit check`: what a model takes, and whether it can be evaluated."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from jemkit_cli.doctor import show_checks
from jemkit_cli.selection import Mean, Std, Weights, WeightsKey, preparation
from jemkit_cli.terminal import NoPlugins, guarded, installed_parts, say, say_json


@guarded
def check(
    model: Annotated[
        Path,
        typer.Argument(
            help="A run, a checkpoint folder, an exported model, a .safetensors file, or Python "
            "code that builds a torch module, my.py:build.",
            metavar="MODEL", show_default=False,
        ),
    ],
    weights: Weights = None,
    key: WeightsKey = None,
    mean: Mean = None,
    std: Std = None,
    network: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Network of a .safetensors file, e.g. wrn-28-10.",
            show_default=False,
        ),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Another data set than that of the run.", show_default=False
        ),
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder of the data set's files.", show_default=False)
    ] = None,
    download: Annotated[
        bool, typer.Option("--download", help="Download the data set if it is missing.")
    ] = False,
    eps_px: Annotated[
        float | None,
        typer.Option(
            help="The radius in 1/255, 8 for 8/255; the data set's by default.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="Device to run on.")
    ] = "auto",
    no_plugins: NoPlugins = False,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="One line of JSON: the input, the checks, whether all passed."),
    ] = False,
) -> None:  # fmt: skip
    """Show a model's input and radius; check its logits and gradients; exit code 1 on a failure.

    my.py:build is run as Python code, with all rights that you have; its weights are not.
    """
    registry = installed_parts(third_party=not no_plugins)
    from jemkit.evaluation.subjects import subject_at
    from jemkit.runtime.precision import device_of
    from jemkit.testing.doctor import healthy
    from jemkit.testing.model_check import check_model

    data = {"use": dataset, "dir": data_dir and str(data_dir), "download": download or None}
    target = subject_at(
        model, registry, device_of(device), network=network,
        dataset={k: v for k, v in data.items() if v is not None} or None,
        preparation=preparation(weights, key, mean, std),
    )  # fmt: skip
    report = check_model(target, eps_px)
    well = healthy(report.checks)
    if as_json:
        checks = [one._asdict() for one in report.checks]
        say_json({"ok": well, "model": target.about, "input": report.input, "checks": checks})
    else:
        say(str(model))
        show_checks(report.checks)
    if not well:
        raise typer.Exit(1)
