"""Checkpoints of the methods' authors: the same logits, and nothing in them is ever run."""

from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from authors import Authors, Plain, buffer, made, saved
from safetensors.torch import save_file
from strategies import uniform
from torch import Tensor
from toys import REGISTRY
from typer.testing import CliRunner

from jemkit.errors import ConfigError, DataError
from jemkit.evaluation.subjects import subject_at
from jemkit.models.energy import LinearHead, LogSumExp
from jemkit.runtime.modes import eval_mode
from jemkit.training.model_folder import verify
from jemkit.training.pretrained import FORMATS, Format, import_checkpoint, read_checkpoint
from jemkit.training.pretrained.layouts import looks_like, read_layout
from jemkit_cli.foreign import import_model

PUBLISHED = Path(__file__).parents[2].parent / "shared" / "data" / "checkpoints"


LAYOUTS: list[tuple[Format, dict[str, Any]]] = [
    ("jem", {"norm": "none", "linear": 10}),
    ("jem", {"norm": "none", "linear": 10, "n": 2, "width": 2}),
    ("jempp", {"yopo": True}),
    ("jempp", {}),
    ("sadajem", {}),
    ("sadajem", {"norm": "none"}),
    ("sadajem", {"norm": "instance"}),
    ("sadajem", {"classes": 100}),
    ("sadajem", {"stages": 4, "n": 2}),
    ("mebm", {}),
    ("mebm", {"norm": "none", "linear": 10}),
    ("ebjdat", {}),
    ("ebjdat", {"yopo": True}),
    ("ebjdat", {"norm": "none", "linear": 10}),
    ("wrn", {"kind": Plain}),
    ("wrn", {"kind": Plain, "norm": "none", "n": 2}),
]


@pytest.mark.parametrize(("format", "options"), LAYOUTS, ids=str)
def test_an_imported_network_gives_the_authors_logits(
    format: Format, options: dict[str, Any], tmp_path: Path
) -> None:
    theirs = made(**options)
    path = saved(tmp_path / "official.pt", theirs)
    norm = "instance" if options.get("norm") == "instance" else None
    reading = read_layout(read_checkpoint(path).weights, format, norm)
    network = reading.network.build((3, *2 * (64 if reading.stages == 4 else 32,)))
    energy = LinearHead() if format == "mebm" else LogSumExp()
    ours = energy.build(network, reading.n_classes)
    ours.load_state_dict(reading.weights)
    x = uniform(3, 4, 3, *2 * (64 if reading.stages == 4 else 32,))
    with torch.no_grad(), eval_mode(ours):
        scores = ours(x)
        logits = theirs(x)
        torch.testing.assert_close(scores.logits, logits, atol=1e-5, rtol=1e-5)
        negative = logits.logsumexp(1)
        if format == "mebm":
            negative = theirs.energy_output(theirs.f(x)).squeeze(1)
        torch.testing.assert_close(scores.energy, -negative, atol=1e-5, rtol=1e-5)
    assert (reading.network.depth - 4) // 6 == options.get("n", 1)
    assert reading.network.width == options.get("width", 1)


def test_every_format_has_a_layout_that_is_read() -> None:
    assert {format for format, _ in LAYOUTS} == set(FORMATS)
    for format, options in LAYOUTS:
        assert format in looks_like(made(**options).state_dict())


@pytest.mark.parametrize("format", ["sadajem", "mebm", "wrn"])
def test_an_imported_folder_is_judged_as_the_authors_model(format: Format, tmp_path: Path) -> None:
    theirs = made(Plain if format == "wrn" else Authors, channels=1)
    path = saved(tmp_path / "official.pt", theirs)
    imported = import_checkpoint(path, format, REGISTRY, dataset="digits")
    assert imported.folder == tmp_path / "official-imported"
    assert verify(imported.folder) == imported.sha256
    subject = subject_at(imported.folder, REGISTRY, torch.device("cpu"))
    x = subject.test.unit()[:20]
    with torch.no_grad(), eval_mode(subject.model):
        torch.testing.assert_close(subject.model(x), theirs(2 * x - 1), atol=1e-5, rtol=1e-5)
    assert subject.about["sha256"] == imported.sha256
    assert subject.about["network"]["depth"] == 10


