"""Checks of an installation: packages, devices, weights, and results on a small model."""

import shutil
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F

from jemkit.attacks.base import Threat
from jemkit.attacks.pgd import PGD
from jemkit.attacks.pixel_model import PixelModel
from jemkit.config.registry import Registry
from jemkit.errors import JemkitError
from jemkit.models.networks import SmallCNN
from jemkit.runtime.extras import install
from jemkit.runtime.files import cache_folder
from jemkit.runtime.torchvision_compat import torchvision
from jemkit.sampling.kernels import SGLD, run
from jemkit.testing.toys import toy_model, toy_task

State = Literal["ok", "warn", "fail"]


class Check(NamedTuple):
    """One check."""

    name: str
    state: State
    what: str
    advice: str  # empty if the check passed


GIGABYTE = 2**30

EXTRAS = {
    "huggingface_hub": ("hub", "jemkit export --push"),
    "torch_fidelity": ("metrics", "FID and IS by Inception"),
    "tensorboard": ("tensorboard", "--tracker tensorboard"),
    "wandb": ("wandb", "--tracker wandb"),
    "mlflow": ("mlflow", "--tracker mlflow"),
    "gradio": ("show", "jemkit show"),
    "svglib": ("figures", "the PDF files of --figures"),
}
"""Packages that only one feature needs: the extra, and that feature."""

CACHES = {
    "LPIPS trunk": ("alexnet-owt-7be5be79.pth", "objective.distance.use = lpips"),
    "Inception": ("weights-inception-2015-12-05-6726825d.pth", "FID and IS by Inception"),
}
"""Files in torch's cache of weights, and their use."""


def diagnose(registry: Registry, folder: Path) -> list[Check]:
    """All checks; `folder` is the place of future runs. Downloads nothing."""
    checks = [_torch(), _cuda(), _vision()]
    checks += [_package(name) for name in ("lpips", "pyautoattack", "safetensors", "sklearn")]
    checks += [_extra(name) for name in EXTRAS]
    checks += [_cached(name) for name in CACHES]
    checks += _plugins(registry)
    checks += [_disk(folder), _writable("this folder", folder), _writable("cache", cache_folder())]
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return checks + [self_test(torch.device(device)) for device in devices]


def healthy(checks: list[Check]) -> bool:
    return all(check.state != "fail" for check in checks)


def _torch() -> Check:
    about = f"torch {torch.__version__}, {torch.get_num_threads()} threads"
    parts = torch.__version__.split("+")[0].split(".")
    old = tuple(int(part) for part in parts[:2] if part.isdigit()) < (2, 11)
    return Check(
        "torch", "fail" if old else "ok", f"jemkit {version('jemkit')}, {about}",
        "install torch 2.11 or newer" if old else "",
    )  # fmt: skip


def _cuda() -> Check:
    if not torch.cuda.is_available():
        built = torch.version.cuda or "none"
        return Check(
            "CUDA", "warn", f"no device; torch is built for CUDA {built}",
            "small data sets run on the CPU; for CIFAR use a machine with a GPU",
        )  # fmt: skip
    device = torch.cuda.get_device_properties(0)
    what = f"{device.name}, {device.total_memory / GIGABYTE:.0f} GiB, CUDA {torch.version.cuda}"
    return Check("CUDA", "ok", what, "")


def _vision() -> Check:
    try:
        package = torchvision()
    except JemkitError as error:
        return Check("torchvision", "fail", str(error), "pip install torchvision")
    about = f"torchvision {version('torchvision')}"
    if package.extension._has_ops():
        return Check("torchvision", "ok", f"{about} with its operators", "")
    return Check(
        "torchvision", "warn", f"{about}; its operators do not load with this build of torch",
        "data sets and models work; for the operators install CPU or CUDA builds of both",
    )  # fmt: skip


def _package(name: str) -> Check:
    distribution = {"sklearn": "scikit-learn"}.get(name, name)
    try:
        import_module(name)
        return Check(name, "ok", f"{distribution} {version(distribution)}", "")
    except Exception as error:  # a broken package may raise anything
        return Check(
            name, "fail", f"{type(error).__name__}: {error}", f"pip install {distribution}"
        )


def _extra(name: str) -> Check:
    extra, use = EXTRAS[name]
    try:
        installed = version(name)
    except PackageNotFoundError:
        advice = f"for {use}: {install(extra)}"
        return Check(name, "warn", "not installed", advice)
    return Check(name, "ok", f"{name} {installed}", "")


