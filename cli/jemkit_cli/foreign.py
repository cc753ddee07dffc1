"""`jemkit import` and `jemkit export`: published weights in, model folders out."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from jemkit_cli.terminal import NoPlugins, guarded, installed_parts, say, say_json

Json = Annotated[bool, typer.Option("--json", help="One line of JSON: what was written.")]


@guarded
def import_model(
    path: Annotated[
        Path,
        typer.Argument(
            help="A published checkpoint, .pt, .pth or .safetensors.",
            metavar="CHECKPOINT", show_default=False,
        ),
    ],
    format: Annotated[
        Literal["auto", "jem", "jempp", "sadajem", "mebm", "ebjdat", "wrn"],
        typer.Option(help="Format of the parameter names; auto detects it."),
    ] = "auto",
    dataset: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Its data set; by its classes, cifar10 or cifar100.",
            show_default=False,
        ),
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Folder of the data set's files.", show_default=False),
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="The state dict to read, if the file has several.",
            show_default=False,
        ),
    ] = None,
    norm: Annotated[
        Literal["instance"] | None,
        typer.Option(
            help="If names do not distinguish instance and layer norm.", show_default=False
        ),
    ] = None,
    sha256: Annotated[
        str | None,
        typer.Option(metavar="HEX", help="Required SHA-256 of the file.", show_default=False),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="K=V", help="Any option of the recipe, e.g. data.size=64.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder to write; CHECKPOINT-imported by default.", show_default=False),
    ] = None,
    no_plugins: NoPlugins = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Convert published weights to a model folder, without executing any code in the file."""
    registry = installed_parts(third_party=not no_plugins)
    from jemkit.training.pretrained import import_checkpoint

    data = {"use": dataset, "dir": None if data_dir is None else str(data_dir)}
    imported = import_checkpoint(
        path, format, registry, dataset={k: v for k, v in data.items() if v is not None},
        norm=norm, key=key, out=out, sha256=sha256, overrides=overrides or (),
    )  # fmt: skip
    if as_json:
        say_json({**imported._asdict(), "folder": str(imported.folder)})
        return
    say(f"model {imported.folder}, sha256 {imported.sha256}")
    say(f"{imported.network} in {imported.backbone}, on {imported.dataset}")
    for note in imported.notes:
        say(note)
    say(imported.energy)
    if imported.left_out:
        say(f"left out: {', '.join(imported.left_out)}")
    say(f"evaluate it with `jemkit evaluate {imported.folder}`")


@guarded
def export_model(
    run: Annotated[
        Path, typer.Argument(help="A run of `jemkit train`.", metavar="[RUN]")
    ] = Path("runs/latest"),
    out: Annotated[
        Path | None,
        typer.Option(help="Folder to write; RUN/export by default.", show_default=False),
    ] = None,
    checkpoint: Annotated[
        Literal["best", "last"], typer.Option(help="Checkpoint of the run.")
    ] = "best",
    license: Annotated[
        str, typer.Option(metavar="ID", help="License of the weights, e.g. cc-by-4.0.")
    ] = "unknown",
    moments: Annotated[
        bool,
        typer.Option(
            " /--no-moments", show_default=False,
            help="Omit moments.safetensors; sampling then needs the training images.",
        ),
    ] = True,
    push: Annotated[
        str | None,
        typer.Option(
            metavar="REPO", help="Upload it to this repository of the Hugging Face hub.",
            show_default=False,
        ),
    ] = None,
    no_plugins: NoPlugins = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Export a run's model: config.json, model.safetensors, a model card."""
    registry = installed_parts(third_party=not no_plugins)
    from jemkit.evaluation import export
    from jemkit.training import model_folder

    exported = export.export(
        run, out=out, which=checkpoint, registry=registry, license=license, moments=moments
    )  # fmt: skip
    where = model_folder.push(exported.folder, push) if push is not None else None
    if as_json:
        say_json({**exported._asdict(), "folder": str(exported.folder), "pushed": where})
        return
    say(f"model {exported.folder}, sha256 {exported.sha256}")
    say(f"checkpoint {exported.checkpoint}, {exported.weights} weights")
    say(exported.note or f"its card has {exported.figures} figures")
    if where is not None:
        say(f"pushed to {where}")