@pytest.mark.parametrize("format", ["jem", "jempp", "sadajem", "mebm", "ebjdat", "wrn"])
def test_the_recipe_names_the_method_of_the_format(format: Format, tmp_path: Path) -> None:
    theirs = made(**dict(reversed(LAYOUTS))[format])
    imported = import_checkpoint(saved(tmp_path / "a.pt", theirs), format, REGISTRY)
    assert imported.dataset == "cifar10"
    wanted = {"wrn": "classifier", "ebjdat": "sadajem"}.get(format, format)
    assert imported.backbone == wanted  # the first ebjdat of the table has batch norm
    assert "replay_buffer" in imported.left_out


def weights_at(path: Path) -> dict[str, Tensor]:
    return read_layout(read_checkpoint(path).weights, "sadajem").weights


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a)


def test_every_container_gives_the_same_weights(tmp_path: Path) -> None:
    theirs = made()
    state = {name: t.contiguous() for name, t in theirs.state_dict().items()}
    wanted = weights_at(saved(tmp_path / "buffer.pt", theirs))
    parallel = {f"module.{name}": t for name, t in state.items()}
    files = {
        "plain": state,
        "parallel": parallel,
        "parallel-buffer": {"model_state_dict": parallel, "replay_buffer": buffer()},
        "state": {"state_dict": state, "epoch": 3, "best": 0.5},
        "model": {"model": state, "optimizer": {"lr": 0.1, "state": {}}},
    }
    for name, content in files.items():
        torch.save(content, tmp_path / f"{name}.pt")
        assert same(weights_at(tmp_path / f"{name}.pt"), wanted), name
    saved(tmp_path / "old.pt", theirs, _use_new_zipfile_serialization=False)
    assert same(weights_at(tmp_path / "old.pt"), wanted)
    save_file(state, tmp_path / "tensors.safetensors")
    assert same(weights_at(tmp_path / "tensors.safetensors"), wanted)
    save_file(state, tmp_path / "misnamed.pt")
    assert same(weights_at(tmp_path / "misnamed.pt"), wanted)


def test_half_precision_is_widened_and_counters_stay_whole(tmp_path: Path) -> None:
    torch.save(made().half().state_dict(), tmp_path / "half.pt")
    weights = weights_at(tmp_path / "half.pt")
    assert weights["network.first.weight"].dtype == torch.float32
    assert weights["network.norm.num_batches_tracked"].dtype == torch.int64


