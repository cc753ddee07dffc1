"""`jemkit evaluate`: the figures of a model, with their protocols."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from jemkit_cli.progress import tracking
from jemkit_cli.results import show_record
from jemkit_cli.selection import Mean, Std, Weights, WeightsKey, preparation
from jemkit_cli.terminal import NoPlugins, guarded, installed_parts, say_json, stopping

if TYPE_CHECKING:
    from jemkit.config.eval_settings import Settings
    from jemkit.config.registry import Registry
    from jemkit.evaluation.subjects import EvalTarget
    from jemkit.metrics.record_file import Record


def _option(name: str, text: str, panel: str, metavar: str | None = None) -> Any:
    return typer.Option(name, help=text, metavar=metavar, rich_help_panel=panel, show_default=False)


WHAT, HOW, WHERE = "What is measured", "How", "On what"
BY_INDICATORS = {"full": ["robustness.indicators=full"], "off": ["robustness.indicators=false"]}


@guarded
def evaluate(
    run: Annotated[
        Path,
        typer.Argument(
            help="A run, a checkpoint folder, an exported model, a .safetensors file, or Python "
            "code that builds a torch module, my.py:build.",
            metavar="[RUN]",
        ),
    ] = Path("runs/latest"),
    attack: Annotated[
        list[str] | None,
        _option("--attack", "An attack; repeatable. pgd and aa by default.", WHAT, "NAME"),
    ] = None,
    only: Annotated[
        list[str] | None, _option("--only", "Only this evaluator; repeatable.", WHAT, "NAME")
    ] = None,
    skip: Annotated[
        list[str] | None, _option("--skip", "All except this evaluator; repeatable.", WHAT, "NAME")
    ] = None,
    eps_px: Annotated[
        float | None,
        _option("--eps-px", "The radius in 1/255, 8 for 8/255; the data set's by default.", HOW),
    ] = None,
    norm: Annotated[
        Literal["Linf", "L2", "L1"], typer.Option(help="Norm of the radius.", rich_help_panel=HOW)
    ] = "Linf",
    max_images: Annotated[
        int | None,
        _option("--max-images", "Size of a subset stratified by class; all by default.", HOW),
    ] = None,
    selection: Annotated[
        Literal["stratified", "first"],
        typer.Option(
            help="For --max-images and --quick: stratified by class, or the first images.",
            rich_help_panel=HOW,
        ),
    ] = "stratified",
    batch_size: Annotated[
        int, typer.Option(help="Batch size of attacks.", rich_help_panel=HOW)
    ] = 250,
    seed: Annotated[
        int, typer.Option(help="Seed of all random generators.", rich_help_panel=HOW)
    ] = 0,
    protocol: Annotated[
        Literal["standard", "released"],
        typer.Option(help="released: as in EB-JDAT's released evaluation.", rich_help_panel=HOW),
    ] = "standard",
    quick: Annotated[
        bool, typer.Option("--quick", help="Evaluate on few images.", rich_help_panel=HOW)
    ] = False,
    refine_steps: Annotated[
        int, typer.Option(help="SGLD steps from each image (JEM-k).", rich_help_panel=HOW)
    ] = 0,
    overrides: Annotated[
        list[str] | None,
        _option("--set", "An option of an attack or evaluator, e.g. pgd.steps=50.", HOW, "K=V"),
    ] = None,
    indicators: Annotated[
        Literal["bounded", "full", "off"],
        typer.Option(
            help="Failure indicators: as many as cost no more than the attacks, all, or none.",
            rich_help_panel=HOW,
        ),
    ] = "bounded",
    checkpoint: Annotated[
        Literal["best", "last"], typer.Option(help="Checkpoint of a run.", rich_help_panel=WHERE)
    ] = "best",
    network: Annotated[
        str | None,
        _option("--network", "Network of a .safetensors file, e.g. wrn-28-10.", WHERE, "NAME"),
    ] = None,
    weights: Weights = None,
    key: WeightsKey = None,
    mean: Mean = None,
    std: Std = None,
    dataset: Annotated[
        str | None, _option("--dataset", "Another data set than that of the run.", WHERE, "NAME")
    ] = None,
    data_dir: Annotated[
        Path | None, _option("--data-dir", "Folder of the data set's files.", WHERE)
    ] = None,
    download: Annotated[
        bool, _option("--download", "Download the data set if it is missing.", WHERE)
    ] = False,
    device: Annotated[
        Literal["auto", "cpu", "cuda"],
        typer.Option(help="Device to run on.", rich_help_panel=WHERE),
    ] = "auto",
    out: Annotated[
        Path | None, _option("--out", "Folder of the record; the run's by default.", WHERE)
    ] = None,
    save_adversarial: Annotated[
        bool, typer.Option("--save-adversarial", help="Save the attacked images.")
    ] = False,
    no_plugins: NoPlugins = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the record as one line of JSON.")
    ] = False,
) -> None:
    """Evaluate a model: accuracy, robustness, energies, calibration, OOD, generation.

    my.py:build is run as Python code, with all rights that you have; its weights are not.
    """
    wanted, options = requested({
        "attack": attack, "norm": norm, "eps_px": eps_px, "max_images": max_images,
        "batch_size": batch_size, "seed": seed, "protocol": protocol, "quick": quick,
        "refine_steps": refine_steps, "only": only, "skip": skip, "selection": selection,
        "overrides": overrides, "indicators": indicators,
    })  # fmt: skip
    data = {"use": dataset, "dir": data_dir and str(data_dir), "download": download or None}
    given = {k: v for k, v in data.items() if v is not None}
    where = {
        "subject": {
            "which": checkpoint,
            "network": network,
            "dataset": given or None,
            "preparation": preparation(weights, key, mean, std),
        },
        "device": device,
        "out": out,
    }
    record = _judged(
        run, wanted, options, where, third_party=not no_plugins,
        keep_adversarial=save_adversarial, silent=as_json,
    )  # fmt: skip
    if record is None:  # rank 0 writes the output
        return
    if as_json:
        say_json(record.to_json())
    else:
        show_record(record)


def requested(given: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """What these parameters of the command request: settings, and options of attacks and evaluators
    as texts."""
    from jemkit.config.eval_settings import Settings

    wanted = {name: given[name] for name in Settings.model_fields if name in given}
    wanted |= {"attacks": given["attack"] or (), **{k: given[k] or () for k in ("only", "skip")}}
    return wanted, [*(given["overrides"] or []), *BY_INDICATORS.get(given["indicators"], [])]


def _judged(
    run: Path,
    wanted: dict[str, Any],
    overrides: list[str],
    where: dict[str, Any],
    *,
    third_party: bool,
    keep_adversarial: bool,
    silent: bool,
) -> "Record | None":
    registry = installed_parts(third_party=third_party)
    from jemkit.evaluation.evaluate import judge
    from jemkit.runtime import distributed
    from jemkit.runtime.precision import device_of

    with distributed.group(device_of(where["device"]).type):
        me = distributed.shard()
        subject, settings = distributed.prepared(
            lambda: _prepared(registry, run, wanted, overrides, where)
        )
        subject = _agreed(subject)
        with (
            tracking(silent=silent or me.rank > 0) as progress,
            stopping() as stop,
        ):
            distributed.barrier()  # from here on every process can be stopped
            record = judge(
                subject, settings, registry, shard=me, progress=progress, stop=stop,
                keep_adversarial=keep_adversarial,
            )  # fmt: skip
    return None if me.rank else record


def _agreed(subject: "EvalTarget") -> "EvalTarget":
    """The model with rank 0's hash, by which processes share work; MisfitError if models differ.

    What cannot be hashed has a random hash in each process; its weights are compared.
    """
    from jemkit.attacks.pixel_model import weights_hash
    from jemkit.errors import MisfitError
    from jemkit.runtime import distributed

    about = subject.about
    if distributed.shard().size == 1:
        return subject
    code = "" if "identity" in about else about["sha256"]
    models = distributed.gather({"code": code, "weights": weights_hash(subject.model)})

    def check() -> str:
        if differing := sum(model != models[0] for model in models):
            raise MisfitError(
                f"{differing} of the processes built another model than the first: its code may "
                "draw from a generator that torch.manual_seed does not seed, such as numpy's, or "
                "keep something of its process, such as a device. Or evaluate in one process"
            )
        return str(about["sha256"])

    return subject._replace(about={**about, "sha256": distributed.on_rank_zero(check)})


def _prepared(
    registry: "Registry",
    run: Path,
    wanted: dict[str, Any],
    overrides: list[str],
    where: dict[str, Any],
) -> "tuple[EvalTarget, Settings]":
    """The model and the settings; errors are raised before any slow work."""
    from jemkit.config.eval_settings import options_of, settings_of
    from jemkit.evaluation.subjects import subject_at
    from jemkit.runtime.precision import device_of

    settings = settings_of({**wanted, "options": options_of(overrides)})
    subject = subject_at(run, registry, device_of(where["device"]), **where["subject"])
    if where["out"] is not None:
        subject = subject._replace(folder=where["out"])
    return subject, settings
