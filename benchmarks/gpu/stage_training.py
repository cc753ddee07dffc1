"""A training run in the remaining time: SADA-JEM with EB-JDAT on CIFAR-10, then its evaluation.

Each command is one that a user would type. Training has as many epochs as fit. If its time runs out
nevertheless, it is asked to stop and saves its state; the best epoch is evaluated.
"""

import json
import math
import shutil
import zipfile
from pathlib import Path
from typing import Any

import images
import processes
from records import Record
from stage import Given

RESERVE = 220.0
"""Seconds that judging, sampling and exporting are given."""

GRACE = 20.0
"""Seconds in which a run that is asked to stop saves itself."""

CAPS = {"aa": 120.0, "pgd": 60.0}
"""Seconds of one evaluation, so that the next ones have their turn."""

START, VALIDATION = 15.0, 2.0  # seconds: imports and data, and what follows each epoch
MOST = 15 * 2**20  # bytes of the zip that comes back
ASSUMED = 0.12  # seconds of a step where the stage `step` measured none


HYBRID = ("--backbone", "sadajem", "--objective", "ebjdat")


def measure(given: Given, record: Record) -> None:
    train_and_judge(given, record, HYBRID)


def train_and_judge(
    given: Given, record: Record, method: tuple[str, ...], epochs: int | None = None
) -> None:
    """Train `method` for `epochs`, or as many as fit, and judge its best epoch."""
    data, count = dataset(given)
    ends = given.left - (40.0 if given.toy else RESERVE + GRACE)
    step = _step_seconds(given, record)
    if not given.toy and ends < START + epoch_seconds(count, step):
        raise RuntimeError(f"{given.left:.0f} s are too little for one epoch and its evaluation")
    epochs = 1 if given.toy else epochs or epochs_in(ends, count, step)
    run = given.work / record.content["stage"] / "run"
    shutil.rmtree(run.parent, ignore_errors=True)
    options = [*method, *recipe(given, data), "--epochs", str(epochs)]
    command = _jemkit("train", *options, "--out", str(run), "--quiet")
    record.add(data=data, images=count, epochs=epochs, command=_as_typed(command))
    trained = processes.run(command, ends, grace=GRACE)
    record.add(
        training={"status": trained.status, "seconds": trained.seconds, "code": trained.code}
    )
    if not (run / "checkpoints" / "best").exists():
        raise RuntimeError(f"training {trained.status}:\n{trained.output[-2000:]}")
    wanted = judgements(given, run, generates="classifier" not in method)
    for name, arguments in wanted.items():
        record.add(**{name: _done(given, arguments, CAPS.get(name, math.inf))})
    path = given.out / f"{record.content['stage']}.zip"
    record.add(figures=figures(run), zipped=bring_back(run, path))
    reached = ("passed", "not reached")
    failed = [name for name in wanted if record.content[name]["status"] not in reached]
    if failed:
        raise RuntimeError(f"commands that failed or ran out of time: {', '.join(failed)}")


def dataset(given: Given) -> tuple[list[str], int]:
    """Options that name the data, and how many training images there are.

    All six files of CIFAR-10 make the data set itself; some of them a folder of its images, which
    are neither shifted nor mirrored, since nobody knows what that means in a folder.
    """
    source, target = given.work / "packed", given.work / "data"
    packed = [name for name in images.BATCHES if (source / f"{name}.webp").exists()]
    if len(packed) == len(images.BATCHES):
        for name in packed:
            images.restore(name, source, target / images.FOLDER)
        meta = (source / images.NAMES).read_bytes()
        (target / images.FOLDER / images.NAMES).write_bytes(meta)
        return ["--dataset", "cifar10", "--data-dir", str(target)], 50_000
    if len(packed) > 1:
        count = 0
        for name in packed:
            test = name == images.BATCHES[0]
            exported = images.export_png(name, source, target / ("test" if test else "train"))
            count += 0 if test else exported
        return ["--dataset", "folder", "--data-dir", str(target)], count
    return ["--dataset", "digits"], 1_297


