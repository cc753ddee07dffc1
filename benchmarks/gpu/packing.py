"""Pack everything that a GPU machine without a network needs into one folder.

    benchmarks/gpu/pack --data-dir DIR         the kit in .gpu/kit, more images in .gpu/rest
    benchmarks/gpu/pack --python 3.11          for another Python than 3.12, without images

The GPU machine is assumed to have Python, torch, torchvision, numpy, pillow, scikit-learn,
safetensors, typer, rich, tqdm, pluggy, pytest and hypothesis. Other wheels are downloaded by pip at
the versions of constraints.txt. jemkit is packed as a wheel, since its parts are found through the
metadata of an installation.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import images

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 50 * 2**20
"""Bytes of the kit; the rest of the images makes a folder of its own."""

PACKAGES = (
    "pydantic", "pydantic_core", "annotated-types", "typing-inspection", "typing_extensions",
    "lpips", "torch_fidelity", "pyautoattack",
)  # fmt: skip
UNUSED = {"pyautoattack": "pyautoattack/examples/"}
"""Folders inside a wheel that jemkit does not use: 40 MB of example checkpoints."""

FILES = (
    "pyproject.toml", "constraints.txt", "tests", "benchmarks/gpu", "benchmarks/steps.py",
    "benchmarks/naive.py", "benchmarks/allocator.py", "benchmarks/tools.py",
)  # fmt: skip


class PackError(Exception):
    """What keeps a kit from being packed."""


def main() -> int:
    given = arguments()
    try:
        sizes = pack(given.out, given.python, given.data_dir)
    except (PackError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, size in sizes.items():
        print(f"{name:40} {size / 2**20:6.1f} MiB")
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / ".gpu")
    parser.add_argument("--python", default="3.12", help="of the GPU machine, such as 3.12")
    parser.add_argument("--data-dir", type=Path, help=f"where {images.FOLDER} is")
    return parser.parse_args()


def pack(out: Path, python: str, data_dir: Path | None) -> dict[str, int]:
    """Write OUT/kit and, where the images do not fit, OUT/rest; the size of each."""
    batches = _batches(data_dir)
    kit, rest = out / "kit", out / "rest"
    for folder in (kit, rest):
        shutil.rmtree(folder, ignore_errors=True)
    copy_files(kit)
    fetch(kit / "wheels", python)
    build_wheel(kit / "wheels")
    store_images(batches, kit, rest)
    sizes = {str(folder): size_of(folder) for folder in (kit, rest) if folder.exists()}
    if sizes[str(kit)] > LIMIT:
        raise PackError(f"{kit} has {sizes[str(kit)]} bytes, more than {LIMIT}; see what grew")
    return sizes


def _batches(data_dir: Path | None) -> list[Path]:
    """The batch files, the test images first; none where no folder is given."""
    if data_dir is None:
        return []
    folder = data_dir / images.FOLDER
    batches = [folder / name for name in (*images.BATCHES, images.NAMES)]
    if missing := [path for path in batches if not path.is_file()]:
        raise PackError(f"{missing[0]} is missing; give --data-dir DIR that has {images.FOLDER}")
    return batches[:-1]


def copy_files(kit: Path) -> None:
    """The kit's own scripts, the tests and what they take from the repository."""
    skip = shutil.ignore_patterns("__pycache__", ".*", "results")
    for name in FILES:
        source, target = ROOT / name, kit / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=skip)
        else:
            shutil.copy(source, target)


def fetch(wheels: Path, python: str) -> None:
    """Wheels for Linux on x86-64 and this Python, at the versions that jemkit is tested with."""
    wheels.mkdir(parents=True)
    platforms = [f"manylinux_2_{n}_x86_64" for n in (28, 27, 24, 17)] + ["manylinux2014_x86_64"]
    options = ["-q", "--no-deps", "--only-binary=:all:", "--python-version", python]
    options += ["--implementation", "cp", "--disable-pip-version-check", "-d", str(wheels)]
    for platform in platforms:
        options += ["--platform", platform]
    wanted = [f"{name}=={version_of(name)}" for name in PACKAGES]
    command = [sys.executable, "-m", "pip", "download", *options, *wanted]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise PackError(f"pip cannot fetch the wheels: {done.stderr.strip()[-500:]}")
    for name, folder in UNUSED.items():
        for wheel in wheels.glob(f"{name}-*.whl"):
            without(wheel, folder)


def version_of(name: str) -> str:
    """The version that constraints.txt pins."""
    spelled = re.sub("[-_]", "[-_]", name)
    pattern = re.compile(rf"^{spelled}==(\S+)$", re.MULTILINE)
    match = pattern.search((ROOT / "constraints.txt").read_text())
    if match is None:
        raise PackError(f"constraints.txt pins no version of {name}")
    return match[1]


def without(wheel: Path, folder: str) -> None:
    """Rewrite a wheel without one folder and its lines in RECORD."""
    with tempfile.TemporaryDirectory() as place:
        smaller = Path(place) / wheel.name
        with (
            zipfile.ZipFile(wheel) as old,
            zipfile.ZipFile(smaller, "w", zipfile.ZIP_DEFLATED) as new,
        ):
            for item in old.infolist():
                content = old.read(item)
                if item.filename.startswith(folder):
                    continue
                if item.filename.endswith(".dist-info/RECORD"):
                    lines = content.decode().splitlines(keepends=True)
                    content = "".join(x for x in lines if not x.startswith(folder)).encode()
                new.writestr(item, content)
        shutil.move(smaller, wheel)


def build_wheel(wheels: Path) -> None:
    """jemkit's own wheel, built by what is installed."""
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    command += ["--disable-pip-version-check", "-w", str(wheels), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise PackError(f"jemkit's wheel cannot be built: {done.stderr.strip()[-500:]}")


def store_images(batches: list[Path], kit: Path, rest: Path) -> None:
    """As many batch files as fit into the kit, the others beside it."""
    full = False
    for batch in batches:
        with tempfile.TemporaryDirectory() as place:
            images.squeeze(batch, Path(place))
            full = full or size_of(kit) + size_of(Path(place)) > LIMIT
            target = rest if full else kit / "cifar10"
            target.mkdir(parents=True, exist_ok=True)
            for path in Path(place).iterdir():
                shutil.move(path, target / path.name)
    if batches:
        shutil.copy(batches[0].with_name(images.NAMES), kit / "cifar10" / images.NAMES)


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
