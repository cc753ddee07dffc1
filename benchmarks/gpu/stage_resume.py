"""`jemkit verify-resume --deterministic`: an interrupted run resumes bit for bit on the device."""

import json

import processes
from records import Record
from stage import Given

RECIPE = """
[run]
epochs = 1
max_train = 600
batch_size = 64
[backbone]
use = "sadajem"
steps = 2
[objective]
use = "ebjdat"
[updater]
use = "sam"
"""


def measure(given: Given, record: Record) -> None:
    recipe = given.work / "resume.toml"
    recipe.write_text(RECIPE)
    command = processes.python("-P", "-m", "jemkit", "verify-resume", str(recipe))
    command += ["--deterministic", "--device", given.device, "--json"]
    done = processes.run(command, given.left - 2)
    if not done.passed:
        raise RuntimeError(f"verify-resume {done.status}:\n{done.output[-2000:]}")
    lines = [line for line in done.output.splitlines() if line.startswith("{")]
    record.add(verdict=json.loads(lines[-1]))
