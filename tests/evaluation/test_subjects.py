"""What can be judged, and what is refused before any slow work."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_tools import short_run
from imagefolders import split_folder
from torch import Tensor, nn
from toys import REGISTRY, gen, linear_model, toy_recipe, toy_registry

import jemkit as api
from jemkit import Bounds, ConfigError, DataError, MisfitError, PixelModel, train
from jemkit.attacks.pixel_model import check_subject, pixel_model, weights_hash
from jemkit.config.eval_settings import Settings, settings_of
from jemkit.evaluation.evaluate import judge
from jemkit.evaluation.export import export
from jemkit.evaluation.subjects import subject_at, subject_of
from jemkit.metrics.evaluator import Unmeasurable
from jemkit.runtime import checkpoint
from jemkit.runtime.files import write_tensors
from jemkit.testing import toy_task

CPU = torch.device("cpu")
TASK = toy_task()
DATA = TASK.images("valid")
ONLY = {"only": ("accuracy",)}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run on digits."""
    return short_run(tmp_path_factory.mktemp("subjects"))


class Sees(nn.Module):
    """A stranger's classifier, whose logits may be spoilt."""

    def __init__(self, spoil: str = "") -> None:
        super().__init__()
        self.linear, self.spoil = nn.Linear(64, 3), spoil

    def forward(self, x: Tensor) -> Tensor:
        logits = self.linear(x.flatten(1))
        if self.spoil == "probabilities":
            return logits.softmax(1)
        if self.spoil == "width":
            return logits[:, :2]
        return logits * float("nan") if self.spoil == "nan" else logits


def test_a_run_its_checkpoint_and_its_weights_are_one_subject(run: Path, tmp_path: Path) -> None:
    first = subject_at(run, REGISTRY, CPU)
    second = subject_at(run / "checkpoints" / "best", REGISTRY, CPU)
    x = first.test.unit()[:20]
    assert torch.equal(first.model(x), second.model(x))
    assert first.about["sha256"] == second.about["sha256"]
    assert first.folder == second.folder == run.resolve()
    assert first.about["trained_radius_px"] == first.radius_px == 25.5
    folder = export(run, out=tmp_path / "exported", registry=REGISTRY).folder
    third = subject_at(folder, REGISTRY, CPU)
    assert torch.equal(first.model(x), third.model(x))
    assert third.folder == folder


@pytest.mark.parametrize("exported", [False, True])
def test_on_other_images_the_trained_radius_is_that_of_the_training(
    run: Path, tmp_path: Path, exported: bool
) -> None:
    folder = export(run, out=tmp_path / "exported", registry=REGISTRY).folder if exported else run
    root = split_folder(tmp_path / "data", classes=tuple("0123456789"))
    target = subject_at(folder, REGISTRY, CPU, dataset={"use": "folder", "dir": str(root)})
    assert (target.radius_px, target.about["trained_radius_px"]) == (8, 25.5)


