"""Stopped, killed and shared attacks: their finished pieces, and a run left alone."""

import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from attack_runs import CALLS, DATA, THREAT, Noisy, run, same, stopping_at, toy_subject
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import FORKING, ready
from torch import Tensor, nn
from toys import gen
from waiting import SAFETY

from jemkit.attacks.base import Threat
from jemkit.attacks.pgd import PGD
from jemkit.attacks.pixel_model import pixel_model
from jemkit.data import Images
from jemkit.errors import DataError, Preempted
from jemkit.metrics import attack_runner
from jemkit.metrics.attack_runner import Attacked, attacked
from jemkit.metrics.evaluator import Context
from jemkit.runtime.files import file_hash
from jemkit.runtime.modes import eval_mode, frozen
from jemkit.runtime.work_cache import Piece, ResultCache, Shard
from jemkit_plugins.aa import AutoAttack


@settings(max_examples=15)
@given(moments=st.lists(st.integers(1, 40), min_size=1, max_size=4), attack=st.sampled_from("np"))
def test_a_run_that_is_interrupted_ends_as_one_that_is_not(
    moments: list[int], attack: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    judge = {"n": Noisy(), "p": PGD(steps=3)}[attack]
    work = tmp_path_factory.mktemp("work")
    CALLS.clear()
    whole = run(attack=judge)
    needed = len(CALLS)
    CALLS.clear()
    for moment in moments:
        with suppress(Preempted):
            run(attack=judge, work=work, stop=stopping_at(moment))
    same(run(attack=judge, work=work), whole)
    assert len(CALLS) <= needed + len(moments)  # one batch at most for each stop


def test_what_is_finished_is_read_back_and_not_computed(tmp_path: Path) -> None:
    first = run(work=tmp_path)
    CALLS.clear()
    same(run(work=tmp_path), first)
    assert not CALLS


def test_two_shards_give_what_one_process_gives(tmp_path: Path) -> None:
    whole = run()
    CALLS.clear()
    subject = toy_subject().eval()

    def part(rank: int) -> Attacked:
        ctx = Context(gen(), THREAT, batch_size=3, work=tmp_path, shard=Shard(rank, 2))
        return attacked(subject, Noisy(), DATA, ctx, "noisy")

    with ThreadPoolExecutor(2) as pool:
        for shown in pool.map(part, range(2)):
            same(shown, whole)
    both = len(CALLS)
    CALLS.clear()
    run()
    assert both == len(CALLS)  # no batch was computed twice


def test_only_the_first_shard_clears_up(tmp_path: Path) -> None:
    caches = [ResultCache(tmp_path, {}, Shard(rank, 2)) for rank in range(2)]
    caches[1].remove()
    assert caches[0].folder is not None
    assert caches[0].folder.exists()
    caches[0].remove()
    assert not caches[0].folder.exists()


def test_without_a_work_folder_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    run()
    assert not list(tmp_path.iterdir())


class Drops(nn.Module):
    """A model that draws from torch's own generator at every pass."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = toy_subject()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.inner(nn.functional.dropout(x, 0.3, training=True))
        return logits


def test_a_model_that_draws_from_torchs_generator_has_one_outcome_after_a_stop(
    tmp_path: Path,
) -> None:
    subject, state = pixel_model(Drops()), torch.get_rng_state()
    whole = run(subject, PGD(steps=2))
    with suppress(Preempted):
        run(subject, PGD(steps=2), work=tmp_path, stop=stopping_at(12))
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    same(run(subject, PGD(steps=2), work=tmp_path), whole)


def pieces_in(work: Path) -> list[Path]:
    return sorted(work.rglob("*.safetensors"))


@pytest.mark.parametrize("how", ["cut", "flipped", "empty", "foreign"])
def test_a_damaged_piece_is_refused_and_computed_again_the_next_time(
    how: str, tmp_path: Path
) -> None:
    whole = run(work=tmp_path)
    piece = pieces_in(tmp_path)[1]
    good = piece.read_bytes()
    middle = len(good) - 700
    damaged = {
        "cut": good[:-5],
        "flipped": good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :],
        "empty": b"",
        "foreign": pieces_in(tmp_path)[0].read_bytes()[:-1],
    }[how]
    piece.write_bytes(damaged)
    with pytest.raises(DataError, match=rf"{piece.name} was damaged and is removed.*again"):
        run(work=tmp_path)
    CALLS.clear()
    same(run(work=tmp_path), whole)
    assert len(CALLS) == 1


class Scaled(nn.Module):
    """A linear classifier behind a scale that no state dict shows."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(scale), persistent=False)
        self.head = nn.Linear(64, 3)
        nn.init.ones_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head((x * self.scale).flatten(1))
        return out


OTHERS: dict[str, dict[str, Any]] = {
    "seed": {"seed": 1},
    "norm": {"threat": Threat("L2", 25.5)},
    "radius": {"threat": Threat("Linf", 25)},
    "batch size": {"batch_size": 4},
    "weights": {"subject": toy_subject(1)},
    "an option": {"attack": Noisy(share=0.9)},
    "images": {"data": Images(DATA.x.flip(3), DATA.y)},
    "labels": {"data": Images(DATA.x, DATA.y.flip(0))},
}


@pytest.mark.parametrize("what", OTHERS)
def test_no_piece_serves_another(what: str, tmp_path: Path) -> None:
    run(work=tmp_path)
    before = pieces_in(tmp_path)
    CALLS.clear()
    changed = dict(OTHERS[what])
    if what == "norm":
        changed["attack"] = Noisy(share=0)  # a corner is outside the ball of L2
    shown = run(work=tmp_path, **changed)
    assert CALLS
    assert not set(pieces_in(tmp_path)) <= set(before)
    same(shown, run(**changed))


def test_a_buffer_that_no_state_dict_shows_is_part_of_the_model(tmp_path: Path) -> None:
    for scale in (1.0, 2.0):
        run(pixel_model(Scaled(scale)), work=tmp_path)
    assert len({piece.parent for piece in pieces_in(tmp_path)}) == 2


def test_a_cache_waits_for_a_piece_and_a_stop_ends_the_wait(tmp_path: Path) -> None:
    cache = ResultCache(tmp_path, {}, Shard(1, 2))

    def poll() -> None:
        raise Preempted("stopped")

    with pytest.raises(Preempted):
        next(cache.pieces(["a"], lambda _: {}, poll, lambda _: None))


@pytest.mark.parametrize("rank", [0, 1])
def test_pieces_that_an_equal_evaluation_tidied_up_are_computed_by_whoever_still_wants_them(
    tmp_path: Path, rank: int
) -> None:
    """Though they are another shard's, which has read them and is gone; nothing is left behind."""
    names, ended = ["a", "b"], time.monotonic() + SAFETY

    def poll() -> None:
        if time.monotonic() > ended:
            raise Preempted("waited in vain")

    def pieces_of(cache: ResultCache) -> Iterator[Piece]:
        return cache.pieces(names, lambda i: {"x": torch.tensor(i)}, poll, lambda _: None)

    work = tmp_path / "work"
    late, other = ResultCache(work, {}, Shard(rank, 2)), ResultCache(work, {}, Shard(1 - rank, 2))
    with ThreadPoolExecutor() as pool:
        whole = pool.submit(lambda: list(pieces_of(other)))
        mine = pieces_of(late)
        first = next(mine)
        whole.result()
    ResultCache(work, {}).remove()
    assert [int(first["x"]), int(next(mine)["x"])] == [0, 1]
    assert not list(tmp_path.iterdir())


def test_the_folder_of_half_done_work_goes_with_the_last_of_it(tmp_path: Path) -> None:
    work = tmp_path / "work"
    one, other = ResultCache(work, {"is": 1}), ResultCache(work, {"is": 2})
    one.remove()
    assert other.folder is not None
    assert other.folder.exists()
    other.remove()
    assert not work.exists()
    next(other.pieces(["a"], lambda _: {"x": torch.ones(1)}, lambda: None, lambda _: None))


def test_a_piece_that_an_equal_evaluation_tidied_up_is_computed_again(tmp_path: Path) -> None:
    cache, other = (ResultCache(tmp_path, {}) for _ in range(2))

    def done(_: int) -> None:
        other.remove()

    calls = iter(range(9))
    (result,) = cache.pieces(["a"], lambda _: {"x": torch.ones(2)}, lambda: next(calls), done)
    assert torch.equal(result["x"], torch.ones(2))


class Slow(nn.Module):
    """A perceptron that takes a while."""

    def __init__(self, delay: float) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layers = nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)
        self.layers, self.delay = nn.Sequential(nn.Flatten(), *layers), delay

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self.delay)
        out: Tensor = self.layers(x)
        return out


