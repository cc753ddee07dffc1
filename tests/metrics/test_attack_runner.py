"""The driver of attacks: what a kill, a shard or a broken attack may and may not do to a figure."""

import os
import runpy
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor, nn
from toys import gen
from waiting import SAFETY

from jemkit.attacks.base import Perturb, Threat
from jemkit.attacks.pgd import PGD
from jemkit.attacks.pixel_model import PixelModel, pixel_model
from jemkit.data import Images
from jemkit.errors import DataError, MisfitError, Preempted
from jemkit.metrics.attack_runner import Attacked, attacked
from jemkit.metrics.evaluator import Context
from jemkit.options import Options
from jemkit.runtime.modes import eval_mode, frozen
from jemkit.runtime.work_cache import Piece, ResultCache, Shard

THREAT = Threat("Linf", 25.5)


def toy_subject(seed: int = 0) -> PixelModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return pixel_model(nn.Sequential(nn.Flatten(), nn.Linear(64, 3, bias=False)))


def toy_data(n: int = 20, wrong: int = 4) -> Images:
    """Noise with the labels that the toy gives it, but for the first few."""
    x = torch.randint(256, (n, 1, 8, 8), generator=gen(), dtype=torch.uint8)
    y = toy_subject()(x.float() / 255).argmax(1)
    y[:wrong] = (y[:wrong] + 1) % 3
    y[-3:] = torch.arange(3)  # every class is there
    return Images(x, y)


DATA = toy_data()

CALLS: list[Tensor] = []
"""The images of every call of a `Noisy` stage."""


class Noisy(Options):
    """Two stages of random corners: the second knows nothing of the first."""

    everyone: ClassVar[bool] = False

    share: float = 1.0  # of the radius
    push: float = 0.0  # on top of it, which breaks the bound

    @property
    def label(self) -> str:
        return "noisy"

    def bind(self, subject: PixelModel, threat: Threat) -> Mapping[str, Perturb]:
        def perturb(x: Tensor, y: Tensor, rng: Generator) -> Tensor:
            CALLS.append(x.clone())
            worst = x.clone()
            for _ in range(4):
                u = torch.rand(x.shape, generator=rng).sub(0.5).sign()
                z = (x + self.share * threat.eps * u).clamp(0, 1)
                fooled = subject(z).argmax(1) != y
                worst[fooled] = z[fooled]
            return worst + self.push

        return {"first": perturb, "second": perturb}

    def card(self, threat: Threat, n_classes: int) -> dict[str, Any]:
        return {"share": self.share}


def run(
    subject: PixelModel | None = None,
    attack: Any = None,
    data: Images = DATA,
    *,
    threat: Threat = THREAT,
    seed: int = 0,
    batch_size: int = 3,
    **context: Any,
) -> Attacked:
    subject = toy_subject() if subject is None else subject
    ctx = Context(gen(), threat, seed=seed, batch_size=batch_size, **context)
    before, subject.poll = subject.poll, ctx.poll
    try:
        with frozen(subject), eval_mode(subject):
            return attacked(subject, Noisy() if attack is None else attack, data, ctx, "noisy")
    finally:
        subject.poll = before


def same(one: Attacked, other: Attacked) -> None:
    assert torch.equal(one.x_adv, other.x_adv)
    assert torch.equal(one.right, other.right)
    assert one.stages == other.stages
    first, second = ({**found.protocol, "seconds": 0} for found in (one, other))
    assert first == second


def stopping_at(n: int) -> Callable[[], bool]:
    """Asks for a stop from the n-th time on that it is asked."""
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked > n

    return stop


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


def test_an_attack_says_how_far_it_is_within_a_batch() -> None:
    told: list[tuple[str, int, int]] = []
    ctx = Context(gen(), THREAT, batch_size=5, progress=lambda *what: told.append(what))
    attacked(toy_subject().eval(), PGD(steps=3), DATA, ctx, "pgd")
    total = len(DATA.y)
    assert told.count(("pgd3", 0, total)) >= 3
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)
    assert told[-1] == ("pgd3", total, total)


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
        for found in pool.map(part, range(2)):
            same(found, whole)
    both = len(CALLS)
    CALLS.clear()
    run()
    assert both == len(CALLS)  # no batch was computed twice


def test_only_the_first_shard_clears_up(tmp_path: Path) -> None:
    ledgers = [ResultCache(tmp_path, {}, Shard(rank, 2)) for rank in range(2)]
    ledgers[1].remove()
    assert ledgers[0].folder is not None
    assert ledgers[0].folder.exists()
    ledgers[0].remove()
    assert not ledgers[0].folder.exists()


def test_without_a_work_folder_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    run()
    assert not list(tmp_path.iterdir())


