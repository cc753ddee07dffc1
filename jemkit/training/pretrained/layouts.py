"""The authors' names of a WideResNet with its heads, and jemkit's names of the same tensors."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from jemkit.errors import DataError
from jemkit.models.energy import LinearHead, LogSumExp
from jemkit.models.networks import WRN
from jemkit.models.norms import Norm
from jemkit.training.pinned import listed

Format = Literal["jem", "jempp", "sadajem", "mebm", "ebjdat", "wrn"]
FORMATS: tuple[Format, ...] = get_args(Format)
MARKER = "layer1.0.conv1.bias"
"""Suffix of a name that every layout has; its prefix is that of the modules around the network."""

TOPS = {
    "wrn": ("conv1", "layer1", "layer2", "layer3", "layer4", "bn1", "linear"),
    "jem": ("f", "class_output", "energy_output"),
}
"""Prefixes of the names of a classifier, and of a network with its heads."""


class Reading(NamedTuple):
    """A file's weights under jemkit's names, and what their names and shapes show."""

    weights: dict[str, Tensor]  # float32, by jemkit's names
    network: WRN
    channels: int
    stages: int
    n_classes: int
    yopo: bool  # with the aliases of JEM++'s program
    unused: list[str]  # what the authors' own model never reads


def looks_like(names: Iterable[str]) -> list[Format]:
    """The formats with such names; several, where the programs derive from each other."""
    there = set(names)
    if {"conv1.bias", "layer1.0.conv1.bias", "linear.weight"} <= there:
        return ["wrn"]
    if not {"f.conv1.bias", "f.layer1.0.conv1.bias", "class_output.weight"} <= there:
        return []
    mebm: list[Format] = ["mebm"] if "energy_output.weight" in there else []
    if "f.layer_one.weight" in there:
        return ["jempp", *mebm, "ebjdat"]
    if "f.linear.weight" in there:  # JEM's network has a layer that it never calls
        return ["jem", "jempp", *mebm, "ebjdat"]
    return ["jempp", "sadajem", *mebm, "ebjdat"]


def _known(weights: Mapping[str, Tensor]) -> list[Format]:
    """The formats with such names, of which there must be one."""
    if like := looks_like(weights):
        return like
    raise DataError(
        f"its names match no known format: {listed(weights, 3)}; expected those of "
        f"{', '.join(FORMATS)}, such as conv1.bias, layer1.0.conv1.bias and linear.weight"
    )


def recognised(weights: Mapping[str, Tensor]) -> Format:
    """The format according to names and shapes, or the likeliest of several with the same network.

    A trained energy head means M-EBM; see `head_moved`.
    """
    like = _known(weights)
    if "mebm" in like and head_moved(weights):
        return "mebm"
    if like[0] == "jempp" and "sadajem" in like:
        return "sadajem"
    batch = "f.layer1.0.bn1.running_mean" in weights
    return "jempp" if like[0] == "jem" and batch else like[0]


def head_moved(weights: Mapping[str, Tensor]) -> bool:
    """Whether an energy head is outside the range of torch's initialisation.

    True shows that it was trained; False shows nothing.
    """
    weight = weights.get("energy_output.weight")
    if weight is None or weight.dim() != 2 or not weight.is_floating_point() or not weight.numel():
        return False
    limit = 1.001 * weight.shape[1] ** -0.5  # half precision rounds
    bias = weights.get("energy_output.bias", weight.new_zeros(1))
    return bool(weight.abs().max() > limit) or bool(bias.numel() and bias.abs().max() > limit)


def energy_of(weights: Mapping[str, Tensor], format: Format) -> str:
    """Which head E(x) comes from, and what the file does not show about it."""
    if "energy_output.weight" not in weights:
        return "E(x) = -logsumexp of the class head's logits"
    moved = head_moved(weights)
    if format == "mebm":
        doubt = (
            "; nothing in the file shows that this head was trained: if the classifier's logits "
            "are the energy, choose another format"
        )
        return f"E(x) = -energy_output(x), from the energy head{'' if moved else doubt}"
    trained = "it was trained:" if moved else "if it was trained (--uncond),"
    return (
        "E(x) = -logsumexp of the class head's logits; energy_output is ignored; "
        f"{trained} --format mebm computes E(x) from it"
    )


def read_layout(weights: Mapping[str, Tensor], format: Format, norm: Norm | None = None) -> Reading:
    """Every tensor under jemkit's name, with its shape checked.

    Mean pooling is assumed: no file shows the authors' `sum_pool`, which is off by default.
    """
    prefix, head = ("", "linear") if format == "wrn" else ("f.", "class_output")
    if format not in (like := _known(weights)):
        raise DataError(
            f"its names are not those of {format}; they look like {' or '.join(like)}: "
            f"give --format {like[0]}"
        )
    stages, blocks = _depth(weights, prefix)
    network = _network(weights, prefix, blocks, norm)
    channels = _size(weights, f"{prefix}conv1.weight", 4, 1)
    n_classes = _size(weights, f"{head}.weight", 2, 0)
    size = 64 if stages == 4 else 32
    energy = LinearHead() if format == "mebm" else LogSumExp()
    with torch.device("meta"):  # names and shapes alone: no memory, no random numbers
        wanted = energy.build(network.build((channels, size, size)), n_classes).state_dict()
    theirs = {name: _their_name(name, prefix, head, blocks) for name in wanted}
    aliases = {name: layer for name in weights if (layer := _alias(name, stages))}
    read = {*theirs.values()}
    unused = [n for n in weights if re.match(r"f\.linear\.|energy_output\.", n)] if prefix else []
    _check_names(weights, read, {*read, *aliases, *unused})
    _check_aliases(weights, aliases)
    _check_shapes(weights, {theirs[name]: tensor for name, tensor in wanted.items()})
    ours = {n: weights[theirs[n]].detach().to(t.dtype).contiguous() for n, t in wanted.items()}
    left = sorted(n for n in unused if n not in read)
    return Reading(ours, network, channels, stages, n_classes, bool(aliases), left)


def _depth(weights: Mapping[str, Tensor], prefix: str) -> tuple[int, int]:
    """The number of stages, and of the blocks of each; checked before a network is built."""
    form = re.compile(rf"{re.escape(prefix)}layer([1-4])\.\d+\.conv1\.weight")
    blocks = Counter(match[1] for name in weights if (match := form.fullmatch(name)))
    if len(blocks) < 3 or len({*blocks.values()}) > 1:
        there = ", ".join(f"layer{stage} has {n} blocks" for stage, n in sorted(blocks.items()))
        raise DataError(
            "the names are not those of a WideResNet, whose 3 or 4 stages are equally deep: "
            f"{there or 'none'}"
        )
    return len(blocks), blocks["1"]


def _network(weights: Mapping[str, Tensor], prefix: str, blocks: int, norm: Norm | None) -> WRN:
    """Width and norm of a WideResNet, from its first stage."""
    outer = _size(weights, f"{prefix}layer1.0.conv1.weight", 4, 0)
    if outer < 16 or outer % 16:
        raise DataError(
            f"{prefix}layer1 has {outer} channels; a WideResNet's first stage has a multiple of 16"
        )
    detected = _norm(weights, f"{prefix}layer1.0.bn1", norm)
    made = WRN(depth=6 * blocks + 4, width=outer // 16, norm=detected)
    return made.model_copy(update={"bn_momentum": 0.9}) if detected == "batch" else made


def _norm(weights: Mapping[str, Tensor], layer: str, given: Norm | None) -> Norm:
    kinds = {n.removeprefix(f"{layer}.") for n in weights if n.startswith(f"{layer}.")}
    if "loc" in kinds:
        raise DataError("its network has ActNorm, which jemkit's wrn does not support")
    if "running_mean" in kinds or not kinds:
        return "batch" if kinds else "none"
    if given != "instance":
        raise DataError(
            f"{layer} has a scale and a shift but no statistics: instance or layer norm, whose "
            "names are the same. Pass --norm instance for instance norm; layer norm is not "
            "supported"
        )
    return given


def _size(weights: Mapping[str, Tensor], name: str, dimensions: int, axis: int) -> int:
    if name not in weights:
        raise DataError(f"the weights lack {name}")
    shape = list(weights[name].shape)
    if len(shape) != dimensions or not all(shape):
        raise DataError(f"{name} is {shape}; expected {dimensions} dimensions, none of them 0")
    return shape[axis]


def _their_name(name: str, prefix: str, head: str, blocks: int) -> str:
    if name.startswith("head."):
        return name.replace("head", head, 1)
    if name.startswith("energy."):
        return name.replace("energy", "energy_output", 1)
    name = name.removeprefix("network.")
    if name.startswith("blocks."):
        _, block, part, last = name.split(".")
        stage, place = divmod(int(block), blocks)
        part = {"norm1": "bn1", "norm2": "bn2", "shortcut": "shortcut.0"}.get(part, part)
        return f"{prefix}layer{stage + 1}.{place}.{part}.{last}"
    part, last = name.split(".")
    return f"{prefix}{'conv1' if part == 'first' else 'bn1'}.{last}"


def _alias(name: str, stages: int) -> str:
    """The layer for which a second name in JEM++'s program stands; empty for a first name."""
    if name.startswith("f.layer_one."):
        return name.replace("layer_one", "conv1", 1)
    match = re.match(r"f\.other_layers\.(\d)\.(.+)", name)
    if match is None:
        return ""
    place = int(match[1])
    return f"f.layer{place + 1}.{match[2]}" if place < stages else f"f.bn1.{match[2]}"


def _check_names(weights: Mapping[str, Tensor], wanted: set[str], known: set[str]) -> None:
    missing, unknown = sorted(wanted - set(weights)), sorted(set(weights) - known)
    if missing or unknown:
        lists = (("missing", missing), ("unknown", unknown))
        message = "; ".join(f"{label}: {listed(names, 3)}" for label, names in lists if names)
        raise DataError(f"the names do not form a complete network; {message}")


def _check_aliases(weights: Mapping[str, Tensor], aliases: Mapping[str, str]) -> None:
    for name, layer in aliases.items():
        if layer not in weights or not torch.equal(weights[name], weights[layer]):
            raise DataError(f"{name} is another name of {layer}, but their values differ")


def _check_shapes(weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    for name, like in wanted.items():
        came = weights[name]
        if came.shape != like.shape:
            raise DataError(f"{name} is {list(came.shape)}; expected {list(like.shape)}")
        if came.is_floating_point() != like.is_floating_point():
            raise DataError(f"{name} is of type {came.dtype}; expected {like.dtype}")
        if name.endswith("running_var") and bool((came < 0).any()):
            raise DataError(f"{name} contains a variance below 0")
