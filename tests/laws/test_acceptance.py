"""The main job at full length, as `make acceptance` holds it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

JEMKIT = str(Path(sys.executable).with_name("jemkit"))


def trained(out: Path, *arguments: str) -> dict[str, float]:
    command = [JEMKIT, "train", *arguments, "--out", str(out), "--json", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    printed: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return printed


@pytest.mark.slow
@pytest.mark.timeout(14400)
def test_the_main_job_classifies_resists_and_keeps_its_energies_together(tmp_path: Path) -> None:
    ours = trained(tmp_path / "ebjdat", "--backbone", "sadajem", "--objective", "ebjdat")
    rival = trained(tmp_path / "pgdat", "--backbone", "classifier", "--objective", "pgdat")
    assert ours["clean_accuracy"] >= 0.97
    assert ours["pgd_accuracy"] >= 0.86
    assert ours["energy_gap_relative"] < rival["energy_gap_relative"]


@pytest.mark.slow
@pytest.mark.timeout(14400)
@pytest.mark.parametrize("backbone", ["jem", "jempp", "mebm", "sadajem"])
@pytest.mark.parametrize("objective", ["jem", "ebjdat"])
def test_every_density_trains_to_the_end_at_full_length(
    backbone: str, objective: str, tmp_path: Path
) -> None:
    summary = trained(tmp_path / "run", "--backbone", backbone, "--objective", objective)
    assert summary["clean_accuracy"] >= 0.95
