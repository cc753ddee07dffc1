"""`jemkit fid-stats`: statistics of a data set, to which FID compares samples."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from jemkit_cli.progress import tracking
from jemkit_cli.terminal import NoPlugins, guarded, installed_parts, say, say_json, stopping


@guarded
def fid_stats(
    dataset: Annotated[str, typer.Argument(help="A data set, e.g. cifar10.", metavar="DATASET")],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="File to write.", show_default=False)
    ],
    split: Annotated[
        Literal["train", "test"],
        typer.Option(help="Split; train includes the validation images."),
    ] = "train",
    max_images: Annotated[
        int | None,
        typer.Option(min=2, help="Size of a subset stratified by class; all by default.",
                     show_default=False),
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder of the data set's files.", show_default=False)
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="An option of the data set: data.size=16.",
                     show_default=False),
    ] = None,
    inception: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Its weights; else those in torch's cache or of a package.",
            show_default=False,
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images in a forward pass.")] = 100,
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="Device to run on.")
    ] = "auto",
    no_plugins: NoPlugins = False,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON.")] = False,
) -> None:  # fmt: skip
    """Compute Inception's mean and covariance of a data set once, for `generation.statistics`.

    An interrupted computation continues with the same command.
    """
    registry = installed_parts(third_party=not no_plugins)
    from jemkit.config.recipe import resolve
    from jemkit.runtime.precision import device_of
    from jemkit.selection import part_of

    given = {"use": dataset, **({"dir": str(data_dir)} if data_dir else {})}
    data = resolve(registry, overrides=overrides or (), named={"data": given}).recipe.data
    images = data.load(split)
    part = part_of(images, max_images or len(images.y))
    described = {"dataset": dataset, "split": split, "selection": part.text}
    evaluator: Any = registry["evaluator"]["generation"]
    with tracking(silent=as_json) as progress, stopping() as stop:
        about = evaluator.write_statistics(
            part.images, out, described, inception=inception, device=device_of(device),
            batch_size=batch_size, progress=progress, stop=stop,
        )  # fmt: skip
    if as_json:
        say_json({**about, "file": str(out)})
        return
    say(f"{about['count']} images of {dataset} ({split}, {part.text}), SHA-256 {about['sha256']}")
    weights = about["features"]
    say(f"features {weights['extractor']}, {weights['weights']}, SHA-256 {weights['sha256']}")
    say(f"statistics {out}")
