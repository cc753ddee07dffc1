"""Model cards: no name acts in them, they are short, and their snippet runs."""

import json
import os
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as bounded
from hypothesis import strategies as st
from ranks import in_a_new_process
from toys import REGISTRY

from jemkit import load, train
from jemkit.config.recipe import resolve
from jemkit.evaluation.export import export
from jemkit.metrics.figures import Figure
from jemkit.runtime.extras import command, install
from jemkit.training.model_card import LONGEST, MOST, escaped, figures_table, page, quoted
from jemkit.training.model_folder import verify, write_model

HOSTILE = [
    "[x](javascript:alert(1))", "<script>alert(1)</script>", "---", "a\n---\nb: c", "# title",
    "a|b", "`code`", "```\nrm", "![x](http://evil.example/x.png)", "https://evil.example", "'\"\\",
    "\x1b[31mred", "- item", "1. item", "&lt;b&gt;", "{{ jinja }}", "@user", "~~no~~", "$x$",
    "\u202egnp.exe", "www.evil.example",
]  # fmt: skip
RECIPE = {"backbone": {"use": "jem"}, "objective": {"use": "ce"}, "data": {"use": "digits"}}


def front_matter(text: str) -> dict[str, Any]:
    """The card's YAML head: scalars and one list, in the subset that jemkit writes."""
    first, head, _ = text.split("---\n", 2)
    assert first == ""
    fields: dict[str, Any] = {}
    for line in head.splitlines():
        if line.startswith("- "):
            fields["tags"].append(scalar(line[2:]))
        else:
            name, colon, value = line.partition(":")
            assert colon
            assert re.fullmatch(r"[a-z_]+", name)
            fields[name] = scalar(value.strip()) if value.strip() else []
    return fields


def scalar(text: str) -> Any:
    if text.startswith('"'):
        return json.loads(text)
    assert re.fullmatch(r"[a-z-]+", text)
    return text


