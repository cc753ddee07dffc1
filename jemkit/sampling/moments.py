"""Gaussians of the training images: estimated, cached, or from an exported model."""

import hashlib
import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from jemkit.data import Images, Task
from jemkit.errors import ConfigError, DataError
from jemkit.runtime.disk import TIGHT, free_bytes, readable
from jemkit.runtime.files import cache_folder, load_tensors, read_json, write_tensors

log = logging.getLogger("jemkit")
notices = logging.getLogger("jemkit.data")

Kind = Literal["gaussian", "mixture"]

JITTER = 1e-4  # on a covariance's diagonal, as in JEM++, so that few images still give full rank
WIDEST = 32  # maximum image size, in pixels, for whole covariances
LARGEST = 200_000_000  # maximum bytes of a file of moments
RANK = 256  # maximum rank of a low-rank form
LIMIT = 2**30  # maximum bytes of all files in the cache; the least recently used are removed first
MOMENTS = "moments.safetensors"  # the file of moments in an exported model


class Form(NamedTuple):
    """How the covariances of an initial distribution are stored."""

    kind: Kind
    groups: int  # Gaussians
    pixels: int  # numbers of an image
    rank: int | None  # of the low-rank part; None: whole covariances

    @property
    def bytes(self) -> int:
        if self.rank is None:
            return 4 * self.groups * (self.pixels + self.pixels * (self.pixels + 1) // 2)
        return 4 * self.groups * self.pixels * (self.rank + 2)

    def __str__(self) -> str:
        """The form in a protocol."""
        if self.rank is None:
            return self.kind
        return f"{self.kind} (covariances of rank {self.rank} at most, and a diagonal)"


def form_of(task: Task, *, classwise: bool) -> Form:
    """Whole covariances if images and file are small enough, else a low-rank form."""
    kind: Kind = "mixture" if classwise else "gaussian"
    pixels = task.shape[0] * task.shape[1] * task.shape[2]
    whole = Form(kind, task.n_classes if classwise else 1, pixels, None)
    if max(task.shape[1:]) <= WIDEST and whole.bytes <= LARGEST:
        return whole
    room = LARGEST // (4 * whole.groups * pixels) - 2
    return whole._replace(rank=max(1, min(RANK, room)))


def check_groups(task: Task) -> None:
    """Reject training images that lack a class, which then has no Gaussian."""
    counts = torch.bincount(task.images("train").y, minlength=task.n_classes)
    empty = (counts == 0).nonzero().flatten().tolist()
    if empty:
        raise ConfigError(
            f"no training image of class {', '.join(map(str, empty[:5]))}, so it has no Gaussian; "
            "use more images (run.max_train) or backbone.start.use=gaussian"
        )


def moments_of(task: Task, *, classwise: bool) -> dict[str, Tensor]:
    """Means and covariances of un-augmented training images, in the model's range.

    They come from the exported model, else from the cache, else they are estimated. With whole
    covariances `factors` [K, D (D + 1) / 2] are the lower triangles of their Cholesky factors; else
    `basis` [K, D, R] and `spread` [K, D] are the low-rank part and the standard deviations of the
    rest.
    """
    form = form_of(task, classwise=classwise)
    if task.moments is not None and (stored := _brought(task.moments, task, form)):
        return stored
    if not task.hash:  # nobody knows which images these are
        return _estimate(task, form)
    about = f"{task.hash} {tuple(task.bounds)} {form} {JITTER} packed"
    key = hashlib.sha256(about.encode()).hexdigest()
    path = cache_folder() / "moments" / f"{key[:32]}.safetensors"
    cached = _from_cache(path, form)
    if cached is None:
        cached = _estimate(task, form)
        _keep(path, cached)
    return cached


def brought(config: Path) -> Path | None:
    """The file of moments next to a model's config.json, if that lists it, and so its hash."""
    listed = read_json(config)
    hashes = listed.get("sha256") if isinstance(listed, dict) else None
    return config.parent / MOMENTS if isinstance(hashes, dict) and MOMENTS in hashes else None


def expanded(triangles: Tensor, size: int) -> Tensor:
    """Lower triangular matrices [K, size, size] from their triangles [K, size (size + 1) / 2]."""
    rows, columns = torch.tril_indices(size, size, device=triangles.device)
    shape = (len(triangles), size, size)
    whole = torch.zeros(shape, dtype=triangles.dtype, device=triangles.device)
    whole[:, rows, columns] = triangles
    return whole


def _brought(file: Path, task: Task, form: Form) -> dict[str, Tensor]:
    """The moments of this form in an exported model's file; empty if it has none."""
    prefix = f"{form.kind}."
    tensors = load_tensors(file)
    moments = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    if moments and not _fits(moments, form):
        raise DataError(f"{file} does not fit images of {list(task.shape)}")
    return moments


def _from_cache(path: Path, form: Form) -> dict[str, Tensor] | None:
    if not path.is_file():
        return None
    try:
        moments = load_tensors(path)
    except DataError as error:  # damaged, or removed meanwhile: estimated again
        log.warning("%s", error)
        return None
    if not _fits(moments, form):
        return None
    with suppress(OSError):
        os.utime(path)  # mark it as recently used
    return moments


def _fits(moments: Mapping[str, Tensor], form: Form) -> bool:
    k, d = form.groups, form.pixels
    shapes = {name: list(tensor.shape) for name, tensor in moments.items()}
    if form.rank is None:
        return shapes == {"means": [k, d], "factors": [k, d * (d + 1) // 2]}
    rank = moments["basis"].shape[-1] if "basis" in moments else 0
    return shapes == {"means": [k, d], "basis": [k, d, rank], "spread": [k, d]}


def _keep(path: Path, moments: Mapping[str, Tensor]) -> None:
    """Cache moments for the next run, if there is space; errors are not fatal."""
    size = sum(tensor.nbytes for tensor in moments.values())
    try:
        free = free_bytes(path.parent)
        if size > TIGHT * free:
            log.warning(
                "the moments of the data are not cached: %s has %s free of the %s that they take",
                path.parent, readable(free), readable(size),
            )  # fmt: skip
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, moments)
        _prune(path.parent, LIMIT)
    except OSError as error:
        log.warning("the moments of the data could not be cached in %s: %s", path, error)


def _prune(folder: Path, limit: int) -> None:
    """Keep the files that were used most recently, as many as fit, and the newest in any case."""
    newest, *others = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
    total = newest.stat().st_size
    for path in others:
        total += path.stat().st_size
        if total > limit:
            path.unlink(missing_ok=True)


def _estimate(task: Task, form: Form) -> dict[str, Tensor]:
    images, mixture = _training_images(task, form), form.kind == "mixture"
    if mixture:
        check_groups(task)
    if form.bytes > 10_000_000:
        notices.info(
            "estimating %d Gaussian(s) of %d training images of %d numbers each",
            form.groups, len(images.y), form.pixels,
        )  # fmt: skip
    x = task.bounds.from_unit(images.unit()).flatten(1)
    groups = [images.y == k for k in range(form.groups)] if mixture else [slice(None)]
    parts: list[tuple[Tensor, ...]]
    if form.rank is None:
        names = ["means", "factors"]
        rows, columns = torch.tril_indices(form.pixels, form.pixels)
        parts = [(m, f[rows, columns]) for m, f in (gaussian(x[group]) for group in groups)]
    else:
        names = ["means", "basis", "spread"]
        rank = max(1, min(form.rank, max(len(x[group]) for group in groups) - 1))
        parts = [low_rank(x[group], rank) for group in groups]
    return {n: torch.stack(t) for n, t in zip(names, zip(*parts, strict=True), strict=True)}


def _training_images(task: Task, form: Form) -> Images:
    try:
        return task.images("train")
    except DataError as error:
        raise DataError(
            f"{error}. The start {form.kind!r} begins from Gaussians of the training images, which "
            "neither the model's folder nor the cache holds: give --data-dir DIR where the images "
            "are, or --start uniform"
        ) from None


def gaussian(x: Tensor) -> tuple[Tensor, Tensor]:
    """The mean [D] of rows [N, D], and the Cholesky factor of their covariance (divided by N)."""
    mean = x.mean(dim=0)
    centred = x - mean
    covariance = (centred.T @ centred).double() / len(x)
    covariance.diagonal().add_(JITTER)
    return mean, torch.linalg.cholesky(covariance).float()


def low_rank(x: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The mean [D] of rows [N, D], leading directions [D, rank], deviations [D] of the rest.

    The covariance (divided by N) is basis basis^T + diag(spread^2), exact on its diagonal, and
    exact but for JITTER where `rank` is N - 1 or more.
    """
    n, d = x.shape
    mean = x.mean(dim=0)
    centred = (x - mean) / n**0.5
    basis = torch.zeros((d, rank))
    leading = _directions(centred, min(rank, n, d))
    basis[:, : leading.shape[1]] = leading
    rest = centred.square().sum(dim=0) - basis.square().sum(dim=1)
    return mean, basis, (rest.clamp(min=0) + JITTER).sqrt()


def _directions(c: Tensor, rank: int) -> Tensor:
    """The leading eigenvectors [D, rank] of c^T c, each as long as its standard deviation."""
    from sklearn.utils.extmath import randomized_svd

    _, lengths, directions = randomized_svd(c.numpy(), rank, random_state=0)
    return torch.from_numpy(directions.T * lengths)
