"""Module names of jemkit 0.1: imports of them find the new modules, with a warning.

An old module looks names up in the modules that now define them. Removed in version 0.3.
"""

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "anchor": "attacks.pixel_model", "assembly": "training.build",
    "attack": "attacks.pgd attacks.base", "autoattack": "attacks.autoattack",
    "bench": "training.profiling", "bench.accuracy": "training.profiling.precision_error",
    "bench.floor": "training.profiling.roofline", "blackbox": "attacks.random_search",
    "bytecode": "metrics.bytecode", "card": "training.model_card",
    "cascade": "metrics.attack_runner", "checkpoint": "runtime.checkpoint",
    "checkup": "training.health", "comparison": "evaluation.compare",
    "compiled": "sampling.compile training.objective_contexts", "dealing": "training.reshard",
    "density": "sampling.density sampling.fresh", "departures": "attacks.departures",
    "distance": "models.distances", "doctor": "testing.doctor", "energy": "models.energy data",
    "evaluator": "metrics.evaluator", "exam": "training.validation",
    "exported": "training.model_folder",
    "exporting": "evaluation.export training.model_folder training.restore",
    "extras": "runtime.extras", "features": "jemkit_plugins.generation.features",
    "fidelity": "jemkit_plugins.generation.fid", "figures": "metrics.figures",
    "fitting": "training.compatibility", "foreign": "training.pretrained",
    "generation": "evaluation.sample jemkit_plugins.generation.samples",
    "histograms": "metrics.figures", "identity": "metrics.identity",
    "imagefolder": "jemkit_plugins.folder",
    "imagefolder.layout": "jemkit_plugins.folder.layout",
    "imagefolder.listing": "jemkit_plugins.folder.listing",
    "imagefolder.pixels": "jemkit_plugins.folder.pixels",
    "indicators": "jemkit_plugins.indicators metrics.outputs",
    "initial": "training.initial_weights", "labels": "runtime.labels", "late": "runtime.lazy",
    "layers": "config.layers", "layout": "training.build",
    "memory": "runtime.microbatch", "mistakes": "config.messages", "modes": "runtime.modes",
    "moments": "sampling.moments", "networks": "models.networks data", "norms": "models.norms",
    "pictures": "metrics.plots", "pinned": "training.pinned", "pixels": "attacks.pixel_model",
    "plan": "training.plan", "probing": "config.probing config.probe_child",
    "recipe": "config.recipe", "record": "metrics.record", "recordfile": "metrics.record_file",
    "recovery": "training.rollback", "refined": "attacks.purification",
    "registry": "config.registry", "report": "evaluation.report",
    "restoring": "training.restore training.opened", "resuming": "training.resuming",
    "robustness": "metrics.energy_gap", "runtime.behind": "runtime.checkpoint",
    "runtime.clock": "runtime.timing", "runtime.folder": "runtime.run_dir",
    "runtime.journal": "training.metrics_log", "runtime.ledger": "runtime.work_cache",
    "runtime.numerics": "runtime.precision training.objective_contexts",
    "runtime.polling": "runtime.preemption", "runtime.sentinel": "runtime.divergence_monitor",
    "runtime.sharding": "runtime.fsdp", "runtime.syncnorm": "models.norms",
    "runtime.trees": "runtime.pytree",
    "samples": "jemkit_plugins.generation.samples sampling.fresh",
    "saved": "training.saved_state", "schedule": "config.optim", "scripted": "metrics.scripted",
    "seeds": "runtime.rng", "session": "training.run", "settings": "config.eval_settings",
    "sources": "evaluation.sample", "starts": "sampling.init_dists",
    "subjects": "evaluation.subjects", "summary": "training.trainer",
    "trilemma": "evaluation.run_table", "unused": "config.unused", "update": "updaters",
    "verify": "testing.resume", "vision": "runtime.torchvision_compat",
}  # fmt: skip
"""Old modules and where their names are now, both without a leading "jemkit."."""

RENAMED = {
    "Assembly": "RunState", "put_together": "build_run", "Exam": "Validator",
    "Care": "RollbackPolicy",
    "Sick": "Unhealthy", "Vitals": "RunStatistics", "Checkup": "HealthMonitor",
    "Ledger": "ResultCache", "Polling": "PreemptionCheck",
    "Subject": "EvalTarget", "Source": "SampleSource", "Asked": "SampleRequest",
    "Anchored": "ZeroGradientModel", "Stranger": "LogitEnergy", "Nothing": "NoDistance",
    "Remembering": "StatefulObjective", "Within": "ObjectiveInContext", "lent": "seeded_init",
    "fitted": "retry_on_oom", "passed": "microbatched", "trilemma": "comparison",
    "Floor": "Roofline", "floor_of": "roofline_of",
}  # fmt: skip
"""Names that are other names now."""


def homes_of(old: str) -> list[str]:
    """The modules that hold an old one's names now; some are plug-ins."""
    homes = MOVED[old].split()
    return [home if home.startswith("jemkit_plugins.") else f"jemkit.{home}" for home in homes]


class OldNames:
    """A module `jemkit.OLD` that looks its names up in the new modules."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        top, _, name = fullname.partition(".")
        known = top == "jemkit" and name in MOVED
        # what a loader needs; inheriting them would import much of the standard library
        return ModuleSpec(fullname, self, is_package=True) if known else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> None:
        return None  # the usual one

    def exec_module(self, module: ModuleType) -> None:
        homes = homes_of(module.__name__.removeprefix("jemkit."))
        now = f"{module.__name__} is {' and '.join(homes)} since jemkit 0.2"
        warnings.warn(f"{now}; the old name goes with 0.3", DeprecationWarning, stacklevel=2)

        def lookup(name: str) -> object:
            for home in map(import_module, homes):
                for known in (name, RENAMED.get(name, name)):
                    if hasattr(home, known):
                        return getattr(home, known)
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

        module.__getattr__ = lookup  # type: ignore[method-assign]


def install() -> None:
    """Register the finder of old names, after all other finders."""
    if not any(isinstance(finder, OldNames) for finder in sys.meta_path):
        sys.meta_path.append(OldNames())
