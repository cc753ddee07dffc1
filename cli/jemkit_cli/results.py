"""How a run ended: as a table to read, or as a record for scripts."""

from typing import TYPE_CHECKING, Any

from jemkit_cli.terminal import say, show_table

if TYPE_CHECKING:
    from jemkit.evaluation import Figure
    from jemkit.recipe import Resolved
    from jemkit.training import Summary

TITLES = {
    "clean": "clean accuracy",
    "pgd20": "PGD-20 accuracy",
    "gap_mean": "energy gap, mean |E(x~) - E(x)|",
    "gap_variance": "energy gap, variance",
    "gap_signed": "energy gap, signed mean",
    "gap_joint": "energy gap of E(x, y), signed mean",
    "gap_relative": "energy gap, mean / std E(x)",
}


def record(summary: "Summary", resolved: "Resolved") -> dict[str, Any]:
    """What scripts may rely on."""
    robust = next(figure for figure in summary.figures if figure.name == "pgd20")
    return {
        "run": str(summary.run),
        "backbone": resolved.tables["backbone"]["use"],
        "objective": resolved.tables["objective"]["use"],
        "dataset": resolved.tables["data"]["use"],
        "seed": resolved.recipe.run.seed,
        "epochs": summary.epochs,
        "seconds": summary.seconds,
        "clean_accuracy": summary.value("clean"),
        "pgd_accuracy": robust.value,
        "radius_px": robust.protocol["radius_px"],
        "energy_gap_mean": summary.value("gap_mean"),
        "energy_gap_variance": summary.value("gap_variance"),
        "energy_gap_relative": summary.value("gap_relative"),
    }


def show(summary: "Summary") -> None:
    """Every figure with its protocol, and where the run is."""
    rows, above = [], ""
    for figure in summary.figures:
        told = _protocol(figure)
        shown = "as above" if told == above else told
        rows.append([TITLES.get(figure.name, figure.name), _value(figure), shown])
        above = told
    card = summary.figures[0].protocol
    title = f"epoch {summary.best_epoch} of {summary.epochs} ({card['selection']})"
    show_table(["figure", "value", "measured on"], rows, title)
    say(f"trained in {summary.seconds:.1f} s")
    say(", ".join(f"{name} {version}" for name, version in card["versions"].items()))
    say(f"run {summary.run}")
    say(f"checkpoint {summary.run / 'checkpoints' / 'best'}, sha256 {card['checkpoint']}")


def _value(figure: "Figure") -> str:
    if figure.low is None or figure.high is None:
        return f"{figure.value:.4g}"
    return f"{figure.value:.2%} [{figure.low:.2%}, {figure.high:.2%}]"


def _protocol(figure: "Figure") -> str:
    """How a figure was measured, beside it."""
    card = figure.protocol
    told = [f"{figure.n} {card['split']} images"]
    if "attack" in card:
        told.append(
            f"PGD {card['norm']} {card['radius_px']:g}/255, {card['steps']} steps of "
            f"{card['step_px']:g}/255, start {card['start']}"
        )
    told.append(f"seed {card['seed']}")
    if figure.low is not None:
        told.append("95 % Wilson interval")
    return "; ".join(told)
