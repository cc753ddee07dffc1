"""The cost of the sentinel per step, and its false alarms in healthy runs of the default recipe."""

import argparse
import json
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from tools import in_turn, keep, trained

from jemkit.config.recipe import resolve
from jemkit.config.registry import Registry, installed
from jemkit.runtime.run_dir import RunFolder
from jemkit.training.trainer import Trainer

SMALL = {"backbone": {"network": {"use": "smallcnn"}}}
WIDE = {"backbone": {"network": {"use": "wrn-10-1"}}}


def cost(registry: Registry, tables: dict[str, Any], steps: int, rounds: int) -> dict[str, Any]:
    """The same steps with the sentinel and without, in turn; each epoch's checks in their share.

    Validation and checkpoints are left out: they cost the same with and without.
    """
    with tempfile.TemporaryDirectory() as folder:
        runs = []
        for on in (True, False):
            table = {**tables, "sentinel": {"on": on}, "run": {"seed": 0, "threads": 1}}
            out = RunFolder.create(Path(folder) / f"{on}")
            trainer = Trainer(resolve(registry, config=table), out)
            trainer.backbone.model.train()
            runs.append(trainer)

        def some(trainer: Trainer) -> None:
            for _ in range(steps):
                trainer.polling.begin()
                trainer.one_step()
            trainer.gather()

        timings = in_turn(lambda: some(runs[0]), lambda: some(runs[1]), rounds)
        monitor, step = runs[0].rollback.monitor, runs[0].step

        def after_an_epoch() -> None:
            monitor.epoch(step, monitor.body(step, {}), [0.5])

        epoch = in_turn(after_an_epoch, lambda: None, rounds)["first_ms"]
        step_ms = timings["second_ms"] / steps
        rows = [dict(row) for row in as_numbers(runs[0].folder)] * 20
        read = in_turn(lambda: [monitor.statistics.row(row) for row in rows], lambda: None, rounds)
        row_ms = read["first_ms"] / len(rows)
        per_epoch = runs[0].loader.steps_per_epoch
    return {
        "step_ms": step_ms,
        "ratio_of_steps": timings["ratio"],
        "row_ms": row_ms,
        "rows_share": row_ms / step_ms,
        "epoch_checks_ms": epoch,
        "epoch_checks_share": epoch / (per_epoch * step_ms),
    }


def as_numbers(folder: RunFolder) -> list[dict[str, Any]]:
    """The rows of metrics as the sentinel is given them."""
    whole = ("step", "epoch")
    return [
        {name: int(value) if name in whole else float(value) for name, value in row.items()}
        for row in folder.metrics()
    ]


def alarms(out: Path, arguments: list[str], seed: int) -> dict[str, Any]:
    """One run of the main job: its rollbacks, and how it ended."""
    run = out / f"seed-{seed}"
    try:
        line = trained([*arguments, "--seed", str(seed)], run)
        ended = {"clean": line["clean_accuracy"], "pgd20": line["pgd_accuracy"]}
    except subprocess.CalledProcessError as error:
        ended = {"exit_code": error.returncode}
    events = [json.loads(text) for text in (run / "events.jsonl").read_text().splitlines()]
    what = [event["what"] for event in events if event["event"] == "rollback"]
    return {"seed": seed, "rollbacks": len(what), "what": what, **ended}


def main(given: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    figures: dict[str, Any] = {}
    if given.rounds:
        registry = installed(third_party=False)
        figures["cost"] = {
            "smallcnn": cost(registry, SMALL, 10, given.rounds),
            "wrn-10-1": cost(registry, WIDE, 3, given.rounds),
        }
    if given.seeds:
        given.folder.mkdir(parents=True, exist_ok=True)
        arguments = ["--backbone", given.backbone, "--objective", "ebjdat", "--dataset", "digits"]
        arguments += [f"--epochs={given.epochs}"] if given.epochs else []
        with ThreadPoolExecutor(given.jobs) as pool:
            runs = [*pool.map(lambda s: alarms(given.folder, arguments, s), range(given.seeds))]
        figures["runs"] = runs
        figures["false_alarms"] = sum(run["rollbacks"] for run in runs)
    keep("sentinel", figures)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/sentinel"))
    parser.add_argument("--backbone", default="sadajem")
    parser.add_argument("--seeds", type=int, default=20, help="runs of the main job; 0 for none")
    parser.add_argument("--epochs", type=int, default=0, help="0 for the recipe's")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15, help="of the cost; 0 for none")
    main(parser.parse_args())