def unescaped(text: str) -> str:
    """What a reader of the Markdown sees."""
    import html

    return html.unescape(re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", text))


@pytest.mark.parametrize("name", HOSTILE)
def test_no_name_acts_in_a_card(name: str) -> None:
    recipe = {**RECIPE, "backbone": {"use": name}}
    task = {"shape": [1, 8, 8]}
    text = page(
        name, recipe, f"| {escaped(name)} |\n", task=task, sha="0" * 64, license="mit",
        samples=False,
    )  # fmt: skip
    head = front_matter(text)
    assert head["library_name"] == "jemkit"
    assert head["tags"][1] == "".join(c if c.isprintable() else " " for c in name)
    body = text.split("---\n", 2)[2]
    assert not re.search(r"(?<!\\)\]\(", body.replace("![Samples](samples.png)", ""))
    assert not re.search(r"<\w|</|\x1b|\u202e|https?://|javascript:alert\(", body)
    assert [line for line in body.splitlines() if line.startswith("```")] == [
        "```python", "```", "```", "```",
    ]  # fmt: skip
    assert sum(line.startswith("#") for line in body.splitlines()) == 4


@bounded(max_examples=200, deadline=None)
@given(st.text(max_size=80))
def test_an_escaped_name_is_one_line_that_reads_as_it_is(name: str) -> None:
    line = escaped(name)
    shown = "".join(c for c in " ".join(name.split()) if c.isprintable())
    assert unescaped(line) == shown
    assert "\n" not in line
    assert not re.search(r"(?<!\\)(\\\\)*[\[\]<>|`*]", line)


@bounded(max_examples=100, deadline=None)
@given(st.text(max_size=2 * LONGEST))
def test_a_quoted_name_is_one_yaml_scalar(name: str) -> None:
    read = json.loads(quoted(name))
    assert read.isprintable()
    assert "\n" not in quoted(name)
    assert len(read) <= LONGEST


def figure(name: str, **protocol: Any) -> Figure:
    return Figure(name, 0.5, 0.4, 0.6, 100, {"evaluator": "robustness", **protocol})


def test_a_card_has_ten_figures_at_most_the_headlines_first() -> None:
    figures = [figure(f"other{i}") for i in range(30)]
    figures += [figure("fid"), figure("aa", standard=False), figure("pgd20", standard=False)]
    figures += [figure("clean"), figure("pgd20")]
    text = figures_table(figures, {"norm": "Linf", "radius_px": 8})
    rows = [line for line in text.splitlines() if line.startswith("| ")][2:]
    assert len(rows) == MOST
    first = ["clean", "aa (NON-STANDARD protocol)", "pgd20", "fid"]
    assert [row.split(" | ")[0][2:] for row in rows[:4]] == first
    assert "norm Linf, radius_px 8" in rows[0]
    assert "25 more" in text


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one epoch on jemkit's own parts, exported."""
    named = {
        "data": {"use": "digits"},
        "backbone": {"use": "sadajem", "network": {"use": "smallcnn", "channels": 4}, "steps": 1},
        "objective": {"use": "jem"},
        "run": {"epochs": 1, "max_train": 60, "batch_size": 20, "eval_images": 10},
    }
    overrides = ["backbone.buffer.capacity=20", "backbone.start.use=uniform"]
    run = tmp_path_factory.mktemp("digits") / "run"
    train(resolve(REGISTRY, named=named, overrides=overrides), run, registry=REGISTRY)
    return export(run, out=run.parent / "model", registry=REGISTRY, license="mit").folder


def test_the_snippet_of_a_card_loads_the_model_and_gives_logits(digits: Path) -> None:
    text = (digits / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    in_a_new_process(run_snippet, digits.parent, code)


def run_snippet(folder: Path, code: str) -> None:
    os.chdir(folder)
    names: dict[str, Any] = {}
    warnings.simplefilter("error")
    exec(code, names)
    assert (names["logits"].shape, names["energy"].shape) == ((1, 10), (1,))


def test_a_card_is_short_and_has_samples_licence_and_citation(digits: Path) -> None:
    text = (digits / "README.md").read_text()
    assert len(text.splitlines()) < 80
    assert front_matter(text)["license"] == "mit"
    assert "## Licence\n\nmit." in text
    assert "SADA-JEM" in text or "Performance Gaps" in text
    assert "![Samples](samples.png)" in text
    assert (digits / "samples.png").read_bytes().startswith(b"\x89PNG")


def test_a_loaded_model_is_in_eval_mode_and_judges_as_its_weights(digits: Path) -> None:
    model = load(digits, registry=REGISTRY)
    assert not model.training
    assert not any(part.training for part in model.modules())
    with torch.no_grad():
        assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_every_file_that_goes_with_a_model_is_hashed(tmp_path: Path) -> None:
    made = tmp_path / "model"
    recipe = {"recipe": RECIPE}
    write_model(made, recipe, {"a": torch.zeros(1)}, "", beside={"figures.json": {"a": 1}})
    verify(made)
    assert (made / "figures.json").exists()


@pytest.mark.parametrize(
    ("about", "wanted"),
    [
        (None, "pip install 'jemkit[hub]'"),
        ('{"url": "https://host/jemkit.whl", "archive_info": {}}', "pip install 'jemkit[hub]'"),
        ('{"url": "file:///a%20b", "dir_info": {"editable": true}}',
         "pip install -e '.[hub]' in /a b"),
        ('{"url": "file:///src", "dir_info": {}}', "pip install '.[hub]' in /src"),
    ],
)  # fmt: skip
def test_a_hint_names_an_extra_as_jemkit_was_installed(about: str | None, wanted: str) -> None:
    assert command("hub", about) == wanted


def test_every_hint_of_an_extra_goes_by_one_function() -> None:
    root = Path(__file__).parents[2]
    for package in ("jemkit", "plugins", "cli"):
        for path in (root / package).rglob("*.py"):
            if path.name != "extras.py":
                assert "pip install 'jemkit[" not in path.read_text(), path
    assert install("hub").startswith("pip install ")


@pytest.mark.parametrize(("updater", "named"), [("awp", True), ("plain", False)])
def test_a_card_names_and_cites_an_updater_of_a_paper(updater: str, named: bool) -> None:
    recipe = {**RECIPE, "updater": {"use": updater}}
    text = page("a", recipe, "", task=None, sha="0" * 64, license="mit", samples=False)
    assert (updater in front_matter(text)["tags"]) is named
    assert ("Adversarial Weight Perturbation" in text) is named