@pytest.mark.parametrize("exported", [False, True])
def test_on_other_images_chains_begin_where_those_of_the_run_do(
    tmp_path: Path, exported: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts, path = toy_registry(), tmp_path / "run"
    roots = [split_folder(tmp_path / name, n=n) for name, n in (("one", 20), ("two", 25))]
    data = [f"data.dir={roots[0]}", "data.use=folder"]
    train(toy_recipe(parts, "mebm", "ebjdat", "plain", *data), path, registry=parts)
    if exported:
        path = export(path, out=tmp_path / "exported", registry=parts).folder

    def begun(dataset: dict[str, str] | None) -> Tensor:
        cache = tmp_path / f"cache{len(list(tmp_path.iterdir()))}"  # keeps no moments yet
        cache.mkdir()
        monkeypatch.setenv("JEMKIT_CACHE", str(cache))
        density = subject_at(path, parts, CPU, dataset=dataset).model.density
        return density.start.draw(5, gen())

    own, other = begun(None), str(roots[1])
    assert torch.equal(begun({"use": "folder", "dir": other}), own)
    assert torch.equal(begun({"dir": other}), own)
    moved = roots[0].rename(tmp_path / "moved")
    assert torch.equal(begun({"dir": str(moved)}), own)
    if not exported:  # it has no moments of its own
        with pytest.raises(DataError, match="begins from Gaussians of the training images"):
            begun({"dir": other})
        target = subject_at(path, parts, CPU, dataset={"dir": other})
        options = {"generation": {"n": 16, "steps": 1}}
        with pytest.raises(Unmeasurable, match="begins from Gaussians of the training images"):
            judge(target, settings_of({"only": ("generation",), "options": options}), parts)


def test_a_damaged_exported_model_is_not_judged(run: Path, tmp_path: Path) -> None:
    folder = export(run, out=tmp_path / "exported", registry=REGISTRY).folder
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(DataError, match="missing or damaged"):
        subject_at(folder, REGISTRY, CPU)
    (folder / "config.json").write_bytes((run / "config.json").read_bytes())
    with pytest.raises(DataError, match="export format None"):
        subject_at(folder, REGISTRY, CPU)


def test_weights_alone_need_the_network_that_they_belong_to(tmp_path: Path) -> None:
    part, named = REGISTRY["network"].named("mlp-8-1")
    path = tmp_path / "mine.safetensors"
    model = api.LogSumExpEnergy(part.model_validate(named).build((1, 8, 8)), 10)
    write_tensors(path, model.state_dict())
    target = subject_at(path, REGISTRY, CPU, network="mlp-8-1", dataset={"use": "digits"})
    x = target.test.unit()[:5]
    assert torch.equal(target.model(x), model(2 * x - 1).logits)
    with pytest.raises(ConfigError, match="--network"):
        subject_at(path, REGISTRY, CPU)
    with pytest.raises(DataError, match="do not fit the model"):
        subject_at(path, REGISTRY, CPU, network="mlp-4-1")
    with pytest.raises(ConfigError, match=r"depth: .*such as 10, 16 or 28; got 11 "):
        subject_at(path, REGISTRY, CPU, network="wrn-11-1")
    with pytest.raises(ConfigError, match=r"'wrn-16-.' does not name a network"):
        subject_at(path, REGISTRY, CPU, network="wrn-16-\u00b2")


@pytest.mark.parametrize(("spoil", "error", "message"), [
    ("probabilities", MisfitError, "outputs probabilities.*softmax"),
    ("width", MisfitError, r"logits \[\d+, 3\]"),
    ("nan", DataError, "NaN or inf"),
])  # fmt: skip
def test_a_model_that_gives_no_logits_is_refused(
    spoil: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        api.evaluate(Sees(spoil), DATA, n_classes=3, registry=REGISTRY, **ONLY)


@pytest.mark.parametrize(("x", "y", "message"), [
    (torch.full((3, 1, 8, 8), 1.5), [0, 1, 2], r"from 1.5 to 1.5; expected \[0, 1\]"),
    (torch.rand(3, 1, 8, 8), [0, 1, 3], "label 3 is outside"),
    (torch.rand(3, 1, 8, 8), [1, 2, 3], "label 3 is outside 0..2; .*begin at 1: subtract 1"),
    (torch.rand(3, 1, 8, 8), [-1, 0, 1], "label -1 is outside"),
    (torch.rand(2, 1, 8, 8), [0, 1, 2], "one label each"),
    (torch.rand(3, 1, 8, 8), [0.0, 1.0, 1e30], "label 2147483648 is outside 0..2"),
])  # fmt: skip
def test_images_that_cannot_be_judged_on_are_refused(
    x: Tensor, y: list[float], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        api.evaluate(Sees(), (x, y), registry=REGISTRY, **ONLY)  # type: ignore[arg-type]


def test_a_module_in_zero_to_one_needs_no_scaling_and_an_energy_model_brings_its_range() -> None:
    stranger, energy = Sees(), linear_model(64, 3)
    x = DATA.unit()
    assert torch.equal(pixel_model(stranger)(x), stranger(x))
    assert torch.equal(pixel_model(energy, Bounds())(x), energy(2 * x - 1).logits)
    same = PixelModel(energy, Bounds())
    assert pixel_model(same) is same
    scores = pixel_model(stranger).scores(x)
    torch.testing.assert_close(scores.energy, -stranger(x).logsumexp(1))


def test_a_stranger_is_judged_like_a_model_of_ours_and_left_as_it_was() -> None:
    model = Sees().train()
    before = weights_hash(model)
    record = api.evaluate(model, DATA, n_classes=3, registry=REGISTRY, **ONLY)
    right = model(DATA.unit()).argmax(1) == DATA.y
    assert record.value("clean") == right.float().mean()
    assert weights_hash(model) == before
    assert all(p.requires_grad for p in model.parameters())


def test_a_model_in_train_mode_learns_nothing_from_the_images_that_it_is_judged_on() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 8), nn.BatchNorm2d(3), nn.Dropout(), nn.Flatten()).train()
    before, state = weights_hash(model), torch.get_rng_state()
    api.evaluate(model, DATA, n_classes=3, registry=REGISTRY, **ONLY)
    assert weights_hash(model) == before
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("output", [lambda z: (z, z), lambda z: z[:, 0], lambda z: {"logits": z}])
def test_an_output_that_is_no_table_of_logits_is_refused(
    output: Callable[[Tensor], object],
) -> None:
    class Wraps(Sees):
        def forward(self, x: Tensor) -> Tensor:
            return output(super().forward(x))  # type: ignore[return-value]

    with pytest.raises(MisfitError, match="expected a tensor of logits"):
        api.evaluate(Wraps(), DATA, n_classes=3, registry=REGISTRY, **ONLY)


def test_a_run_brings_the_buffer_that_training_left(run: Path) -> None:
    subject = subject_at(run, REGISTRY, CPU)
    state = checkpoint.load(run / "checkpoints" / "best")["density"]
    assert subject.model.density.buffer.chains_begun == state["drawn"] > 0  # type: ignore[attr-defined]
    assert torch.equal(subject.model.density.buffer.states, state["states"])  # type: ignore[attr-defined]


def test_a_data_set_brings_its_classes_and_its_radius() -> None:
    digits = REGISTRY["dataset"]["digits"]()
    subject = subject_of(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), digits)
    assert (subject.n_classes, subject.radius_px) == (10, 25.5)
    assert subject.images is not None
    assert len(subject.images("valid").y) == 130


