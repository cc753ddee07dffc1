"""A tensor that library code makes says on which device, or stands here with its reason."""

import ast
from pathlib import Path

from toys import root

FACTORIES = {
    "arange", "empty", "eye", "full", "hann_window", "linspace", "logspace", "normal", "ones",
    "rand", "randint", "randn", "randperm", "scalar_tensor", "tensor", "tril_indices",
    "triu_indices", "zeros",
}  # fmt: skip

HOST = {
    "jemkit/metrics/attack_runner.py": "places of images on the host, and what a file holds",
    "jemkit/metrics/figures.py": "a bootstrap of rows, and values that were read",
    "jemkit/sampling/moments.py": "of the training images, which lie on the host",
    "jemkit/metrics/plots.py": "pixels of a PNG",
    "jemkit/attacks/purification.draw": "a generator an image, as on every device; then moved",
    "jemkit/runtime/distributed.py": "lengths and bytes that go to other processes by gloo",
    "cli/jemkit_cli/show/drawing.generated": "a mean of energies that were read",
    "cli/jemkit_cli/show/received.drawn_image": "as a browser sent it; moved when it is used",
    "cli/jemkit_cli/study/table.py": "outcomes that were read, a generator of the CPU",
    "jemkit/training/mixing.py": "a generator of the CPU, the same everywhere",
    "jemkit/training/pseudo_labels._labels": "places of images on the host",
    "jemkit/runtime/work_cache.py": "what a file holds",
    "jemkit/runtime/divergence_monitor.state": "numbers of the host, for a checkpoint",
    "jemkit/training/saved_state.py": "what a saved state is compared with",
    "jemkit/splits.py": "labels on the host are divided",
    "jemkit/testing/": "laws are checked on the CPU",
    "jemkit/updaters._on_the_way": "pinned memory of the host, which the device writes to",
    "jemkit/testing/resume._cut": "moves torch's own generator of the CPU",
    "plugins/jemkit_plugins/calibration.binned": "of logits that were read",
    "plugins/jemkit_plugins/datasets.py": "images as they are read from files",
    "plugins/jemkit_plugins/energies.py": "of energies that were read, and places of images",
    "plugins/jemkit_plugins/folder/dataset.py": "labels as they are read from files",
    "plugins/jemkit_plugins/generation/evaluator.py": "draws by a generator of the CPU",
    "plugins/jemkit_plugins/generation/fid._spread": "of numbers that the host has",
    "plugins/jemkit_plugins/generation/fid.at_infinity": "of numbers that the host has",
    "plugins/jemkit_plugins/generation/inception_body.load": "weights as they are read from a file",
    "plugins/jemkit_plugins/generation/statistics.write": "what a file holds",
    "plugins/jemkit_plugins/generation/samples.py": "samples that were read, places in the buffer",
    "plugins/jemkit_plugins/indicators/probes._clean": "which images are right, as they were read",
    "plugins/jemkit_plugins/ood.py": "draws by a generator of the CPU, the same everywhere",
}
"""File, file and function or folder: why its tensors are the host's."""


def made(path: Path) -> list[tuple[str, str]]:
    """The factories called without a device in a file, each with the function it stands in."""
    collected: list[tuple[str, str]] = []

    def visit(node: ast.AST, inside: str) -> None:
        if isinstance(node, ast.FunctionDef):
            inside = node.name
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Attribute) and node.func.attr == "take":
                return  # images lie on the host, and are taken by places there
            if name := factory(node):
                collected.append((inside, name))
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(ast.parse(path.read_text(encoding="utf-8")), "")
    return collected


def factory(call: ast.Call) -> str | None:
    """The name of a factory of torch's that is called without a device."""
    name = ast.unparse(call.func).removeprefix("torch.")
    if not ast.unparse(call.func).startswith("torch.") or name not in FACTORIES:
        return None
    return None if {"device", None} & {word.arg for word in call.keywords} else name


def keys(path: Path, function: str) -> set[str]:
    whole = path.relative_to(root()).as_posix()
    folders = {f"{parent.as_posix()}/" for parent in Path(whole).parents}
    return {whole, f"{whole.removesuffix('.py')}.{function}", *folders}


def unplaced() -> list[tuple[Path, str, str]]:
    files = [p for top in ("jemkit", "plugins", "cli") for p in (root() / top).rglob("*.py")]
    return [(path, *each) for path in sorted(files) for each in made(path)]


def test_every_tensor_is_made_on_a_device_that_is_named() -> None:
    result = unplaced()
    assert [
        f"{path}: torch.{name} in {function}"
        for path, function, name in result
        if not keys(path, function) & HOST.keys()
    ] == []


def test_no_exception_outlives_its_reason() -> None:
    met = {key for path, function, _ in unplaced() for key in keys(path, function)}
    assert HOST.keys() - met == set()
    assert all(HOST.values())


def test_what_has_no_device_is_listed() -> None:
    for text, wanted in {
        "torch.zeros(3)": "zeros",
        "torch.zeros(3, device=x.device)": None,
        "torch.rand(2, generator=rng)": "rand",
        "torch.zeros_like(x)": None,
        "x.new_zeros(3)": None,
        "torch.full((2,), 1.0, **like)": None,
    }.items():
        (call,) = (n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call))
        assert factory(call) == wanted
