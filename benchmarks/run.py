"""`make bench`: the cost of a step, as ratios within one run, and the default run, three seeds."""

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from tools import in_turn, keep, trained
from torch import Generator

from jemkit.config.registry import installed
from jemkit.data import Images, Task
from jemkit.models.energy import ModelEnergy
from jemkit.models.networks import WRN
from jemkit.runtime.modes import sampling_mode
from jemkit.sampling.init_dists import GaussianStart
from jemkit.sampling.kernels import SGLD

SHAPE = (3, 32, 32)


def toy_task() -> Task:
    x = torch.rand(200, *SHAPE, generator=Generator().manual_seed(0))
    images = Images(x, torch.arange(200) % 10)
    return Task(SHAPE, 10, 8.0, 200, 100, lambda _: images, "toy")


def sampler_step() -> None:
    """One SGLD step against the bare network's forward and backward to its input."""
    rng = Generator().manual_seed(0)
    classifier = installed()["backbone"]["classifier"]
    model = classifier(network=WRN(depth=16, width=2)).build(toy_task(), rng).model.eval()
    x = torch.rand(64, *SHAPE) * 2 - 1
    kernel, energy = SGLD(step_size=1.0, noise=0.01, clip=1.0), ModelEnergy(model)

    def bare() -> None:
        leaf = x.detach().requires_grad_()
        torch.autograd.grad(model(leaf).logits.logsumexp(1).sum(), leaf)

    with sampling_mode(model, "running_stats"):
        keep("sampler_step", in_turn(lambda: kernel.step(energy, x, rng), bare))


def restarts() -> None:
    """Fresh starts from a class-wise mixture in 3 x 32 x 32, moments known."""
    d, k = 3072, 10
    factors = torch.randn(k, d, d).tril_() / d**0.5
    start = GaussianStart(torch.zeros(k, d), factors, toy_task())
    rng = Generator().manual_seed(0)
    z = torch.randn(k, d, 7)
    y = torch.arange(64) % k
    three = in_turn(lambda: start.draw(3, rng), lambda: None)
    full = in_turn(lambda: start.draw(64, rng, y), lambda: torch.bmm(factors, z))
    keep("restarts", {"three_ms": three["first_ms"], "all_64_against_one_bmm": full})


def memory() -> None:
    """Peak resident size of fresh processes, one EB-JDAT step, by M and M_adv."""
    peaks = {}
    for steps, adv_steps in ((5, 5), (40, 5), (5, 40), (40, 40)):
        child = [sys.executable, __file__, "--one-step", str(steps), str(adv_steps)]
        done = subprocess.run(child, capture_output=True, text=True, check=True)
        peaks[f"M={steps} M_adv={adv_steps}"] = int(done.stdout.split()[-1]) / 1024
    ratio = peaks["M=40 M_adv=40"] / peaks["M=5 M_adv=5"]
    keep("memory", {"peak_mib": peaks, "ratio_40_to_5": ratio})


def one_step(steps: int, adv_steps: int) -> None:
    from jemkit import Batch, Guard, Plain, train_step
    from jemkit.sampling.density import Buffer

    registry, rng, task = installed(), Generator().manual_seed(0), toy_task()
    spec = registry["backbone"]["sadajem"]
    start = registry["start"]["uniform"]()
    backbone = spec(
        network=WRN(depth=16, width=2), steps=steps, start=start, buffer=Buffer(capacity=64)
    ).build(task, rng)
    backbone.model.train()
    objective = registry["objective"]["ebjdat"](adv_steps=adv_steps)
    updater = Plain().build(backbone.model, torch.optim.SGD(backbone.model.parameters(), lr=0.01))
    images = task.images("train")
    x = task.bounds.from_unit(images.x[:64])
    batch = Batch(x, images.y[:64], x[:32], torch.arange(64))
    train_step(backbone, objective, updater, batch, rng, Guard())
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def main_job(seeds: int) -> None:
    """`jemkit train` as README has it, against pgdat with the same network and schedule."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for backbone, objective in (("sadajem", "ebjdat"), ("classifier", "pgdat")):
            for seed in range(seeds):
                arguments = ["--backbone", backbone, "--objective", objective, "--seed", str(seed)]
                rows.append(trained(arguments, Path(folder) / f"{objective}-{seed}"))
    names = ("clean_accuracy", "pgd_accuracy", "energy_gap_mean", "energy_gap_relative", "seconds")
    means = {
        f"{b} x {o}": {
            name: statistics.mean(r[name] for r in rows if r["objective"] == o) for name in names
        }
        for b, o in (("sadajem", "ebjdat"), ("classifier", "pgdat"))
    }
    keep("main_job", {"means": means, "runs": rows})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--one-step", type=int, nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one_step:
        one_step(*given.one_step)
    else:
        sampler_step()
        restarts()
        memory()
        main_job(given.seeds)
