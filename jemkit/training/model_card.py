"""Model cards: Markdown with a YAML header, in which all names are escaped."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jemkit.metrics.figures import Figure
from jemkit.training.model_files import CONFIG, FIGURES, SAMPLES, WEIGHTS

MOST = 10
"""Number of figures in a card; figures.json has all of them with their protocols."""

LONGEST = 300
"""Number of characters of a name that are shown."""

HEADLINES = ("clean", "aa", "pgd20", "apgd", "auroc", "fid", "is", "ece", "gap_mean")
COMPACT = ("norm", "radius_px", "steps", "restarts", "version", "split", "images", "selection")
"""The entries of a protocol in a card's table."""

CITED = {
    "jem": "Grathwohl et al., Your Classifier Is Secretly an Energy Based Model and You Should "
    "Treat It Like One, ICLR 2020",
    "jempp": "Yang and Ji, JEM++: Improved Techniques for Training JEM, ICCV 2021",
    "sadajem": "Yang, Su and Ji, Towards Bridging the Performance Gaps of Joint Energy-based "
    "Models, CVPR 2023",
    "mebm": "Yang and Ji, M-EBM: Towards Understanding the Manifolds of Energy-Based Models, "
    "PAKDD 2023",
    "ebjdat": "Jiang et al., Your Classifier Can Do More: Towards Bridging the Gaps in "
    "Classification, Robustness, and Generation (EB-JDAT)",
    "ebjdatreleased": "the released program of Jiang et al., Your Classifier Can Do More (EB-JDAT)",
    "pgdat": "Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks, "
    "ICLR 2018",
    "trades": "Zhang et al., Theoretically Principled Trade-off between Robustness and Accuracy, "
    "ICML 2019",
}
"""The paper of a backbone or an objective, by registered name."""

Rows = Sequence[tuple[str, Any]]


def escaped(text: Any) -> str:
    """Any text as one line of Markdown, without markup, HTML or links."""
    line = " ".join(str(text).split())
    line = "".join(c for c in line if c.isprintable())
    line = line if len(line) <= LONGEST else f"{line[:LONGEST]}..."
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    line = re.sub(r"([\\`*\[\]{}()#!|~$])", r"\\\1", line)
    line = re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", line)
    line = re.sub(r"^(\d*)([-+.=])", r"\1\\\2", line)
    return line.replace("://", ":&#47;&#47;").replace("www.", "www&#46;").replace("@", "&#64;")


def quoted(text: Any) -> str:
    """Text as a YAML scalar, in double quotes."""
    line = "".join(c if c.isprintable() else " " for c in str(text))
    return json.dumps(line[:LONGEST], ensure_ascii=False)


def table_of(rows: Rows) -> str:
    """A table of two columns of untrusted text."""
    lines = "".join(f"| {escaped(key)} | {escaped(value)} |\n" for key, value in rows)
    return f"| | |\n| --- | --- |\n{lines}"


def figures_table(figures: Sequence[Figure], common: Mapping[str, Any]) -> str:
    """The headline figures, each with its protocol in short form."""
    shown = sorted(figures, key=_rank)[:MOST]
    rows = "".join(
        f"| {escaped(f.name)}{_label(f)} | {f.value:.4g} | {_interval(f)} | {f.n} | "
        f"{escaped(_compact({**common, **f.protocol}))} |\n"
        for f in shown
    )
    left = len(figures) - len(shown)
    more = f"{left} more, and all protocols in full, are" if left else "The protocols in full are"
    return (
        "## Figures\n\n| figure | value | 95 % interval | n | protocol |\n"
        f"| --- | --- | --- | --- | --- |\n{rows}\n{more} in `{FIGURES}`.\n"
    )


def _rank(figure: Figure) -> tuple[bool, int]:
    place = HEADLINES.index(figure.name) if figure.name in HEADLINES else len(HEADLINES)
    return not figure.protocol.get("standard", True), place


def _label(figure: Figure) -> str:
    return "" if figure.protocol.get("standard", True) else " (NON-STANDARD protocol)"


def _interval(figure: Figure) -> str:
    if figure.low is None or figure.high is None:
        return ""
    return f"{figure.low:.4g} to {figure.high:.4g}"


def _compact(protocol: Mapping[str, Any]) -> str:
    flat = {**protocol, **_scalars(protocol.get("attack"))}
    words = [f"{key} {flat[key]}" for key in COMPACT if _simple(flat.get(key))]
    return ", ".join([f"evaluator {protocol.get('evaluator', '?')}", *words])


def _scalars(table: Any) -> dict[str, Any]:
    return dict(table) if isinstance(table, Mapping) else {}


def _simple(value: Any) -> bool:
    return isinstance(value, str | int | float)


def page(
    name: str,
    recipe: Mapping[str, Any],
    about: str,
    *,
    task: Mapping[str, Any] | None,
    sha: str,
    license: str,
    samples: bool,
) -> str:
    """The whole card."""
    parts = [str(recipe[table]["use"]) for table in ("backbone", "objective")]
    tags = "".join(
        f"- {quoted(tag)}\n" for tag in dict.fromkeys(["joint-energy-based-model", *parts])
    )
    head = (
        f"---\nlibrary_name: jemkit\npipeline_tag: image-classification\n"
        f"license: {quoted(license)}\ntags:\n{tags}---\n"
    )
    picture = f"\n## Samples\n\n![Samples]({SAMPLES})\n" if samples else ""
    return (
        f"{head}\n# {escaped(name)}\n\n{about}{picture}\n{_use(name, task)}\n"
        f"`{WEIGHTS}` has SHA-256 `{sha}`; `{CONFIG}` holds the recipe.\n\n"
        f"## Licence\n\n{_licence(license)}\n\n{_citation(parts)}"
    )


def _use(name: str, task: Mapping[str, Any] | None) -> str:
    """How to load the model; nothing is read but the folder."""
    where = (
        name if re.fullmatch(r"\w[\w.+=-]*", name, re.ASCII) else "."
    )  # a name that needs quotes
    shape = ", ".join(str(int(size)) for size in task["shape"]) if task else "3, 32, 32"
    return (
        "## Use\n\n```python\nimport torch\nimport jemkit\n\n"
        f"model = jemkit.load({json.dumps(where)})\n"
        f"images = torch.zeros(1, {shape})  # in [0, 1]\n"
        "logits = model(images)\n"
        "energy = model.scores(images).energy\n```\n\n"
        f"```\njemkit evaluate {where}\n```\n"
    )


def _licence(license: str) -> str:
    if license == "unknown":
        return (
            "No licence is stated for these weights: ask their authors before you redistribute "
            "them. "
            "jemkit itself is under Apache-2.0."
        )
    return f"{escaped(license)}. jemkit itself is under Apache-2.0."


def _citation(parts: Iterable[str]) -> str:
    papers = "".join(f"- {CITED[part]}\n" for part in dict.fromkeys(parts) if part in CITED)
    return f"## Citation\n\n- jemkit (CITATION.cff of its repository)\n{papers}"