def _cached(name: str) -> Check:
    file, use = CACHES[name]
    path = Path(torch.hub.get_dir()) / "checkpoints" / file
    if path.is_file():
        return Check(f"{name} weights", "ok", str(path), "")
    return Check(f"{name} weights", "warn", "not in torch's cache", f"for {use}: put it at {path}")


def _plugins(registry: Registry) -> list[Check]:
    """A fault of a third-party plug-in is a warning; one of jemkit's own means a broken install."""
    offers = [offer for shelf in registry.shelves.values() for offer in shelf.offers()]
    whose = sorted({offer.distribution for offer in offers})
    checks = [Check("plug-ins", "ok", f"{len(offers)} parts of {', '.join(whose)}", "")]
    for fault in registry.faults:
        ours = fault.distribution == "jemkit"
        advice = "reinstall jemkit" if ours else f"tell the authors of {fault.distribution}"
        name = f"plug-in {fault.plugin}"
        reason = " ".join(fault.reason.split())
        checks.append(Check(name, "fail" if ours else "warn", reason, advice))
    return checks


def _disk(folder: Path) -> Check:
    free = shutil.disk_usage(_existing(folder)).free / GIGABYTE
    state: State = "fail" if free < 0.25 else "warn" if free < 5 else "ok"
    advice = "a wrn-28-10 run with its buffer needs 2 GiB: free some space" if state != "ok" else ""
    return Check("disk", state, f"{free:.1f} GiB free at {folder}", advice)


def _writable(name: str, folder: Path) -> Check:
    there = _existing(folder)
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        advice = "set JEMKIT_CACHE to a writable folder" if name == "cache" else "choose another"
        return Check(name, "fail", f"{folder} cannot be written: {error.strerror}", advice)
    return Check(name, "ok", f"{folder} can be written", "")


def _existing(folder: Path) -> Path:
    """The folder, or its nearest parent that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if path.is_dir())


def self_test(device: torch.device) -> Check:
    """Three checks on a small network: energies, a chain, an attack in its ball."""
    start = time.monotonic()
    try:
        broken = [name for name, law in LAWS.items() if not law(device)]
    except (RuntimeError, JemkitError) as error:
        broken = [" ".join(str(error).split())]
    what = f"{', '.join(LAWS)}, in {time.monotonic() - start:.1f} s"
    if not broken:
        return Check(f"self-test {device}", "ok", what, "")
    advice = "this torch computes wrong results on this device; install another version"
    return Check(f"self-test {device}", "fail", f"broken: {'; '.join(broken)}", advice)


def _toys(device: torch.device) -> tuple[PixelModel, torch.Tensor, torch.Generator]:
    """A small network, images and a generator, the same at each call."""
    model = toy_model(toy_task(n_classes=10), SmallCNN(channels=4))
    rng = torch.Generator(device).manual_seed(0)
    x = torch.rand((16, 1, 8, 8), generator=rng, device=device)
    return PixelModel(model.to(device)), x, rng


def _energies(device: torch.device) -> bool:
    """logsumexp over y of -E(x, y) is -E(x) (Eqs. 1, 3)."""
    subject, x, _ = _toys(device)
    with torch.no_grad():
        scores = subject.scores(x)
    y = torch.arange(10, device=device).expand(16, 10)
    joint = torch.stack([scores.joint(y[:, k]) for k in range(10)], dim=1)
    return torch.allclose((-joint).logsumexp(dim=1), -scores.energy, atol=1e-4)


def _chain(device: torch.device) -> bool:
    """A noise-free chain of small steps lowers the energy and stays finite."""
    subject, x, rng = _toys(device)
    end = run(SGLD(step_size=0.01, noise=0.0), lambda z: subject.scores(z).energy, x, rng, 20)
    with torch.no_grad():
        before, after = subject.scores(x).energy, subject.scores(end).energy
    return bool(end.isfinite().all() and (after <= before + 1e-5).all())


def _attack(device: torch.device) -> bool:
    """PGD stays in its ball and in [0, 1], and increases the cross-entropy of some image."""
    subject, x, rng = _toys(device)
    threat = Threat("Linf", 8)
    with torch.no_grad():
        y = subject(x).argmax(1)
    (perturb,) = PGD(steps=5).bind(subject, threat).values()
    x_adv = perturb(x, y, rng)
    with torch.no_grad():
        worse = F.cross_entropy(subject(x_adv), y) > F.cross_entropy(subject(x), y)
    inside = (x_adv - x).abs().max() <= threat.eps + 1e-6
    return bool(inside and x_adv.min() >= 0 and x_adv.max() <= 1 and worse)


LAWS: dict[str, Callable[[torch.device], bool]] = {
    "energies": _energies,
    "a chain": _chain,
    "an attack": _attack,
}
