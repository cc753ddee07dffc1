"""The options of every part by name: a new one is listed here, and tested in test_unused.py."""

from toys import REGISTRY

from jemkit import Options
from jemkit.config.extra import Extra
from jemkit.config.optim import SGD, Adam, Schedule
from jemkit.config.recipe import Run
from jemkit.data import Views
from jemkit.runtime.divergence_monitor import Sentinel
from jemkit.sampling.density import Buffer

KNOWN = {
    "network mlp": "hidden layers",
    "network resnet": "depth width strides norm",
    "network swishwrn": "depth width norm bn_momentum offset mean std",
    "network smallcnn": "channels norm",
    "network timm": "model",
    "network torchvision": "model",
    "network wrn": "depth width norm bn_momentum",
    "sampler l2": "step_size",
    "sampler mala": "step_size temperature",
    "sampler pyld": "inner_steps step_size clip",
    "sampler sgld": "step_size noise clip",
    "sampler sgld_momentum": "step_size momentum noise clip",
    "sampler sign": "step_size",
    "energy dummies": "fold",
    "start blurred": "share",
    "start foreign": "dataset",
    "start noise": "std",
    "start pca": "variance sigma",
    "start shuffled": "squares",
    "density contrastive": "batch_norm box penalty penalty_on",
    "backbone classifier": "network energy views",
    "backbone dat": "network energy density sampler start buffer steps views",
    "backbone jem": "network energy density sampler start buffer steps views",
    "backbone jempp": "network energy density sampler start buffer steps views",
    "backbone mebm": "network energy density sampler start buffer steps views",
    "backbone sadajem": "network energy density sampler start buffer steps views",
    "objective dat": "step_px auc window max_steps freeze_batch_norm attack",
    "objective ducat": "start clean_dummy adv_dummy adv_mass variant beta consistency temperature "
    "attack",
    "objective ebjdat": "w1 w2 w3 w_clean adv_steps radius_px norm ascent inner outer distance "
    "distance_weight",
    "objective ebjdatreleased": "w1 w2 w3 w_clean adv_steps start_px step_px climbs",
    "objective jeat": "w_px attack",
    "objective jem": "w_px w_pyx negatives",
    "objective lasat": "form radius_px eps_px iterations step_px beta smoothing every robust clean "
    "baseline strategy strategy_lr update",
    "objective lbgat": "beta attack teacher",
    "objective mart": "beta attack",
    "objective pgdat": "attack",
    "objective score": "beta c smoothing attack",
    "objective tdat": "weight gamma_min relaxation radius_px variant",
    "objective trades": "beta climbs attack smoothing smooth",
    "objective weat": "of beta attack",
    "updater agr": "start clip update",
    "updater awp": "gamma start",
    "updater sam": "rho adaptive",
    "ascent l2": "step_px",
    "ascent sgld": "step_size noise clip",
    "ascent sign": "step_px",
    "distance lpips": "net weights download",
    "dataset cifar10": "dir download size",
    "dataset cifar100": "dir download size",
    "dataset folder": "dir size",
    "dataset svhn": "dir download size",
    "attack aa": "version",
    "attack apgd": "steps restarts loss eot",
    "attack bpda": "steps step_px samples",
    "attack cw": "steps step_px restarts",
    "attack detector": "limit percentile tolerance steps step_px restarts",
    "attack energy": "of steps step_px restarts",
    "attack eot": "steps step_px samples",
    "attack fgsm": "random_start",
    "attack pgd": "steps radius_px step_px norm restarts start optimizer batch_norm",
    "attack square": "queries restarts",
    "evaluator calibration": "bins",
    "evaluator energies": "n steps bins path_images",
    "evaluator et3": "steps radius_px step_px direction",
    "evaluator foldings": "steps",
    "evaluator generation": "n steps start source selection reference max_reference statistics "
    "inception features",
    "evaluator ood": "made against",
    "evaluator robustness": "indicators indicator_images",
    "tracker mlflow": "experiment",
    "tracker wandb": "project entity mode",
}
"""All options of all parts. A new one is added here with a row in `ACTS`, or in `EVALUATIONS`."""

PLAIN: dict[str, list[str]] = {
    "run": ["epochs", "batch_size", "micro_batch", "recompute", "seed", "theta_steps",
            "valid_fraction", "max_train", "ema_decay", "ema_warmup", "ema_copy", "device",
            "precision", "compile", "channels_last", "deterministic", "threads", "eval_images",
            "select", "test_images", "shard", "keep"],
    "schedule": ["decay", "warmup", "warmup_share", "at", "by", "floor"],
    "sgd": ["use", "lr", "momentum", "nesterov", "weight_decay", "decay_norms"],
    "adam": ["use", "lr", "betas", "weight_decay", "decay_norms"],
    "views": ["augment_x", "augment_pos", "noise_x", "noise_pos", "pos_share", "stats_from",
              "cutmix"],
    "extra": ["file", "fraction", "labels"],
    "buffer": ["capacity", "restart", "conditional"],
    "sentinel": ["on", "tries", "policy", "quiet", "window", "far", "nats", "patience", "steep",
                 "stuck", "collapse"],
}  # fmt: skip


def test_every_option_of_every_part_is_known_here() -> None:
    unknown = {
        f"{kind} {name}": " ".join(part.model_fields)
        for kind, shelf in REGISTRY.shelves.items()
        for name, part in shelf.items()
    }
    assert {part: names for part, names in unknown.items() if names} == KNOWN
    tables: dict[str, type[Options]] = {
        "run": Run, "schedule": Schedule, "sgd": SGD, "adam": Adam, "views": Views,
        "buffer": Buffer, "sentinel": Sentinel, "extra": Extra,
    }  # fmt: skip
    assert {name: list(part.model_fields) for name, part in tables.items()} == PLAIN
