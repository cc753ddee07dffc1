"""Checkpoints that earlier versions wrote are read, and runs go on from them."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from toys import toy_recipe, toy_registry

from jemkit import Trainer
from jemkit.runtime import checkpoint
from jemkit.runtime.pytree import differing
from jemkit.runtime.run_dir import RunFolder

GOLDEN = Path(__file__).parents[1] / "golden"


def listing(tree: Any, at: str = "") -> dict[str, Any]:
    """Every value of a state by its path; a tensor by type, shape and hash."""
    if isinstance(tree, torch.Tensor):
        raw = tree.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        about = [str(tree.dtype).removeprefix("torch."), list(tree.shape)]
        return {at: [*about, hashlib.sha256(raw).hexdigest()[:16]]}
    if not isinstance(tree, dict | list):
        return {at: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    collected = {k: v for key, inner in items for k, v in listing(inner, f"{at}/{key}").items()}
    return collected or {at: "empty"}


@pytest.mark.parametrize("golden", sorted(p for p in GOLDEN.iterdir() if p.is_dir()), ids=str)
def test_a_checkpoint_of_every_past_format_is_read_as_what_was_written(golden: Path) -> None:
    assert listing(checkpoint.load(golden)) == json.loads(
        golden.with_suffix(".json").read_text(encoding="utf-8")
    )


def test_a_run_goes_on_from_a_checkpoint_of_every_past_format(tmp_path: Path) -> None:
    recipe = toy_recipe(
        toy_registry(), "jem", "ebjdat", "sam", "backbone.buffer.capacity=9", "run.ema_decay=0.5",
        "backbone.network.channels=1",
    )  # fmt: skip
    for golden in (p for p in GOLDEN.iterdir() if p.is_dir()):
        trainer = Trainer(recipe, RunFolder.create(tmp_path / golden.name))
        state = checkpoint.load(golden)
        trainer.load_state_dict(state)
        now = trainer.state_dict()
        assert not [at for at in differing(state, now) if at.split("/")[1] in state]
        trainer.run(until=8)
        assert trainer.step == 8
