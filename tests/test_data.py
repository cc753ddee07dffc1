"""Data: units, splits that never meet, batches that can be gone on with, plain augmentation."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds
from torch import Tensor
from toys import Toy, gen

from jemkit import Augmentation, Bounds, ConfigError, DataError, Images, Loader, Splits, Views
from jemkit.data import augmented, checked
from jemkit.runtime.pytree import same
from jemkit.testing.toys import toy_images


class Keen(Toy):
    """A data set that lets nobody read its test split."""

    def load(self, split: str) -> Images:
        if split == "test":
            raise KeyError("the test split was read")
        return super().load(split)


def rows(images: Images) -> set[bytes]:
    return {x.numpy().tobytes() for x in images.x}


@given(n=st.integers(20, 120), share=st.floats(0.05, 0.5))
def test_training_and_validation_share_no_image_and_lose_none(n: int, share: float) -> None:
    splits = Splits(Toy(n=n), valid_fraction=share)
    train, valid = splits.images("train"), splits.images("valid")
    assert not rows(train) & rows(valid)
    assert rows(train) | rows(valid) == rows(Toy(n=n).load("train"))
    assert len(valid.y) == round(n * share)


@given(n=st.integers(30, 120), share=st.floats(0.1, 0.5))
def test_every_split_holds_the_classes_in_proportion(n: int, share: float) -> None:
    splits = Splits(Toy(n=n), valid_fraction=share)
    for split in ("train", "valid"):
        y = splits.images(split).y
        counts = y.bincount(minlength=3)
        assert int(counts.max() - counts.min()) <= 2


def test_splits_are_the_same_for_every_run() -> None:
    one, other = Splits(Toy()), Splits(Toy())
    torch.rand(7)  # nothing of torch's own generator enters
    for split in ("train", "valid", "test"):
        assert same(list(one.images(split)), list(other.images(split)))


@given(most=st.integers(10, 60))
def test_fewer_training_images_are_a_beginning_of_the_same_order(most: int) -> None:
    splits = Splits(Toy(), max_train=most)
    train, valid = splits.images("train"), splits.images("valid")
    assert len(train.y) + len(valid.y) == most
    assert not rows(train) & rows(valid)
    assert len(train.y.unique()) == 3


def test_training_and_validation_are_read_without_the_test_split() -> None:
    splits = Splits(Keen())
    assert len(splits.images("train").y)
    assert len(splits.images("valid").y)
    with pytest.raises(KeyError):
        splits.images("test")


@pytest.mark.parametrize(("n", "share"), [(3, 0.1), (60, 0.001), (60, 0.999)])
def test_a_run_without_validation_or_without_training_images_is_refused(
    n: int, share: float
) -> None:
    with pytest.raises(ConfigError, match="both must be some"):
        Splits(Toy(n=n), valid_fraction=share).images("valid")


def loader(seed: int = 0, n: int = 20, batch_size: int = 6, **views: object) -> Loader:
    augmentation = Augmentation(pad=1, flip=True)
    images = toy_images(n, 3, 8, 1, 0)
    return Loader(
        images, batch_size, gen(seed), views=Views(**views), bounds=Bounds(),
        augmentation=augmentation,
    )  # fmt: skip


@given(n=st.integers(2, 40), size=st.integers(1, 50), seed=seeds)
def test_an_epoch_shows_no_image_twice_in_whole_batches(n: int, size: int, seed: int) -> None:
    batches = loader(seed, n, size)
    for _ in range(2):
        index = torch.cat([batches.batch().index for _ in range(batches.steps_per_epoch)])
        assert len(index.unique()) == len(index) == n // min(n, size) * min(n, size)


@given(cut=st.integers(0, 9), seed=seeds)
def test_a_loader_goes_on_where_its_saved_state_stood(cut: int, seed: int) -> None:
    whole, again = loader(seed, noise_x=0.1), loader(seed + 1, noise_x=0.1)
    for _ in range(cut):
        whole.batch()
    again.load_state_dict(whole.state_dict())
    for _ in range(5):
        assert same(list(whole.batch()), list(again.batch()))


def test_a_saved_state_is_not_moved_by_later_batches() -> None:
    batches = loader()
    batches.batch()
    state = batches.state_dict()
    stored = {k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()}
    for _ in range(4):
        batches.batch()
    assert same(state, stored)


@given(share=st.floats(0.01, 1))
def test_the_densitys_view_shows_the_first_of_the_same_images(share: float) -> None:
    batch = loader(augment_x=False, augment_pos=False, pos_share=share).batch()
    assert len(batch.x_pos) == max(1, round(share * 6))
    assert torch.equal(batch.x_pos, batch.x[: len(batch.x_pos)])


def test_views_are_augmented_and_noised_apart_as_their_options_say() -> None:
    images = toy_images(20, 3, 8, 1, 0)
    clean = Bounds().from_unit(images.unit())
    batch = loader(augment_x=True, augment_pos=False).batch()
    assert torch.equal(batch.x_pos, clean[batch.index])
    assert not torch.equal(batch.x, clean[batch.index])
    batch = loader(augment_x=False, augment_pos=False, noise_pos=0.03).batch()
    assert torch.equal(batch.x, clean[batch.index])
    noise = batch.x_pos - clean[batch.index]
    assert 0.02 < float(noise.std()) < 0.04
    assert torch.equal(batch.y, images.y[batch.index])
    twice = loader(augment_x=True, augment_pos=True).batch()
    assert not torch.equal(twice.x, twice.x_pos)


def test_images_reach_the_model_in_its_range() -> None:
    batch = loader(augment_x=False).batch()
    assert batch.x.dtype == torch.float32
    assert batch.x.min() >= -1
    assert batch.x.max() <= 1
    assert batch.x.min() < -0.5
    assert batch.x.max() > 0.5


def by_hand(x: Tensor, pad: int, rows: int, columns: int, mirror: bool) -> Tensor:
    """One image [C, H, W] padded, cropped at an offset, and mirrored."""
    h, w = x.shape[1:]
    padded = F.pad(x.float().unsqueeze(0), [pad] * 4, mode="reflect")[0]
    crop = padded[:, pad + rows : pad + rows + h, pad + columns : pad + columns + w]
    return crop.flip(2) if mirror else crop


@given(seed=seeds, pad=st.integers(0, 4), flip=st.booleans(), channels=st.sampled_from([1, 3]))
def test_augmentation_is_a_reflect_padded_crop_and_a_mirror(
    seed: int, pad: int, flip: bool, channels: int
) -> None:
    x = torch.randint(256, (5, channels, 6, 6), generator=gen(seed)).to(torch.uint8)
    changed = augmented(x, Augmentation(pad=pad, flip=flip), gen(seed))
    assert changed.dtype == x.dtype
    for image, out in zip(x, changed, strict=True):
        choices = [
            by_hand(image, pad, rows, columns, mirror)
            for rows in range(-pad, pad + 1)
            for columns in range(-pad, pad + 1)
            for mirror in ([False, True] if flip else [False])
        ]
        assert any(torch.equal(out.float(), choice) for choice in choices)


def test_every_crop_and_mirror_comes_up() -> None:
    x = torch.arange(36).view(1, 1, 6, 6).expand(2000, -1, -1, -1)
    changed = augmented(x, Augmentation(pad=1, flip=True), gen())
    kinds = changed.flatten(1).unique(dim=0, return_counts=True)[1]
    assert len(kinds) == 18
    # 111 expected of each, with a deviation of about 10
    assert 60 < int(kinds.min()) <= int(kinds.max()) < 170


def test_no_augmentation_gives_the_very_images() -> None:
    x = toy_images(4, 3, 8, 1, 0).x
    assert augmented(x, Augmentation(), gen()) is x


@given(dtype=st.sampled_from([torch.uint8, torch.float32]))
def test_images_are_given_as_floats_in_zero_to_one(dtype: torch.dtype) -> None:
    x = torch.tensor([0, 51, 255]).view(3, 1, 1, 1)
    stored = x.to(torch.uint8) if dtype == torch.uint8 else x.float() / 255
    unit = Images(stored, torch.zeros(3)).unit()
    torch.testing.assert_close(unit.flatten(), torch.tensor([0.0, 0.2, 1.0]))


GOOD = toy_images(4, 3, 8, 1, 0)
BAD = {
    "one label each": Images(GOOD.x, GOOD.y[:3]),
    "square images": Images(GOOD.x[:, :, :7], GOOD.y),
    "1 or 3 channels": Images(GOOD.x.expand(-1, 2, -1, -1), GOOD.y),
    "images of 4 px": Images(GOOD.x[:, :, :4, :4], GOOD.y),
    r"label 7 is outside 0\.\.2": Images(GOOD.x, torch.tensor([0, 1, 7, 2])),
    r"label -1 is outside": Images(GOOD.x, torch.tensor([0, 1, -1, 2])),
    "contain NaN": Images(GOOD.unit() * float("nan"), GOOD.y),
    "divide them by 255": Images(GOOD.x.float(), GOOD.y),
    r"\(x \+ 1\) / 2": Images(2 * GOOD.unit() - 1, GOOD.y),
    r"float pixels run from -300 to": Images(GOOD.unit() - 300, GOOD.y),
    r"torch.int64 pixels run from \d+ to \d+; expected 0..255": Images(GOOD.x.long() * 5, GOOD.y),
    "which is black in": Images((GOOD.x > 127).to(torch.uint8), GOOD.y),
    r"type torch.complex64; expected uint8": Images(GOOD.x.to(torch.complex64), GOOD.y),
    r"x\.unsqueeze\(1\)": Images(GOOD.x[:, 0], GOOD.y),
    "reshape": Images(GOOD.x.flatten(1), GOOD.y),
    r"x\.permute\(0, 3, 1, 2\)": Images(GOOD.x.permute(0, 2, 3, 1), GOOD.y),
    r"label of image 1 is 0\.5, not a whole number": Images(GOOD.x, torch.tensor([0, 0.5, 1, 2])),
    "label of image 3 is nan": Images(GOOD.x, torch.tensor([0, 1, 2, float("nan")])),
    "label of image 0 is inf": Images(GOOD.x, torch.tensor([float("inf"), 1, 2, 0])),
    "begin at 1: subtract 1": Images(GOOD.x, torch.tensor([1, 2, 3, 1])),
    "row 2 of the labels .* is not one-hot": Images(
        GOOD.x, torch.eye(3)[[0, 1, 2, 0]] / GOOD.y.clamp(min=1)[:, None]
    ),
    r"one-hot rows \[N, 3\]": Images(GOOD.x, torch.eye(5)[[0, 1, 2, 0]]),
    r"labels of shape \[4, 1, 1\]": Images(GOOD.x, GOOD.y[:, None, None]),
    "as tensors": Images(GOOD.x, ["cat", "dog", "fox", "cat"]),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("message", BAD)
def test_images_that_cannot_be_trained_on_are_refused_by_what_is_wrong(message: str) -> None:
    with pytest.raises(DataError, match=message):
        checked(BAD[message], 3, "here")


def test_good_images_pass_as_they_are() -> None:
    assert same(list(checked(GOOD, 3, "here")), list(GOOD))


KINDS = {
    "int32": lambda y: y.to(torch.int32),
    "uint8": lambda y: y.to(torch.uint8),
    "uint16": lambda y: y.to(torch.uint16),
    "float16": lambda y: y.half(),
    "float64": lambda y: y.double(),
    "column": lambda y: y[:, None],
    "float column": lambda y: y[:, None].float(),
    "one-hot": lambda y: F.one_hot(y, 3),
    "float one-hot": lambda y: F.one_hot(y, 3).float(),
    "bool one-hot": lambda y: F.one_hot(y, 3).bool(),
}


@given(kind=st.sampled_from(sorted(KINDS)), n=st.integers(1, 12), seed=seeds)
def test_labels_of_any_type_and_form_are_the_same_indices(kind: str, n: int, seed: int) -> None:
    y = torch.randint(3, (n,), generator=gen(seed))
    changed = checked(Images(toy_images(n, 3, 8, 1, 0).x, KINDS[kind](y)), 3, "here").y
    assert changed.dtype == torch.int64
    assert torch.equal(changed, y)


@given(
    values=st.lists(
        st.sampled_from([0.0, 1.0, 2.0, 0.5, -1.0, 3.0, 1e30, math.nan, math.inf])
        | st.floats(-2, 5),
        min_size=2,
        max_size=6,
    )
)
def test_float_labels_are_taken_where_they_are_indices_and_refused_otherwise(
    values: list[float],
) -> None:
    y = torch.tensor(values, dtype=torch.float64)
    images = Images(toy_images(len(values), 3, 8, 1, 0).x, y)
    if all(value in (0, 1, 2) for value in values):
        assert checked(images, 3, "here").y.tolist() == values
    else:
        with pytest.raises(DataError, match=r"here: (label|the label of image)"):
            checked(images, 3, "here")


@given(dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
def test_float_images_of_any_type_become_float32(dtype: torch.dtype) -> None:
    given = GOOD.unit().to(dtype)
    x = checked(Images(given, GOOD.y), 3, "here").x
    assert x.dtype == torch.float32
    assert torch.equal(x, given.float())


@given(dtype=st.sampled_from([torch.int16, torch.int32, torch.int64, torch.uint16]))
def test_whole_number_pixels_of_any_type_become_bytes(dtype: torch.dtype) -> None:
    x = checked(Images(GOOD.x.to(dtype), GOOD.y), 3, "here").x
    assert torch.equal(x, GOOD.x)
    assert x.dtype == torch.uint8


class Untidy(Toy):
    """A data set whose pixels and labels are of other types than the library's."""

    def load(self, split: str) -> Images:
        x, y = super().load(split)
        return Images(x.double() / 255, F.one_hot(y, 3).float())

    def validation(self) -> Images | None:
        return self.load("test")