def test_reading_draws_nothing_from_the_process(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", made())
    before = torch.get_rng_state()
    import_checkpoint(path, "sadajem", REGISTRY)
    assert torch.equal(before, torch.get_rng_state())


def changed(**tensors: Tensor | None) -> dict[str, Tensor]:
    state = {**made().state_dict()}
    for name, tensor in tensors.items():
        key = name.replace("__", ".")
        if tensor is None:
            del state[key]
        else:
            state[key] = tensor
    return state


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (changed(f__conv1__weight=None), "missing: f.conv1.weight|lack f.conv1.weight"),
        (changed(f__layer2__0__conv2__bias=None), "missing: f.layer2.0.conv2.bias"),
        (changed(f__layer9=torch.zeros(1)), "unknown: f.layer9"),
        (changed(class_output__weight=torch.zeros(10, 3)), r"class_output.weight is \[10, 3\]"),
        (changed(class_output__weight=torch.zeros(0, 64)), r"class_output.weight is \[0, 64\]"),
        (changed(f__layer1__0__conv1__weight=torch.zeros(17, 16, 3, 3)), "multiple of 16"),
        (changed(f__bn1__running_var=-torch.ones(64)), "a variance below 0"),
        (changed(f__conv1__weight=torch.zeros((16, 3, 3, 3), dtype=torch.int64)), "torch.int64"),
        (changed(f__layer1__0__bn1__loc=torch.zeros(1)), "ActNorm"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_names_and_shapes_are_named(state: dict[str, Tensor], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_layout(state, "sadajem")


def test_a_scale_without_statistics_is_refused_by_name() -> None:
    state = made(norm="instance").state_dict()
    with pytest.raises(DataError, match="--norm instance"):
        read_layout(state, "sadajem")
    assert read_layout(state, "sadajem", "instance").network.norm == "instance"


def test_a_second_name_with_other_values_is_refused() -> None:
    state = {**made(yopo=True).state_dict(), "f.layer_one.weight": torch.zeros(16, 3, 3, 3)}
    with pytest.raises(DataError, match=r"f.layer_one.weight is another name of f.conv1.weight"):
        read_layout(state, "jempp")


@pytest.mark.parametrize(
    ("options", "format", "message"),
    [
        ({"kind": Plain}, "jem", "look like wrn: give --format wrn"),
        ({}, "wrn", "give --format jempp"),
        ({"yopo": True}, "sadajem", "look like jempp or mebm or ebjdat"),
        ({"norm": "none", "linear": 10}, "sadajem", "look like jem or jempp or mebm or ebjdat"),
    ],
)
def test_a_wrong_format_is_refused_with_what_the_names_look_like(
    options: dict[str, Any], format: Format, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read_layout(made(**options).state_dict(), format)


@pytest.mark.parametrize(
    ("file", "name"), [("resnet20-12fca82f.th", "module|conv1"), ("resnet2b.pth", "conv1|0")]
)
@pytest.mark.parametrize("format", FORMATS)
def test_other_peoples_networks_are_refused_by_their_names(
    file: str, name: str, format: Format
) -> None:
    if not (PUBLISHED / file).exists():
        pytest.skip("no published checkpoints here")
    weights = read_checkpoint(PUBLISHED / file).weights
    with pytest.raises(DataError, match=rf"no known format: .*({name})"):
        read_layout(weights, format)


def test_classes_and_data_set_must_agree(tmp_path: Path) -> None:
    hundred = saved(tmp_path / "a.pt", made(classes=100))
    with pytest.raises(DataError, match="have 100 classes, but cifar10 has 10"):
        import_checkpoint(hundred, "sadajem", REGISTRY, dataset="cifar10")
    assert import_checkpoint(hundred, "sadajem", REGISTRY).dataset == "cifar100"
    seven = saved(tmp_path / "b.pt", made(classes=7))
    with pytest.raises(ConfigError, match="pass it by --dataset"):
        import_checkpoint(seven, "sadajem", REGISTRY)


def test_a_folder_that_exists_and_another_hash_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", made())
    with pytest.raises(DataError, match="has SHA-256"):
        import_checkpoint(path, "sadajem", REGISTRY, sha256="0" * 64)
    good = read_checkpoint(path).sha256
    import_checkpoint(path, "sadajem", REGISTRY, sha256=good.upper())
    with pytest.raises(ConfigError, match="is not empty"):
        import_checkpoint(path, "sadajem", REGISTRY)


# Damage: never a traceback, never other weights.


# The command.

app = typer.Typer()
app.command()(import_model)


def test_the_command_writes_the_folder_and_refuses_by_exit_code_6(tmp_path: Path) -> None:
    path = saved(tmp_path / "official.pt", made())
    where = ["--out", str(tmp_path / "model"), "--format", "sadajem", "--json"]
    done = CliRunner().invoke(app, [str(path), *where])
    assert done.exit_code == 0, done.output
    assert '"network": "wrn-10-1"' in done.output
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == [
        "README.md", "config.json", "model.safetensors",
    ]  # fmt: skip
    path.write_bytes(path.read_bytes()[:1000])
    done = CliRunner().invoke(app, [str(path), "--format", "sadajem"])
    assert done.exit_code == 6
    assert "is damaged" in done.stderr
    assert not (tmp_path / "official-imported").exists()
