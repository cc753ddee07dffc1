"""A folder that somebody sent does not make a command go to the network."""

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_tools import jemkit
from toys import REGISTRY

from jemkit import train
from jemkit.config.layers import offline, read_layer
from jemkit.config.recipe import resolve
from jemkit.errors import DataError
from jemkit.evaluation.export import export
from jemkit.evaluation.sample import opened
from jemkit.evaluation.subjects import subject_at
from jemkit.runtime.files import read_json, write_json
from jemkit.training.restore import is_own

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    named = {
        "data": {"use": "digits"},
        "backbone": {"use": "jem", "network": {"use": "mlp-8-1"}, "steps": 1},
        "objective": {"use": "jem"},
        "run": {"epochs": 1, "max_train": 40, "batch_size": 20, "eval_images": 10},
    }
    out = tmp_path_factory.mktemp("received") / "run"
    train(resolve(REGISTRY, named=named, overrides=["backbone.buffer.capacity=20"]), out,
          registry=REGISTRY)  # fmt: skip
    return out


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every name that something wants to look up in the network."""
    names: list[Any] = []

    def refused(host: Any, *_: Any, **__: Any) -> Any:
        names.append(host)
        raise OSError("no network here")

    monkeypatch.setattr(socket, "getaddrinfo", refused)
    return names


def wanting(folder: Path, where: Path) -> None:
    """Make a folder's config ask for a download of images that are not there."""
    config = read_json(folder / "config.json")
    config["recipe"]["data"] = {"use": "svhn", "dir": str(where / "none"), "download": True}
    config.pop("task", None)
    config.pop("data", None)
    write_json(folder / "config.json", config)


def test_no_command_downloads_because_a_config_says_so(
    run: Path, downloads: list[Any], tmp_path: Path
) -> None:
    made = export(run, out=tmp_path / "model", registry=REGISTRY).folder
    for folder, message in ((made, "--download"), (run, "config.json was changed|--download")):
        before = (folder / "config.json").read_bytes()
        wanting(folder, tmp_path)
        try:
            with pytest.raises(DataError, match=message):
                subject_at(folder, REGISTRY, CPU).test.unit()
            with pytest.raises(DataError, match=message):
                opened(folder, REGISTRY, CPU, "best").task.images("train")
            again = resolve(REGISTRY, config=folder / "config.json").recipe.data
            assert not again.download
        finally:
            (folder / "config.json").write_bytes(before)
    assert not downloads
    assert not (tmp_path / "none").exists()


def test_the_command_itself_may_ask_for_it(run: Path, downloads: list[Any], tmp_path: Path) -> None:
    made = export(run, out=tmp_path / "model", registry=REGISTRY).folder
    wanting(made, tmp_path)
    with pytest.raises(DataError, match="the download failed"):
        subject_at(made, REGISTRY, CPU, dataset={"download": True})
    assert downloads


def test_permissions_are_taken_back_wherever_they_stand(tmp_path: Path) -> None:
    tables = {
        "data": {"use": "cifar10", "download": True},
        "objective": {"use": "ebjdat", "distance": {"use": "lpips", "download": True}},
        "backbone": {"network": {"use": "mine", "pretrained": True, "depth": 3}},
        "run": {"compile": True},
    }
    taken = offline(tables)
    assert not taken["data"]["download"]
    assert not taken["objective"]["distance"]["download"]
    assert not taken["backbone"]["network"]["pretrained"]
    assert taken["run"] == {"compile": True}
    assert taken["backbone"]["network"]["depth"] == 3
    write_json(tmp_path / "config.json", {"recipe": tables})
    assert read_layer(tmp_path / "config.json") == taken
    recipe = tmp_path / "mine.toml"
    recipe.write_text('[data]\nuse = "cifar10"\ndownload = true\n')
    assert read_layer(recipe)["data"]["download"] is True


@pytest.mark.parametrize("verb", [("evaluate", "--only=accuracy"), ("sample", "--steps=1")])
def test_a_command_that_advises_download_has_it(
    run: Path, downloads: list[Any], tmp_path: Path, verb: tuple[str, ...]
) -> None:
    made = export(run, out=tmp_path / "model", registry=REGISTRY).folder
    wanting(made, tmp_path)
    done = jemkit(verb[0], str(made), *verb[1:])
    assert done.code == 6
    assert "--download" in done.err
    assert not downloads
    assert "the download failed" in jemkit(verb[0], str(made), *verb[1:], "--download").err
    assert downloads


@pytest.mark.parametrize("value", [1, 1.0, "1", "true", "YES", "on", "t"])
def test_whatever_a_part_takes_for_true_is_taken_back(tmp_path: Path, value: Any) -> None:
    tables = {"data": {"use": "cifar10", "download": value}}
    assert resolve(REGISTRY, config=tables).recipe.data.download
    write_json(tmp_path / "config.JSON", {"recipe": tables})
    assert not resolve(REGISTRY, config=tmp_path / "config.JSON").recipe.data.download
    within = {"objective": {"distances": [{"use": "lpips", "download": value}]}}
    assert offline(within)["objective"]["distances"][0]["download"] is False


def test_what_no_part_takes_for_true_is_left_to_be_refused() -> None:
    tables = {"data": {"download": False}, "run": {"download": "perhaps", "pretrained": "a.pth"}}
    assert offline(tables) == tables


def test_images_elsewhere_are_the_runs_own_and_another_data_set_is_not() -> None:
    assert is_own(None)
    assert is_own({"dir": "elsewhere", "download": True})
    assert not is_own({"use": "svhn"})
