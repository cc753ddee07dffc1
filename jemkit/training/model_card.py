"""Model cards: Markdown with a YAML header, in which all names are escaped."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jemkit.metrics.figures import Figure

CONFIG, CARD, WEIGHTS = "config.json", "README.md", "model.safetensors"
FIGURES, SAMPLES = "figures.json", "samples.png"
"""The files of an exported model."""

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
    "mart": "Wang et al., Improving Adversarial Robustness Requires Revisiting Misclassified "
    "Examples, ICLR 2020",
    "awp": "Wu, Xia and Wang, Adversarial Weight Perturbation Helps Robust Generalization, "
    "NeurIPS 2020",
    "sam": "Foret et al., Sharpness-Aware Minimization for Efficiently Improving Generalization, "
    "ICLR 2021",
    "dat": "Scalable Energy-Based Models via Adversarial Training (DAT), arXiv 2510.13872, "
    "ICLR 2026",
}
"""The paper of a backbone, an objective or an updater, by registered name."""

PLAIN = "plain"
"""The updater of an ordinary gradient step, which has no paper."""

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
    """The headline figures, each with its protocol in short form.

    A figure that was measured several times is listed by its standard protocol, else by that of
    the most images; the other times come after all other figures.
    """

    def rank(figure: Figure) -> tuple[bool, bool, int, int]:
        named = figure.name in HEADLINES
        place = HEADLINES.index(figure.name) if named else len(HEADLINES)
        again = figure is not first[figure.name]
        return again, not named, place, figure.protocol.get("standard", True) is False

    best = sorted(figures, key=lambda f: (f.protocol.get("standard", True) is not False, f.n))
    first = {figure.name: figure for figure in best}  # standard, else of most images
    shown = sorted(figures, key=rank)[:MOST]
    rows = "".join(_row(figure, {**common, **figure.protocol}) for figure in shown)
    left = len(figures) - len(shown)
    more = f"{left} more, and all protocols in full, are" if left else "The protocols in full are"
    return (
        "## Figures\n\n| figure | value | 95 % interval | n | protocol |\n"
        f"| --- | --- | --- | --- | --- |\n{rows}\n{more} in `{FIGURES}`.\n"
    )


def _row(figure: Figure, protocol: Mapping[str, Any]) -> str:
    label = "" if figure.protocol.get("standard", True) else " (NON-STANDARD protocol)"
    known = figure.low is not None and figure.high is not None
    interval = f"{figure.low:.4g} to {figure.high:.4g}" if known else ""
    attack = protocol.get("attack")
    flat = {**protocol, **(attack if isinstance(attack, Mapping) else {})}
    words = [
        f"{key} {flat[key]}" for key in COMPACT if isinstance(flat.get(key), str | int | float)
    ]
    short = escaped(", ".join([f"evaluator {protocol.get('evaluator', '?')}", *words]))
    name = f"{escaped(figure.name)}{label}"
    return f"| {name} | {figure.value:.4g} | {interval} | {figure.n} | {short} |\n"


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
    if (updater := recipe.get("updater", {}).get("use", PLAIN)) != PLAIN:
        parts.append(str(updater))
    named = dict.fromkeys(["joint-energy-based-model", *parts])
    tags = "".join(f"- {quoted(tag)}\n" for tag in named)
    papers = "".join(f"- {CITED[part]}\n" for part in dict.fromkeys(parts) if part in CITED)
    head = (
        f"---\nlibrary_name: jemkit\npipeline_tag: image-classification\n"
        f"license: {quoted(license)}\ntags:\n{tags}---\n"
    )
    licence = escaped(license)
    if license == "unknown":
        licence = "No licence is stated for these weights: ask their authors before you "
        licence += "redistribute them"
    picture = f"\n## Samples\n\n![Samples]({SAMPLES})\n" if samples else ""
    return (
        f"{head}\n# {escaped(name)}\n\n{about}{picture}\n{_use(name, task)}\n"
        f"`{WEIGHTS}` has SHA-256 `{sha}`; `{CONFIG}` holds the recipe.\n\n"
        f"## Licence\n\n{licence}. jemkit itself is under Apache-2.0.\n\n"
        f"## Citation\n\n- jemkit (CITATION.cff of its repository)\n{papers}"
    )


def _use(name: str, task: Mapping[str, Any] | None) -> str:
    """How to load the model; nothing is read but the folder."""
    plain = re.fullmatch(r"\w[\w.+=-]*", name, re.ASCII)  # no name that needs quotes
    where = name if plain else "."
    shape = ", ".join(str(int(size)) for size in task["shape"]) if task else "3, 32, 32"
    return (
        "## Use\n\n```python\nimport torch\nimport jemkit\n\n"
        f"model = jemkit.load({json.dumps(where)})\n"
        f"images = torch.zeros(1, {shape})  # in [0, 1]\n"
        "logits, energy = model(images), model.energy(images)\n```\n\n"
        f"```\njemkit evaluate {where}\n```\n"
    )