def test_global_random_state_is_left_alone(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    run(work=tmp_path)
    assert torch.equal(state, torch.get_rng_state())


def right_at_first(subject: PixelModel) -> Tensor:
    with frozen(subject), eval_mode(subject), torch.no_grad():
        return subject(DATA.unit()).argmax(1) == DATA.y


class Drops(nn.Module):
    """A model that draws from torch's own generator at every pass."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = toy_subject()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.inner(nn.functional.dropout(x, 0.3, training=True))
        return logits


def test_a_model_that_draws_from_torchs_generator_ends_alike_after_a_stop(tmp_path: Path) -> None:
    subject, state = pixel_model(Drops()), torch.get_rng_state()
    whole = run(subject, PGD(steps=2))
    with suppress(Preempted):
        run(subject, PGD(steps=2), work=tmp_path, stop=stopping_at(12))
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    same(run(subject, PGD(steps=2), work=tmp_path), whole)


def test_images_that_are_wrong_already_are_never_attacked() -> None:
    subject = toy_subject()
    right = right_at_first(subject)
    assert 0 < int(right.sum()) < len(right)
    CALLS.clear()
    found = run(subject, Noisy(share=0))
    seen = torch.cat(CALLS)
    expected = DATA.unit()[right]
    assert torch.equal(seen, torch.cat([expected, expected]))  # in both stages, since none fell
    assert torch.equal(found.right, right)
    assert torch.equal(found.x_adv, DATA.unit())


def test_an_attack_on_everyone_has_all_images_and_makes_none_right() -> None:
    subject = toy_subject()
    right = right_at_first(subject)
    found = run(subject, PGD(steps=2))
    assert not (found.right & ~right).any()
    moved = (found.x_adv != DATA.unit()).flatten(1).any(1)
    assert moved.all()


def test_a_stage_has_the_survivors_of_the_one_before() -> None:
    CALLS.clear()
    found = run(attack=Noisy(share=0.5), batch_size=100)
    assert len(CALLS) == 2
    assert len(CALLS[0]) > len(CALLS[1])
    assert len(CALLS[1]) == round(found.stages["first"] * len(DATA.y))
    assert found.stages["second"] == int(found.right.sum()) / len(DATA.y)


def test_a_fallen_image_is_the_one_that_is_kept() -> None:
    subject = toy_subject()
    found = run(subject)
    with frozen(subject), eval_mode(subject), torch.no_grad():
        again = subject(found.x_adv).argmax(1) == DATA.y
    assert torch.equal(again, found.right)
    assert not found.right.all()


def test_an_attack_that_leaves_its_ball_is_an_error(tmp_path: Path) -> None:
    grey = Images(torch.full((4, 1, 8, 8), 0.5), right_of(0.5, 4))
    for _ in range(2):  # nor does a piece of it remain
        with pytest.raises(MisfitError, match=r"noisy left its ball: .* 51\D.*radius 25.5/255"):
            run(attack=Noisy(share=0, push=0.2), data=grey, work=tmp_path)


def right_of(grey: float, n: int) -> Tensor:
    """The class that the toy gives a plain grey image."""
    subject = toy_subject()
    with frozen(subject), eval_mode(subject), torch.no_grad():
        return subject(torch.full((n, 1, 8, 8), grey)).argmax(1)


def test_pixels_outside_the_range_are_an_error() -> None:
    white = Images(torch.ones(4, 1, 8, 8), right_of(1.0, 4))
    with pytest.raises(MisfitError, match=r"pixels from 1\.05 to 1\.05; expected \[0, 1\]"):
        run(attack=Noisy(share=0, push=0.05), data=white)


class Fragile(nn.Module):
    """Logits that are NaN for images with a pixel that is not on the grid of k/255."""

    def __init__(self, *, clean: bool) -> None:
        super().__init__()
        self.clean = clean
        self.head = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        off = ((x * 255 - (x * 255).round()).abs() > 1e-2).flatten(1).any(1, keepdim=True)
        out: Tensor = self.head(x.flatten(1)).masked_fill(off | self.clean, torch.nan)
        return out


@pytest.mark.parametrize("clean", [True, False])
def test_logits_that_are_not_finite_are_an_error(clean: bool) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        subject = pixel_model(Fragile(clean=clean))
    with pytest.raises(DataError, match="NaN or inf on " + ("clean" if clean else "attacked")):
        run(subject, Noisy(share=0.77))


def pieces_in(work: Path) -> list[Path]:
    return sorted(work.rglob("*.safetensors"))


@pytest.mark.parametrize("how", ["cut", "flipped", "empty", "foreign"])
def test_a_damaged_piece_is_refused_and_computed_anew_the_next_time(
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
    found = run(work=tmp_path, **changed)
    assert CALLS
    assert not set(pieces_in(tmp_path)) <= set(before)
    same(found, run(**changed))


def test_a_buffer_that_no_state_dict_shows_is_part_of_the_model(tmp_path: Path) -> None:
    for scale in (1.0, 2.0):
        run(pixel_model(Scaled(scale)), work=tmp_path)
    assert len({piece.parent for piece in pieces_in(tmp_path)}) == 2


def test_a_ledger_waits_for_a_piece_and_a_stop_ends_the_wait(tmp_path: Path) -> None:
    ledger = ResultCache(tmp_path, {}, Shard(1, 2))

    def poll() -> None:
        raise Preempted("stopped")

    with pytest.raises(Preempted):
        ledger.pieces(["a"], lambda _: {}, poll, lambda _: None)


@pytest.mark.parametrize("rank", [0, 1])
def test_pieces_that_an_equal_evaluation_tidied_up_are_computed_by_whoever_still_wants_them(
    tmp_path: Path, rank: int
) -> None:
    """Though they are another shard's, which has read them and is gone; nothing is left behind."""
    names, ended = ["a", "b"], time.monotonic() + SAFETY

    def poll() -> None:
        if time.monotonic() > ended:
            raise Preempted("waited in vain")

    def pieces_of(ledger: ResultCache) -> Iterator[Piece]:
        return ledger.each(names, lambda i: {"x": torch.tensor(i)}, poll, lambda _: None)

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
    other.pieces(["a"], lambda _: {"x": torch.ones(1)}, lambda: None, lambda _: None)


def test_a_piece_that_an_equal_evaluation_tidied_up_is_computed_again(tmp_path: Path) -> None:
    ledger, other = (ResultCache(tmp_path, {}) for _ in range(2))

    def done(_: int) -> None:
        other.remove()

    asked = iter(range(9))
    found = ledger.pieces(["a"], lambda _: {"x": torch.ones(2)}, lambda: next(asked), done)
    assert torch.equal(found[0]["x"], torch.ones(2))


SCRIPT = """
    import hashlib, sys, time
    from pathlib import Path
    import torch
    from torch import nn
    from jemkit.attacks.pgd import PGD; from jemkit.attacks.base import Threat
    from jemkit.metrics.attack_runner import attacked
    from jemkit.data import Images
    from jemkit.metrics.evaluator import Context
    from jemkit.runtime.modes import eval_mode, frozen
    from jemkit.attacks.pixel_model import pixel_model

    class Slow(nn.Module):
        def __init__(self, delay):
            super().__init__()
            with torch.random.fork_rng():
                torch.manual_seed(0)
                layers = nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)
            self.layers, self.delay = nn.Sequential(nn.Flatten(), *layers), delay

        def forward(self, x):
            time.sleep(self.delay)
            return self.layers(x)

    def attack_of(name):
        if name == "pgd":
            return PGD(steps=5)
        from jemkit_plugins.aa import AutoAttack
        return AutoAttack()

    def outcome(work, name, n, delay):
        torch.set_num_threads(1)
        subject = pixel_model(Slow(delay))
        x = torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(1))
        ctx = Context(torch.Generator(), Threat("Linf", 4), batch_size=6, work=work)
        with frozen(subject), eval_mode(subject):
            data = Images(x, subject(x).argmax(1))
            found = attacked(subject, attack_of(name), data, ctx, name)
        assert 0 < int(found.right.sum()) < n
        bits = found.x_adv.numpy().tobytes() + found.right.numpy().tobytes()
        return hashlib.sha256(bits).hexdigest()

    if __name__ == "__main__":
        work, name, n, delay = sys.argv[1:]
        print(outcome(Path(work), name, int(n), float(delay)))
"""


def killed_and_again(folder: Path, kills: int, name: str, n: int, delay: float) -> None:
    """Kill a run at random moments, let it end, and compare it with one left in peace."""
    script = folder / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    rng = gen(int.from_bytes(os.urandom(4), "big"))

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, str(script), str(folder / "work"), name, str(n), str(delay)]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)

    for _ in range(kills):
        running = start()
        wanted = len(pieces_in(folder)) + int(torch.randint(1, 4, (), generator=rng))
        while running.poll() is None and len(pieces_in(folder)) < wanted:
            time.sleep(0.005)
        time.sleep(float(torch.rand((), generator=rng)) * 0.1)
        running.kill()
        running.communicate()
    last = start()
    ended, _ = last.communicate()
    assert last.returncode == 0
    undisturbed = runpy.run_path(str(script))["outcome"](None, name, n, delay)
    assert ended.strip() == undisturbed


def test_a_run_that_is_killed_ends_as_one_left_in_peace(tmp_path: Path) -> None:
    killed_and_again(tmp_path, 3, "pgd", 60, 0.01)


@pytest.mark.slow
def test_autoattack_killed_ten_times_ends_as_one_left_in_peace(tmp_path: Path) -> None:
    killed_and_again(tmp_path, 10, "aa", 60, 0.0)
