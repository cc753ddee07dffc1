"""Labels in their usual forms: whole numbers of any type, columns, one-hot rows."""

from torch import Tensor

from jemkit.errors import DataError

MOST = 2**31
"""Larger than any number of classes; floats above the range of int64 cannot be indices."""


def class_indices(y: Tensor, n_classes: int, source: str) -> Tensor:
    """Labels [N] int64 in 0..n_classes - 1, or a DataError that says what is wrong."""
    if y.is_complex():
        raise DataError(f"{source}: labels of type {y.dtype}; expected whole numbers")
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    elif y.ndim == 2:
        y = _from_one_hot(y, n_classes, source)
    if y.ndim != 1:
        raise DataError(f"{source}: labels of shape {list(y.shape)}; expected [N], one per image")
    if y.is_floating_point():
        _check_whole(y, source)
    indices = (y.double().clamp(-MOST, MOST) if y.is_floating_point() else y).detach().long()
    _check_range(indices, n_classes, source)
    return indices


def count_classes(y: Tensor) -> int:
    """The number of classes: columns of one-hot rows, or the largest label plus one."""
    if y.ndim == 2 and y.shape[1] > 1:
        return y.shape[1]
    if y.is_complex() or not y.numel() or (y.is_floating_point() and not y.isfinite().all()):
        return 1  # `class_indices` reports what is wrong
    return min(MOST, max(1, int(y.max() if y.is_floating_point() else y.long().max()) + 1))


def _from_one_hot(y: Tensor, n_classes: int, source: str) -> Tensor:
    if y.shape[1] != n_classes:
        raise DataError(
            f"{source}: labels of shape {list(y.shape)}; expected [N], or one-hot rows "
            f"[N, {n_classes}] of {n_classes} classes"
        )
    rows = y.double()
    wrong = ~(((rows == 0) | (rows == 1)).all(dim=1) & (rows.sum(dim=1) == 1))
    if wrong.any():
        raise DataError(
            f"{source}: row {int(wrong.nonzero()[0])} of the labels {list(y.shape)} is not "
            "one-hot; soft labels, and several labels per image, are not supported: expected one "
            "class each, such as y.argmax(dim=1)"
        )
    return rows.argmax(dim=1)


def _check_whole(y: Tensor, source: str) -> None:
    values = y.detach().double()
    wrong = (values != values.round()) | ~values.isfinite()
    if wrong.any():
        first = int(wrong.nonzero()[0])
        raise DataError(
            f"{source}: the label of image {first} is {float(values[first]):.6g}, not a whole "
            "number; expected the index of a class"
        )


def _check_range(y: Tensor, n_classes: int, source: str) -> None:
    outside = (y < 0) | (y >= n_classes)
    if not outside.any():
        return
    hint = ""
    if int(y.min()) == 1 and int(y.max()) == n_classes:
        hint = "; they seem to begin at 1: subtract 1"
    elif int(y.min()) == -1:
        hint = "; omit images with the label -1, which usually means unknown"
    elif not bool((y < 0).any()):
        hint = "; pass the right n_classes, or number the classes from 0 without gaps"
    raise DataError(f"{source}: label {int(y[outside][0])} is outside 0..{n_classes - 1}{hint}")