def test_what_a_data_set_gives_is_checked_whoever_wrote_it() -> None:
    splits = Splits(Untidy())
    for split in ("train", "valid", "test"):
        images = splits.images(split)
        assert (images.x.dtype, images.y.dtype) == (torch.float32, torch.int64)
    with pytest.raises(DataError, match="the training images of Toy: 60 image"):
        Splits(Toy(broken=True)).images("train")


def test_a_data_set_may_bring_its_own_validation_images() -> None:
    splits = Splits(Untidy(), max_train=30)
    assert len(splits.images("train").y) == 30
    whole = splits.images("test")
    rows = torch.tensor(splits.rows("valid"))
    assert rows.sort().values.tolist() == list(range(len(whole.y)))
    assert same(list(splits.images("valid")), list(whole.take(rows)))


class Sorted(Toy):
    """A data set whose own validation images lie class by class, as those of a folder do."""

    def validation(self) -> Images | None:
        result = self.load("test")
        return result.take(result.y.argsort())


def test_every_beginning_of_the_validation_images_holds_each_class() -> None:
    for dataset in (Toy(), Sorted()):
        y = Splits(dataset).images("valid").y
        for n in range(3, len(y) + 1):
            counts = torch.bincount(y[:n], minlength=3) / torch.bincount(y, minlength=3)
            assert float(counts.max() - counts.min()) <= 1 / 2
            assert counts.min() > 0
