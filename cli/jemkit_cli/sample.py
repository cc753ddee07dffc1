"""`jemkit sample`: images from a trained run."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from jemkit_cli.progress import tracking
from jemkit_cli.terminal import NoPlugins, guarded, installed_parts, say, say_json, stopping

if TYPE_CHECKING:
    from jemkit.evaluation.sample import Samples


@guarded
def sample(
    run: Annotated[
        Path, typer.Argument(help="The folder of a run or an exported model.", metavar="[RUN]")
    ] = Path("runs/latest"),
    n: Annotated[int, typer.Option("--n", "-n", help="How many images.")] = 100,
    steps: Annotated[
        int | None, typer.Option(help="Steps of each chain; 40 by default.", show_default=False)
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Initial distribution of the chains; the backbone's by default.",
            show_default=False,
        ),
    ] = None,
    source: Annotated[
        Literal["chains", "buffer"], typer.Option("--from", help="New chains, or buffer states.")
    ] = "chains",
    classes: Annotated[
        list[str] | None,
        typer.Option(
            "--class", metavar="K", help="Chains of this class, by number or name; repeatable.",
            show_default=False,
        ),
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the training images, for a start that needs them.",
            show_default=False,
        ),
    ] = None,
    download: Annotated[
        bool, typer.Option("--download", help="Download those images if they are missing.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the chains.")] = 0,
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="Device to run on.")
    ] = "auto",
    checkpoint: Annotated[
        Literal["best", "last"], typer.Option(help="Checkpoint of the run.")
    ] = "best",
    out: Annotated[
        Path | None,
        typer.Option(help="Folder to write to; the run's samples/ by default.", show_default=False),
    ] = None,
    no_plugins: NoPlugins = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One line of JSON: the files and the protocol.")
    ] = False,
) -> None:  # fmt: skip
    """Draw images from a run or an exported model: a PNG grid and an .npz, with their protocol."""
    data = {"dir": data_dir and str(data_dir), "download": download or None}
    wanted = {
        "n": n, "steps": steps, "start": start, "source": source, "classes": classes, "seed": seed,
        "device": device, "which": checkpoint,
        "dataset": {k: v for k, v in data.items() if v is not None} or None,
    }  # fmt: skip
    samples = _draw(run, wanted, out, third_party=not no_plugins, silent=as_json)
    if samples is None:  # rank 0 writes the output
        return
    from jemkit.evaluation.sample import save

    png, npz = save(samples, out)
    if as_json:
        say_json({"png": str(png), "npz": str(npz), "protocol": samples.protocol})
        return
    say(f"grid {png}")
    say(f"images {npz}")
    for name, value in samples.protocol.items():
        inner = value.items() if isinstance(value, dict) else ()
        say(f"  {name}: {', '.join(f'{key} {each}' for key, each in inner) or value}")


def _draw(
    run: Path, wanted: dict[str, Any], out: Path | None, *, third_party: bool, silent: bool
) -> "Samples | None":
    registry = installed_parts(third_party=third_party)
    from jemkit.evaluation.sample import draw_samples, place, sample_request
    from jemkit.runtime import distributed
    from jemkit.runtime.precision import device_of

    with distributed.group(device_of(wanted["device"]).type):
        me = distributed.shard()
        request = distributed.prepared(lambda: sample_request(run, registry=registry, **wanted))
        with stopping() as stop, tracking(silent=silent or me.rank > 0) as progress:
            distributed.barrier()  # from here on every process can be stopped
            reporting = {"progress": progress} if progress else {}
            work = place(request.protocol, out) / ".drawing"
            samples = draw_samples(request, work=work, shard=me, stop=stop, **reporting)
    return None if me.rank else samples
