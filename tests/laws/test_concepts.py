"""The script that draws the pictures of docs/concepts.md still runs."""

import runpy
from pathlib import Path

from shown import shown_toy

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "concepts.py"


def test_the_script_draws_its_charts(tmp_path: Path) -> None:
    script = runpy.run_path(str(SCRIPT))
    script["density"].__globals__["IMAGES"] = tmp_path
    first, second = (shown_toy(name).model for name in ("sadajem", "jempp"))
    plain, test = shown_toy("classifier").model, shown_toy("classifier").test
    script["density"](first, test)
    script["objective"](first, second, test)
    script["updater"](plain, plain, test)
    drawn = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert set(drawn) == {"density.svg", "objective.svg", "updater.svg"}
    assert [name for name, chart in drawn.items() if "nan" in chart] == []
