"""Any order of evaluations: every figure that was measured is in one of the folder's records."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from toys import REGISTRY

from jemkit import Images, evaluate
from jemkit.metrics import record as records
from jemkit.metrics.figures import Figure
from jemkit.metrics.record_file import Record

SIDE, CLASSES = 8, 3


class Means(nn.Module):
    """Logits without weights: all that tells two of them apart is an attribute."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * torch.stack([part.mean((1, 2, 3)) for part in x.chunk(3, 2)], dim=1)


def images(seed: int) -> Images:
    rng = torch.Generator().manual_seed(seed)
    return Images(torch.rand((12, 1, SIDE, SIDE), generator=rng), torch.arange(12) % CLASSES)


MODELS = (Means(1.0), Means(-1.0))
DATA = (images(0), images(1))
attack = st.sampled_from([
    ("pgd", {"pgd": {"steps": 2}}), ("pgd", {"pgd": {"steps": 2, "step_px": 1.0}}), ("fgsm", {}),
    ("fgsm", {"fgsm": {"random_start": True}}),
])  # fmt: skip
threat = st.sampled_from([{}, {"eps_px": 1}, {"norm": "L2", "eps_px": 100}])
part = st.sampled_from([{}, {"max_images": 6}, {"seed": 1}, {"batch_size": 5}, {"quick": True}])
other = st.sampled_from([(), ("calibration",)])
step = st.tuples(st.sampled_from([0, 1]), st.sampled_from([0, 1]), attack, threat, part, other)


def measured(folder: Path, request: tuple[Any, ...]) -> Record:
    model, data, (name, options), radius, some, also = request
    quiet = {"robustness": {"indicators": False}}
    return evaluate(
        MODELS[model], DATA[data], registry=REGISTRY, out=folder, n_classes=CLASSES,
        attacks=(name,), only=("robustness", *also), options={**quiet, **options}, **radius, **some,
    )  # fmt: skip


def whole(figure: Figure) -> tuple[Any, ...]:
    """A figure as it must be found again, but for the seconds that it took."""
    return figure.key, figure.value, figure.n


def check_rows(record: Record, figure: Figure, wanted: Tensor | None) -> None:
    rows = record.rows_of(figure)
    assert (rows is None) == (wanted is None)
    if rows is not None and wanted is not None:
        assert torch.equal(rows, wanted)


@settings(max_examples=12)
@given(st.lists(step, min_size=2, max_size=6))
def test_after_any_sequence_no_figure_is_lost_and_no_record_mixes(
    requests: list[tuple[Any, ...]],
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        known: dict[str, tuple[Record, Figure]] = {}
        for one in requests:
            record_now = measured(folder, one)
            known |= {figure.key: (record_now, figure) for figure in record_now.figures}
            newest = records.load(folder)
            assert newest.subject == record_now.subject
            assert newest.protocol["test_sha256"] == record_now.protocol["test_sha256"]
        stored = list(records.every(folder))
        where = {figure.key: (record, figure) for record in stored for figure in record.figures}
        assert where.keys() == known.keys()
        assert len(where) == sum(len(record.figures) for record in stored)
        for key, (record, figure) in known.items():
            there, again = where[key]
            assert whole(again) == whole(figure)
            assert there.subject["sha256"] == record.subject["sha256"]
            check_rows(there, again, record.rows_of(figure))
        for record in stored:
            cards = [figure.protocol for figure in record.figures]
            assert {card["checkpoint"] for card in cards} == {record.subject["sha256"]}
            assert {card["test_sha256"] for card in cards} == {record.protocol["test_sha256"]}
            tables = [n for part in record.parts for n in part.tables.values()]
            assert sorted(tables) == sorted(record.tables)
            files = [n for part in record.parts for n in part.files.values()]
            assert len(set(files)) == len(files)
        owners = {(r.subject["sha256"], r.protocol["test_sha256"]) for r in stored}
        assert len(owners) == len(stored)


@settings(max_examples=8)
@given(st.permutations(range(4)))
def test_the_order_of_evaluation_changes_no_figure(order: list[int]) -> None:
    requests = [
        (0, 0, ("fgsm", {}), {}, {}, ()),
        (0, 0, ("fgsm", {}), {"eps_px": 1}, {}, ()),
        (0, 0, ("fgsm", {"fgsm": {"random_start": True}}), {}, {"max_images": 6}, ()),
        (1, 0, ("fgsm", {}), {}, {}, ()),
    ]
    figures = []
    for sequence in (range(4), order):
        with tempfile.TemporaryDirectory() as name:
            for at in sequence:
                measured(Path(name), requests[at])
            stored = records.every(Path(name))
            figures.append({whole(figure) for record in stored for figure in record.figures})
    assert figures[0] == figures[1]
