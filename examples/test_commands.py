"""The plug-ins of this folder, installed as wheels, and used by the commands.

`make test-guests` installs them beside jemkit's own wheel, and runs this file and their tests.
"""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from jemkit_cli.app import main

NEEDED = ("jemkit_vitjem", "jemkit_hmc", "jemkit_multitargeted")
MISSING = [name for name in NEEDED if find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
needs_timm = pytest.mark.skipif(find_spec("timm") is None, reason="timm is not installed")
SHORT = ("--epochs=1", "--device=cpu", "--set=run.max_train=200", "--set=run.eval_images=20")
SMALL = (
    "--set=backbone.network.dim=16",
    "--set=backbone.network.depth=1",
    "--set=backbone.buffer.capacity=100",
    "--set=backbone.steps=2",
)


def jemkit(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    """What a command prints as JSON, in this process."""
    code = 0
    try:
        main([*arguments, "--json"])
    except SystemExit as ended:
        code = int(ended.code or 0)
    printed = capsys.readouterr()
    assert code == 0, printed.err
    return json.loads(printed.out.splitlines()[-1])


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        pytest.param("vitjem", {"backbone", "energy", "network"}, marks=needs_timm),
        ("hmc", {"sampler"}),
        ("multitargeted", {"attack"}),
    ],
)
def test_each_part_keeps_the_laws(
    name: str, kinds: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    result = jemkit(capsys, "plugins", "check", name)
    assert result["ok"]
    assert {part["kind"] for part in result["parts"]} == kinds
    assert {part["distribution"] for part in result["parts"]} == {f"jemkit-{name}"}


@needs_timm
def test_one_run_uses_all_three(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    parts = ("--backbone=vitjem", "--objective=jem", "--sampler=hmc")
    trained = jemkit(capsys, "train", *parts, *SHORT, *SMALL, "--out=run")
    assert trained["backbone"] == "vitjem"
    backbone = json.loads(Path("run/config.json").read_text())["recipe"]["backbone"]
    assert (backbone["network"]["use"], backbone["energy"]["use"]) == ("vitjem", "vitjem")
    assert (backbone["sampler"]["use"], backbone["sampler"]["leapfrog"]) == ("hmc", 5)
    header, first = Path("run/metrics.csv").read_text().splitlines()[:2]
    logged = dict(zip(header.split(","), first.split(","), strict=True))
    assert 0 <= float(logged["sampler/acceptance"]) <= 1
    few = ("--only=robustness", "--max-images=20", "--set=robustness.indicators=false")
    judged = jemkit(capsys, "evaluate", "run", "--attack=multitargeted", *few)
    (figure,) = (one for one in judged["figures"] if one["name"] == "mt20")
    assert figure["protocol"]["loss"] == "z_t - z_y"
    drawn = jemkit(capsys, "sample", "run", "--n=4", "--steps=2")
    assert Path(drawn["png"]).is_file()
