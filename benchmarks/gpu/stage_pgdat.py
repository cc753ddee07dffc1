"""PGD-AT, the baseline without a density, for the number of epochs of the stage `training`."""

from records import Record
from stage import Given
from stage_training import train_and_judge

BASELINE = ("--backbone", "classifier", "--objective", "pgdat")


def measure(given: Given, record: Record) -> None:
    before = Record.read(given.work / "records" / "training.json")
    train_and_judge(given, record, BASELINE, before.get("epochs"))
