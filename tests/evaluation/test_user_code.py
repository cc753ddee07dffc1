"""A model of a user's own Python file: what is run, what is read, and every mistake in one line."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_tools import jemkit, one_line
from torch import nn
from toys import REGISTRY

from jemkit.errors import ConfigError, DataError, UsageError
from jemkit.evaluation.subjects import subject_at
from jemkit.evaluation.user_code import (
    Code,
    Normalised,
    Preparation,
    built,
    code_of,
    load_weights,
    numbers_of,
)

CPU = torch.device("cpu")
SOURCE = """
import helper
import torch
from torch import nn

torch.set_default_dtype(torch.float64)
torch.set_grad_enabled(False)
print("hello")
model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10).float())


def build():
    layers = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(72, 10)
    return nn.Sequential(*layers).float()


class Wide(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(192, 10))


def fails():
    return helper.size("x")


def ends():
    raise SystemExit(0)


def nothing():
    build()


def narrow():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 2).float())


seven = 7
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """my.py, with a module beside it."""
    (tmp_path / "my.py").write_text(SOURCE)
    (tmp_path / "helper.py").write_text("def size(x):\n    return 1 / len(x[1:])\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path / "my.py"
    sys.modules.pop("helper", None)
    sys.modules.pop("user_code_my", None)


def test_a_path_names_code_by_its_function(tmp_path: Path) -> None:
    assert code_of(Path("a/my.py:build")) == Code(Path("a/my.py"), "build")
    assert code_of(Path("runs/latest")) is None
    assert code_of(Path("weights.safetensors")) is None
    (tmp_path / "run.py").mkdir()
    assert code_of(tmp_path / "run.py") is None
    for wrong in ("my.py", "my.py:", "my.py:a-b"):
        with pytest.raises(UsageError, match=r"my\.py:build"):
            code_of(Path(wrong))


def test_code_is_run_and_changes_no_setting_of_torch(
    file: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    before = torch.get_rng_state()
    one, two = (built(Code(file, "build")) for _ in range(2))
    assert isinstance(built(Code(file, "model")), nn.Sequential)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_default_dtype() is torch.float32
    assert torch.is_grad_enabled()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert f"{file} is run as Python code, with all rights that you have" in caplog.messages
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "hello" in printed.err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fails", r"my\.py, line 23: fails\(\) raises ZeroDivisionError: division by zero"),
        ("ends", r"my\.py, line 27: ends\(\) raises SystemExit"),
        ("nothing", r"my\.py:nothing returns nothing: expected a torch\.nn\.Module"),
        ("seven", r"my\.py:seven is of type int: expected a function"),
        ("other", r"my\.py has no other: it defines build, Wide, fails, ends, nothing and 1 more"),
    ],
)
def test_code_that_gives_no_model_is_one_message(file: Path, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        built(Code(file, name))


def test_files_that_are_no_code_are_one_message(file: Path) -> None:
    file.write_text("x = 1\ndef build(:\n")
    with pytest.raises(ConfigError, match=r"my\.py, line 2: it raises SyntaxError"):
        built(Code(file, "build"))
    file.write_text("import torch\nimport no_such_module\n")
    with pytest.raises(ConfigError, match=r"line 2: it raises ModuleNotFoundError: .*no_such"):
        built(Code(file, "build"))
    with pytest.raises(DataError, match="does not exist"):
        built(Code(file.with_name("your.py"), "build"))


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


def variants(state: dict[str, Any]) -> dict[str, Any]:
    """A state_dict as training scripts save it."""
    wrapped = {f"module.{name}": tensor for name, tensor in state.items()}
    old = {n: t for n, t in state.items() if not n.endswith("num_batches_tracked")}
    return {
        "plain": state, "wrapped": wrapped, "old": old, "lightning": {"state_dict": state},
        "checkpoint": {"epoch": 3, "model": wrapped, "optimizer": {"state": {0: state["0.bias"]}}},
        "ema": {"model": {n: t + 1 for n, t in state.items()}, "model_ema": state},
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["plain", "wrapped", "old", "lightning", "checkpoint", "ema"])
def test_weights_are_read_as_scripts_save_them(tmp_path: Path, kind: str) -> None:
    source, module = net(), net()
    path = tmp_path / "w.pt"
    torch.save(variants(source.state_dict())[kind], path)
    load_weights(module, path, Code(Path("my.py"), "build"))
    for a, b in zip(source.state_dict().values(), module.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_weights_that_do_not_fit_are_listed_by_name_and_shape(tmp_path: Path) -> None:
    path, code = tmp_path / "w.pt", Code(Path("my.py"), "build")
    state = net().state_dict()
    state["0.weight"], state["2.bias"] = torch.zeros(2, 4), state.pop("1.bias")
    torch.save(state, path)
    with pytest.raises(DataError) as error:
        load_weights(net(), path, code)
    assert str(error.value) == (
        f"the weights of {path} do not fit the model of my.py:build: missing: 1.bias; unexpected: "
        "2.bias; 0.weight has [2, 4] instead of [2, 3]"
    )
    torch.save({"a": net().state_dict(), "b": net().state_dict()}, path)
    with pytest.raises(DataError, match="2 state dicts that fit, and their values differ: a, b"):
        load_weights(net(), path, code)
    load_weights(net(), path, code, key="b")
    with pytest.raises(DataError, match="no state dict under the key 'c'"):
        load_weights(net(), path, code, key="c")
    torch.save({"epoch": 3}, path)
    with pytest.raises(DataError, match="it contains no weights: 'epoch' is int"):
        load_weights(net(), path, code)
    torch.save({n: t * float("nan") for n, t in net().state_dict().items()}, path)
    with pytest.raises(DataError, match="contains NaN or inf"):
        load_weights(net(), path, code)
    with pytest.raises(DataError, match="is not a file"):
        load_weights(net(), tmp_path / "none.pt", code)


def test_a_pickled_module_is_not_executed(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save(net(), path)
    with pytest.raises(DataError, match=r"its pickle calls .*nothing was executed"):
        load_weights(net(), path, Code(Path("my.py"), "build"))


def test_images_are_scaled_by_channel_in_their_own_type() -> None:
    module = Normalised(nn.Identity(), [0.5, 0.25, 0], [0.5, 1, 0.1])
    x = torch.tensor([1.0, 0.5, 0.2]).view(1, 3, 1, 1)
    assert torch.allclose(module(x).flatten(), torch.tensor([1.0, 0.25, 2.0]))
    assert module(x.half()).dtype is torch.float16
    assert numbers_of("0.49,0.48,0.45", "--mean") == (0.49, 0.48, 0.45)


def test_a_record_tells_what_was_run(file: Path) -> None:
    path = Path(f"{file}:build")
    weights = file.with_name("w.pt")
    torch.save(built(Code(file, "build")).state_dict(), weights)
    how = Preparation(weights, mean=(0.3,), std=(0.4,))
    first, second = (subject_at(path, REGISTRY, CPU, preparation=how) for _ in range(2))
    assert first.about == second.about
    assert first.folder == file.with_name("my-evaluation")
    assert {"file": "my.py", "model": "build", "data": "digits", "weights": "w.pt",
            "mean": [0.3], "std": [0.4]}.items() <= first.about.items()  # fmt: skip
    other = subject_at(path, REGISTRY, CPU, preparation=how._replace(mean=(0.2,)))
    assert other.about["sha256"] != first.about["sha256"]
    file.write_text(SOURCE.replace("Conv2d(1, 2, 3)", "Conv2d(1, 2, 3, padding_mode='reflect')"))
    changed = subject_at(path, REGISTRY, CPU, preparation=how)
    assert changed.about["code_sha256"] != first.about["code_sha256"]


def test_the_command_judges_a_users_model(file: Path) -> None:
    done = jemkit(
        "evaluate", f"{file}:build", "--mean=0.3", "--std=0.4", "--only=accuracy", "--json",
        "--max-images=50",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "is run as Python code" in done.err
    assert len(done.out.splitlines()) == 1
    assert done.record["subject"]["file"] == "my.py"
    assert (file.with_name("my-evaluation") / "evaluation.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["my.py"], 2, "add the function in it that builds the model"),
        (["my.py:build", "--mean=0.1,0.2,0.3"], 3, "--mean has 3 numbers, expected 1 or one for"),
        (["my.py:build", "--std=x"], 2, "--std x: expected a number for each channel"),
        (["my.py:build", "--mean=125"], 2, "in units of the pixel range"),
        (["my.py:build", "--std=0"], 2, "positive ones for --std"),
        (["my.py:build", "--key=ema"], 3, "name it with --weights"),
        (["my.py:build", "--checkpoint=last"], 3, "only a run has a last checkpoint"),
        (["my.py:build", "--attack=aa", "--set=aa.version=plus"], 3, "it does not run"),
        (["my.py:build", "--only=calibration", "--set=pgd.steps=3"], 3, "it does not run"),
        (["my.py:build", "--network=wrn-16-2"], 3, "builds its own network"),
        (["my.py:none"], 3, "has no none"),
        (["my.py:narrow"], 3, "expected logits ["),
        (["my.py:Wide"], 3, "raises RuntimeError for images of digits: mat1 and mat2"),
        (["your.py:build"], 6, "does not exist"),
        (["w.safetensors", "--mean=0.1"], 3, "are for a model that Python code builds"),
    ],
)
def test_a_mistake_is_one_line(
    file: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, message: str
) -> None:
    monkeypatch.chdir(file.parent)
    done = jemkit("evaluate", *arguments, "--only=accuracy", "--max-images=20")
    own = [line for line in done.err.splitlines() if "is run as" not in line and line != "hello"]
    assert message in one_line(done._replace(err="\n".join([*own, ""])), code)