def recipe(given: Given, data: list[str]) -> list[str]:
    """One cycle of the learning rate: a linear rise over a fifth of the run, then half a cosine."""
    options = [
        *data, "--device", given.device,
        "--set", "schedule.decay=cosine", "--set", "schedule.warmup_share=0.2",
        "--set", "schedule.warmup=100000", "--set", "run.eval_images=500",
        "--set", "run.test_images=100", "--seed", "0",
    ]  # fmt: skip
    if given.toy:
        return [*options, "--set", "run.max_train=200"]
    return [*options, "--network", "wrn-16-4", "--precision", "bf16", "--batch-size", "128"]


def judgements(given: Given, run: Path, *, generates: bool) -> dict[str, list[str]]:
    """The commands that judge the best epoch; the most expected figures first."""
    evaluate = ["evaluate", str(run), "--device", given.device]
    few = "50" if given.toy else "250"
    everything = ["--max-images", few] if given.toy else []
    generated = ["--only", "generation", "--set", f"generation.n={50 if given.toy else 10_000}"]
    commands = {
        "export": ["export", str(run), "--out", str(run.parent / "export")],
        "pgd": [*evaluate, "--attack", "pgd", "--only", "robustness", "--only", "energies",
                *everything, "--batch-size", "500"],
        "sample": ["sample", str(run), "-n", "100", "--device", given.device],
        "aa": [*evaluate, "--attack", "fgsm" if given.toy else "aa", "--only", "robustness",
               "--max-images", few, "--batch-size", "500", "--indicators", "off"],
        "generation": [*evaluate, *generated],
        "bpda": [*evaluate, "--attack", "bpda", "--refine-steps", "2", "--only", "robustness",
                 "--indicators", "off", "--max-images", "50"],
    }  # fmt: skip
    of_densities = ("sample", "generation", "bpda")
    return {k: v for k, v in commands.items() if generates or k not in of_densities}


def figures(run: Path) -> dict[str, Any]:
    """Every figure of the record: value, interval, number of images."""
    path = run / "evaluation.json"
    if not path.exists():
        return {}
    rows = json.loads(path.read_text()).get("figures", [])
    return {f["name"]: {k: f.get(k) for k in ("value", "low", "high", "n")} for f in rows}


def bring_back(run: Path, path: Path) -> dict[str, int]:
    """Zip weights, record, logs and pictures; what would not fit is left out."""
    wanted = [run.parent / "export" / "model.safetensors", run / "evaluation.json"]
    wanted += [run.parent / "export" / name for name in ("config.json", "README.md")]
    wanted += [run / name for name in ("config.json", "metrics.csv", "events.jsonl", "curves.svg")]
    for kind in ("chains-*.png", "epoch-*.png"):
        wanted += sorted((run / "samples").glob(kind))[-1:]
    sizes: dict[str, int] = {}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for each in wanted:
            if each.exists() and sum(sizes.values()) + each.stat().st_size < MOST:
                name = f"{each.parent.name}-{each.name}"
                file.write(each, name)
                sizes[name] = each.stat().st_size
    return sizes


def _step_seconds(given: Given, record: Record) -> float:
    """Of a step in bf16, as the stage `step` found it."""
    before = Record.read(given.work / "records" / "step.json").get("wrn-16-4 bf16", {})
    seconds = float(before.get("step_s", ASSUMED))
    record.add(assumed_step_s=seconds)
    return seconds


def epoch_seconds(count: int, step: float) -> float:
    """Of an epoch of `count` images in batches of 128, a tenth of them for validation."""
    return 0.9 * count // 128 * step * 1.1 + VALIDATION


def epochs_in(seconds: float, count: int, step: float) -> int:
    """Epochs that fit; one at the least."""
    return max(1, int((seconds - START) / epoch_seconds(count, step)))


def _done(given: Given, arguments: list[str], limit: float) -> dict[str, Any]:
    if given.left < 8:
        return {"status": "not reached"}
    command = _jemkit(*arguments)
    done = processes.run(command, min(limit, given.left - 3))
    outcome: dict[str, Any] = {"status": done.status, "seconds": done.seconds}
    outcome["command"] = _as_typed(command)
    return outcome if done.passed else outcome | {"output": done.output[-2000:]}


def _as_typed(command: list[str]) -> str:
    return " ".join(command[command.index("jemkit") :])


def _jemkit(*arguments: str) -> list[str]:
    return processes.python("-P", "-m", "jemkit", *arguments)
