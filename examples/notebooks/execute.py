"""Executes the notebooks of this folder and saves their outputs: `make notebooks`.

Needs the extra `notebooks`. What differs between two machines or runs is removed: paths, times,
the version of Python.
"""

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
LARGEST = 2_000_000  # bytes, of all notebooks together


def executed(path: Path) -> str:
    """A notebook with new outputs, as text."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=900, kernel_name="python3", record_timing=False).execute()
    return cleaned(json.loads(nbformat.writes(notebook)))


def cleaned(notebook: dict[str, Any]) -> str:
    """Without warnings on standard error, and what names this machine."""
    for cell in notebook["cells"]:
        cell["metadata"] = {}
        if cell["cell_type"] == "code":
            cell["outputs"] = [kept(output) for output in cell["outputs"]
                               if output.get("name") != "stderr"]  # fmt: skip
    text = json.dumps({**notebook, "metadata": METADATA}, indent=1, ensure_ascii=False)
    if machine := re.search(r"/(home|root|tmp|work|Users|usr|private|var)/[\w/.-]*", text):
        raise SystemExit(f"an output names a path of this machine: {machine[0]}")
    return text + "\n"


def kept(output: dict[str, Any]) -> dict[str, Any]:
    """A picture is its PNG alone, without its size in words."""
    if "image/png" in output.get("data", {}):
        output["data"] = {"image/png": output["data"]["image/png"]}
        output["metadata"] = {}
    return output


def main() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the same figures with more cores
    os.environ["PYTHONWARNINGS"] = "ignore"
    names = sys.argv[1:] or sorted(path.name for path in HERE.glob("*.ipynb"))
    for name in names:
        path = HERE / name
        text = executed(path)
        path.write_text(text)
        print(f"{name}: {len(text) / 1e3:.0f} kB", flush=True)
    total = sum(path.stat().st_size for path in HERE.glob("*.ipynb"))
    if total > LARGEST:
        raise SystemExit(f"the notebooks have {total / 1e6:.1f} MB, more than {LARGEST / 1e6:.0f}")


if __name__ == "__main__":
    main()