def test_the_hash_of_weights_changes_with_any_of_them() -> None:
    model = Sees()
    before = weights_hash(model)
    with torch.no_grad():
        model.linear.bias[2] += 1e-6
    assert weights_hash(model) != before


def test_a_checkpoint_outside_its_run_and_an_empty_folder_are_refused(
    run: Path, tmp_path: Path
) -> None:
    alone = tmp_path / "somewhere" / "best"
    shutil.copytree(run / "checkpoints" / "best", alone)
    with pytest.raises(DataError, match="outside its run"):
        subject_at(alone, REGISTRY, CPU)
    with pytest.raises(DataError, match="not a run of jemkit"):
        subject_at(tmp_path, REGISTRY, CPU)
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((run / "config.json").read_bytes())
    (bare / "checkpoints").mkdir()
    with pytest.raises(DataError, match="no complete best checkpoint"):
        subject_at(bare, REGISTRY, CPU)
    with pytest.raises(ConfigError, match="--network is only for a file"):
        subject_at(run, REGISTRY, CPU, network="mlp-8-1")


def test_a_model_that_hardly_beats_guessing_is_warned_about() -> None:
    guess = Sees()
    with torch.no_grad():
        guess.linear.weight.zero_()
        guess.linear.bias.copy_(torch.tensor([2.0, 0, 0]))
    record = api.evaluate(guess, DATA, registry=REGISTRY, **ONLY)
    assert any("preprocessing inside the model" in w for w in record.warnings)


def test_a_pass_polls_whether_to_stop() -> None:
    subject = subject_of(Sees(), DATA)
    requested = settings_of(ONLY)
    with pytest.raises(api.Preempted, match="same command continues"):
        judge(subject, requested, REGISTRY, stop=lambda: True)
    assert isinstance(requested, Settings)
    check_subject(subject.model, DATA.unit(), 3)  # the poll is taken off again


def test_images_may_come_as_a_pair_and_as_arrays() -> None:
    model = Sees()
    pair = (DATA.unit(), DATA.y)
    arrays = tuple(part.numpy() for part in pair)
    record = [
        api.evaluate(model, given, n_classes=3, registry=REGISTRY, only="accuracy").value("clean")
        for given in (DATA, pair, arrays)
    ]
    assert record[0] == record[1] == record[2]
    with pytest.raises(DataError, match="expected a data set, or images"):
        api.evaluate(model, 3, registry=REGISTRY, **ONLY)


def test_a_model_says_itself_how_many_classes_it_knows() -> None:
    few = DATA.take(torch.arange(2))
    record = api.evaluate(Sees(), few, registry=REGISTRY, **ONLY)
    assert record.figure("clean").n == 2
    assert any("of 3 classes" in warning for warning in record.warnings)
    with pytest.raises(MisfitError, match="one output per image"):
        api.evaluate(nn.Sequential(nn.Flatten(), nn.Linear(64, 1)), few, registry=REGISTRY, **ONLY)
    for n in (1, 0, -1):
        with pytest.raises(ConfigError, match=f"n_classes = {n}: expected 2 or more"):
            api.evaluate(Sees(), few, n_classes=n, registry=REGISTRY, **ONLY)


