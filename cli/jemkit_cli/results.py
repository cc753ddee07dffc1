"""The results of a run: as a table, or as JSON for scripts."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jemkit_cli.terminal import say, show_table

if TYPE_CHECKING:
    from jemkit.config.recipe import Resolved
    from jemkit.metrics.figures import Figure
    from jemkit.metrics.record_file import Record
    from jemkit.training.trainer import Summary

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
    """The keys that scripts may rely on."""
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
    """Every figure with its protocol, and the path of the run."""
    card = summary.figures[0].protocol
    criterion = {"pgd10": "PGD-10 accuracy", "accuracy": "accuracy"}[summary.select]
    title = f"epoch {summary.best_epoch} of {summary.epochs} (best {criterion} on validation)"
    _show_figures(summary.figures, title)
    if card["selection"] != "all":
        say(
            f"evaluated on a subset of the test images, {card['selection']}: by default "
            f"1,000, or as many as take a tenth of the training time. run.test_images sets the "
            f"number, and `jemkit evaluate {summary.run}` evaluates the run on all"
        )
    say(f"trained in {summary.seconds:.1f} s")
    say(", ".join(f"{name} {version}" for name, version in card["versions"].items()))
    say(f"run {summary.run}")
    say(f"checkpoint {summary.run / 'checkpoints' / 'best'}, sha256 {card['checkpoint']}")


def show_record(record: "Record") -> None:
    """Every figure of an evaluation with its protocol, the indicators and what was omitted."""
    shown = [figure for figure in record.figures if not _in_detail(figure)]
    if reasons := _reasons(record.protocol):
        say(f"not the standard protocol: {'; '.join(reasons)}")
    _show_figures(shown, _title(record))
    if len(shown) < len(record.figures):
        say(f"{len(record.figures) - len(shown)} more figures are in the record: --json, report")
    for name, verdict in record.tables.get("indicators", {}).items():
        _show_indicators(name, verdict)
    plan = record.tables.get("indicators_plan", {})
    if plan.get("left_out"):
        say(f"indicators omitted, since they cost more than the attacks: "
            f"{', '.join(plan['left_out'])}; --indicators full runs them")  # fmt: skip
    for name, reason in record.left_out.items():
        say(f"left out: {name}: {reason}")
    for warning in record.warnings:
        say(f"warning: {warning}")
    card = record.protocol
    say(", ".join(f"{name} {version}" for name, version in card["versions"].items()))
    say(f"weights {card['checkpoint']}")


def _show_figures(figures: Sequence["Figure"], title: str) -> None:
    rows, above = [], ""
    for figure in figures:
        protocol = protocol_text(figure)
        shown = "as above" if protocol == above else protocol
        rows.append([TITLES.get(figure.name, figure.name), _value(figure), shown])
        above = protocol
    show_table(["figure", "value", "measured on"], rows, title)


def _in_detail(figure: "Figure") -> bool:
    """For out-of-distribution detection the table has only the AUROC of log p(x)."""
    kind, _, rest = figure.name.partition("/")
    return kind in ("aupr", "fpr95") or (kind == "auroc" and "/" in rest)


def _title(record: "Record") -> str:
    about = record.subject
    parts = [str(about[k]) for k in ("run", "file", "model", "backbone", "objective") if k in about]
    label = record.protocol["protocol"] if record.protocol["standard"] else "NON-STANDARD"
    return f"{' '.join(parts)}: {label} protocol"


def _reasons(card: Mapping[str, Any]) -> list[str]:
    """Why figures are not of the standard protocol, as far as it holds for all of them."""
    if card["standard"]:
        return []
    quick = "--quick: PGD alone without --attack, and fewer images, chains and indicators"
    reasons = [quick] if card["quick"] else []
    if card["protocol"] != "standard":
        reasons.append(f"--protocol {card['protocol']}")
    if card["selection"] != "all":
        reasons.append(f"test images: {card['selection']}")
    if card.get("trained_on"):
        reasons.append(f"{card['trained_on']} test images are training or validation images")
    return reasons


def _show_indicators(attack: str, findings: list[dict[str, Any]]) -> None:
    """The flagged indicators of one attack's figure, or a note that there are none."""
    flagged = [row for row in findings if row["flag"]]
    say(f"{attack}: {len(findings)} failure indicators, {len(flagged)} flagged")
    for row in flagged:
        say(f"  FLAG {row['name']}: {row['found']}")


def _value(figure: "Figure") -> str:
    from jemkit.evaluation.run_table import shown, shown_interval

    interval = shown_interval(figure)
    return f"{shown(figure)} [{interval}]" if interval else shown(figure)


def _hash(features: Mapping[str, Any]) -> str:
    """The SHA-256 of weights that are not known, since their name says nothing."""
    unknown = features["weights"] == "unknown"
    return f" weights of SHA-256 {features.get('sha256')}" if unknown else ""


def _reference_set(reference: Mapping[str, Any]) -> str:
    """The split of the images that samples are compared with: of FID statistics their own."""
    named = "split" if reference["set"] == "statistics" else "set"
    return str(reference.get(named, "reference"))


def protocol_text(figure: "Figure") -> str:
    """The protocol of a figure in a few words, next to it."""
    card = figure.protocol
    size = f" of {card['image_px']} px" if "image_px" in card else ""
    words = [f"{figure.n} {card['split']} images{size}"]
    if "attack" in card:
        words.append(f"{card['attack']} {card['norm']} {card['radius_px']:g}/255")
    if "steps" in card:
        size = f" of {card['step_px']:g}/255" if "step_px" in card else ""
        words.append(f"{card['steps']} steps{size}")
    if "start" in card:
        words.append(f"start {card['start']}")
    features = card.get("features")
    if isinstance(features, dict) and features.get("weights"):
        words.append(f"{features.get('extractor')}, {features['weights']}{_hash(features)}")
    if isinstance(reference := card.get("reference"), dict):
        words.append(f"against {reference['count']} {_reference_set(reference)} images")
    if card.get("standard") is False:
        words.append("non-standard")
    words.append(f"seed {card['seed']}")
    if figure.low is not None:
        words.append(f"95 % {card.get('interval', 'Wilson')} interval")
    return "; ".join(words)