def outcome(work: Path | None, name: str, n: int, delay: float) -> str:
    """A hash of the attacked images, and of which of them stand."""
    torch.set_num_threads(1)
    subject = pixel_model(Slow(delay))
    x = torch.rand(n, 1, 8, 8, generator=gen(1))
    ctx = Context(gen(), Threat("Linf", 4), batch_size=6, work=work)
    attack = PGD(steps=5) if name == "pgd" else AutoAttack()
    with frozen(subject), eval_mode(subject):
        data = Images(x, subject(x).argmax(1))
        result = attacked(subject, attack, data, ctx, name)
    assert 0 < int(result.right.sum()) < n
    return sha256(result.x_adv.numpy().tobytes() + result.right.numpy().tobytes()).hexdigest()


def write_outcome(folder: Path, name: str, n: int, delay: float) -> None:
    (folder / "outcome").write_text(outcome(folder / "work", name, n, delay))


def killed_and_again(folder: Path, kills: int, name: str, n: int, delay: float) -> None:
    """Kill a run at random moments, let it end, and compare it with one left in peace."""
    ready()
    rng = gen(int.from_bytes(os.urandom(4), "big"))

    def start() -> Any:
        process = FORKING.Process(target=write_outcome, args=(folder, name, n, delay), daemon=True)
        process.start()
        return process

    for _ in range(kills):
        running = start()
        wanted = len(pieces_in(folder)) + int(torch.randint(1, 4, (), generator=rng))
        while running.is_alive() and len(pieces_in(folder)) < wanted:
            time.sleep(0.005)
        time.sleep(float(torch.rand((), generator=rng)) * 0.1)
        running.kill()
        running.join()
    last = start()
    last.join()
    assert last.exitcode == 0
    assert (folder / "outcome").read_text() == outcome(None, name, n, delay)


def test_a_run_that_is_killed_ends_as_one_left_in_peace(tmp_path: Path) -> None:
    killed_and_again(tmp_path, 3, "pgd", 60, 0.01)


@pytest.mark.slow
def test_autoattack_killed_ten_times_ends_as_one_left_in_peace(tmp_path: Path) -> None:
    killed_and_again(tmp_path, 10, "aa", 60, 0.0)


def test_no_piece_of_an_attack_serves_its_changed_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = file_hash(Path(sys.modules[Noisy.__module__].__file__ or ""))
    assert run(work=tmp_path).protocol["implementation"] == code
    assert "implementation" not in run(attack=PGD(steps=1)).protocol
    CALLS.clear()
    monkeypatch.setattr(attack_runner, "code_of", lambda attack: "changed")
    assert run(work=tmp_path).protocol["implementation"] == "changed"
    assert CALLS