@pytest.mark.parametrize("n", [1, 3, 5])
def test_images_that_leave_classes_out_are_judged_and_the_record_names_the_classes(n: int) -> None:
    wide = nn.Sequential(nn.Flatten(), nn.Linear(64, 1000))
    part = (torch.rand(n, 1, 8, 8), torch.arange(n) * 7)
    record = api.evaluate(wide, part, registry=REGISTRY, **ONLY)  # type: ignore[arg-type]
    assert record.figure("clean").n == n
    (messages,) = (w for w in record.warnings if "none of class" in w)
    assert f"{n} of 1000 classes" in messages


TYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", TYPES)
def test_images_of_any_float_type_are_taken_as_float32(dtype: torch.dtype) -> None:
    images = api.Images((DATA.unit() * 16).round() / 16, DATA.y)  # no type rounds a sixteenth
    model = Sees()
    record = [
        api.evaluate(model, (given, images.y), registry=REGISTRY, **ONLY)  # type: ignore[arg-type]
        for given in (images.x, images.x.to(dtype))
    ]
    assert record[0].value("clean") == record[1].value("clean")
    assert record[0].protocol["data_sha256"] == record[1].protocol["data_sha256"]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("attack", ["pgd", "square"])
def test_a_model_of_any_float_type_is_attacked_in_float32(dtype: torch.dtype, attack: str) -> None:
    recorded: list[torch.dtype] = []

    class Typed(Sees):
        def forward(self, x: Tensor) -> Tensor:
            recorded.append(x.dtype)
            logits: Tensor = super().forward(x)
            return logits

    requested = {"attacks": attack, "only": "robustness", "eps_px": 40}
    quiet = {"robustness": {"indicators": False}, "square": {"queries": 3}}
    options = {k: v for k, v in quiet.items() if k in (attack, "robustness")}
    record = api.evaluate(
        Typed().to(dtype),
        DATA,
        registry=REGISTRY,
        options=options,
        **requested,  # type: ignore[arg-type]
    )
    assert recorded[-1] == dtype
    (name,) = (figure.name for figure in record.figures if figure.name != "clean")
    assert record.value(name) <= record.value("clean")
    card = record.figure(name).protocol
    assert card["max_delta_px"]["Linf"] <= 40 + 1e-3
    own = {} if dtype == torch.float32 else {"weight_types": str(dtype).removeprefix("torch.")}
    assert {k: v for k, v in card.items() if k == "weight_types"} == own


@pytest.mark.filterwarnings("ignore")
def test_a_quantised_model_is_judged_and_its_hash_tells_its_weights() -> None:
    modules = [nn.Sequential(nn.Flatten(), nn.Linear(64, 3)) for _ in range(2)]
    one, two = (torch.ao.quantization.quantize_dynamic(m, {nn.Linear}) for m in modules)
    assert weights_hash(one) != weights_hash(two)
    requested = {"attacks": ("fgsm",), "only": ("robustness",)}
    record = api.evaluate(one, DATA, n_classes=3, registry=REGISTRY, **requested)  # type: ignore[arg-type]
    assert record.value("fgsm") == record.value("clean")  # it has no gradient, and that is said
    assert any("give the loss no gradient" in warning for warning in record.warnings)


def test_a_model_of_mixed_types_gets_what_its_first_layer_takes_and_else_one_sentence() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(64, 8).half(), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.last(self.first(x.flatten(1)).float())
            return logits

    assert api.evaluate(Mixed(), DATA, registry=REGISTRY, **ONLY).figure("clean").n == len(DATA.y)
    torn = nn.Sequential(nn.Flatten(), nn.Linear(64, 8).half(), nn.Linear(8, 3))
    with pytest.raises(MisfitError, match=r"neither in float32 nor .* float16: .*model.float"):
        api.evaluate(torn, DATA, registry=REGISTRY, **ONLY)


def test_arrays_are_taken_however_they_lie_in_memory() -> None:
    x, y = DATA.unit().numpy(), DATA.y.numpy()
    given = [(x[::-1], y[::-1]), (x.astype(">f4"), y.astype("uint8")), ([*DATA.unit()], y.tolist())]
    model = Sees()
    record = [
        api.evaluate(model, pair, registry=REGISTRY, **ONLY).value("clean")  # type: ignore[arg-type]
        for pair in given
    ]
    assert record[0] == record[1] == record[2]


def test_bytes_are_the_images_that_they_stand_for() -> None:
    model = PixelModel(linear_model(64, 3))
    pixels = torch.arange(2 * 64, dtype=torch.uint8).view(2, 1, 8, 8)
    assert torch.equal(model(pixels), model(pixels.float() / 255))
