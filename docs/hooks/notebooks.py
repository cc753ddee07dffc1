"""Pages of the site that are made from the notebooks, with their saved outputs.

A hook of mkdocs; `mkdocs.yml` names it. Nothing is executed: `make notebooks` does that.
"""

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "notebooks"
INTRODUCTION = "*This page is [a notebook]({0}.ipynb), `examples/notebooks/{0}.ipynb`.*"


def text(source: str | list[str]) -> str:
    return source if isinstance(source, str) else "".join(source)


def markdown(name: str, notebook: dict[str, Any]) -> Iterator[str]:
    """The cells of a notebook as Markdown; a picture is a file beside the page."""
    for number, cell in enumerate(notebook["cells"]):
        source = text(cell["source"])
        if cell["cell_type"] == "markdown":
            pages = source.replace("](../../docs/", "](../")
            yield re.sub(r"\]\((\w+)\.ipynb\)", r"](\1.md)", pages)
            if number == 0:
                yield INTRODUCTION.format(name)
            continue
        yield f"```python\n{source}\n```"
        for at, output in enumerate(cell["outputs"]):
            if "text" in output:
                yield f"```text\n{text(output['text']).rstrip()}\n```"
            elif "image/png" in output.get("data", {}):
                yield f"![Output of the cell above]({picture(name, number, at)})"


def picture(name: str, cell: int, output: int) -> str:
    return f"{name}-{cell}-{output}.png"


def pictures(name: str, notebook: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
    for number, cell in enumerate(notebook["cells"]):
        for at, output in enumerate(cell.get("outputs", ())):
            if "image/png" in output.get("data", {}):
                png = base64.b64decode(text(output["data"]["image/png"]))
                yield picture(name, number, at), png


def on_files(files: Files, config: Any) -> Files:
    for path in sorted(FOLDER.glob("*.ipynb")):
        notebook = json.loads(path.read_text())
        page = "\n\n".join(markdown(path.stem, notebook)) + "\n"
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=page))
        files.append(File.generated(config, f"notebooks/{path.name}", abs_src_path=str(path)))
        for name, png in pictures(path.stem, notebook):
            files.append(File.generated(config, f"notebooks/{name}", content=png))
    return files
