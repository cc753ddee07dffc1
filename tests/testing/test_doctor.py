"""The doctor: one line for each thing that jemkit needs, and laws that this machine must keep."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from cli_tools import environment
from toys import REGISTRY, root
from typer.testing import CliRunner

from jemkit.config.registry import Fault, Registry
from jemkit.testing import doctor
from jemkit.testing.doctor import LAWS, Check, diagnose, healthy, self_test
from jemkit_cli.doctor import doctor as command

SOUND = Registry(REGISTRY.shelves, REGISTRY.recipes, [])


def checked(name: str, registry: Registry = SOUND) -> Check:
    return next(check for check in diagnose(registry, Path.cwd()) if check.name == name)


def test_a_sound_installation_fails_in_nothing() -> None:
    checks = diagnose(SOUND, Path.cwd())
    assert healthy(checks), [check for check in checks if check.state == "fail"]
    assert len({check.name for check in checks}) == len(checks)


def test_whatever_is_not_well_says_what_to_do() -> None:
    guests = [Fault("odd", "odd-plugins", "1.0", "no module named odd")]
    for check in diagnose(Registry(SOUND.shelves, SOUND.recipes, guests), Path.cwd()):
        assert bool(check.advice) == (check.state != "ok"), check


def test_the_self_test_leaves_random_state_alone() -> None:
    before = torch.get_rng_state()
    assert self_test(torch.device("cpu")).state == "ok"
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", LAWS)
def test_each_law_holds_on_the_cpu(name: str) -> None:
    assert LAWS[name](torch.device("cpu"))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_laws_hold_on_the_gpu() -> None:
    assert self_test(torch.device("cuda")).state == "ok"


def test_a_device_that_cannot_compute_fails_the_self_test() -> None:
    check = self_test(torch.device("meta"))
    assert check.state == "fail"
    assert "broken" in check.what


def test_a_guests_fault_is_a_warning_and_jemkits_own_a_failure() -> None:
    for owner, state in (("odd-plugins", "warn"), ("jemkit", "fail")):
        fault = Fault("odd", owner, "1.0", "no module\nnamed odd")
        registry = Registry(SOUND.shelves, SOUND.recipes, [fault])
        check = checked("plug-in odd", registry)
        assert (check.state, check.what) == (state, "no module named odd")


def test_weights_are_loaded_from_torchs_cache_and_never_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    for name, (file, _) in doctor.CACHES.items():
        assert checked(f"{name} weights").state == "warn"
        assert not (tmp_path / "hub").exists() or not list((tmp_path / "hub").rglob(file))
    for name, (file, _) in doctor.CACHES.items():
        (tmp_path / "hub" / "checkpoints").mkdir(parents=True, exist_ok=True)
        (tmp_path / "hub" / "checkpoints" / file).touch()
        assert checked(f"{name} weights").state == "ok"


def test_the_caches_have_the_names_that_are_read() -> None:
    from jemkit.runtime.torchvision_compat import torchvision

    url = torchvision().models.AlexNet_Weights.IMAGENET1K_V1.url
    assert Path(url).name == doctor.CACHES["LPIPS trunk"][0]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_cache_that_cannot_be_written_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.chmod(0o500)
    monkeypatch.setenv("JEMKIT_CACHE", str(tmp_path / "cache"))
    assert checked("cache").state == "fail"
    tmp_path.chmod(0o700)


def test_looking_makes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JEMKIT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    diagnose(SOUND, tmp_path / "here")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["here"]


def test_the_command_tells_every_check_and_its_exit_code_is_the_verdict() -> None:
    app = typer.Typer()
    app.command()(command)
    done = CliRunner().invoke(app, ["--json", "--no-plugins"])
    report = json.loads(done.stdout)
    assert done.exit_code == (0 if report["ok"] else 1)
    assert {check["state"] for check in report["checks"]} <= {"ok", "warn", "fail"}
    shown = CliRunner().invoke(app, ["--no-plugins"])
    for check in report["checks"]:
        assert check["name"] in shown.stdout


def test_help_loads_no_torch() -> None:
    script = (
        "import sys; from jemkit_cli import doctor, foreign; "
        "assert not {'torch', 'jemkit'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=root(), env=environment())
