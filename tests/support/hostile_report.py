"""A run folder whose every text is an attack on the page, and three that are plain."""

from pathlib import Path

from report_runs import RECIPE, N, bare_run, card, full_record, record, whole_run

from jemkit.metrics.figures import plain
from jemkit.metrics.record_file import Record

HOSTILE = '<img src=x onerror="window.hurt=1">\'</script><script>window.hurt=1</script>&'


def hostile_run(folder: Path) -> Path:
    """Every text that a file may bring is an attack."""
    folder = folder / "<b onclick=alert(1)>&'\""
    whole = full_record(1.0)
    figures = [
        *whole.figures,
        plain(HOSTILE, 1.0, N, card(**{HOSTILE: HOSTILE, "attack": HOSTILE})),
    ]
    row = dict.fromkeys(("name", "found", "means", "do"), HOSTILE)
    tables = {
        **whole.tables, "ood": {HOSTILE: {HOSTILE: {"auroc": HOSTILE, "n": 3}}},
        "indicators": {HOSTILE: [{**row, "flag": True}]},
        "radius_curve": {**whole.tables["radius_curve"], "attack": HOSTILE, "norm": HOSTILE},
        "energies": {**whole.tables["energies"], "n": {"clean": HOSTILE}},
    }  # fmt: skip
    subject = {**whole.subject, "backbone": HOSTILE, "data": HOSTILE, "run": HOSTILE}
    protocol = {**whole.protocol, "checkpoint": HOSTILE, "versions": {HOSTILE: HOSTILE}}
    bad = Record(subject, protocol, figures, tables, {}, {HOSTILE: HOSTILE}, [HOSTILE])
    bare_run(folder, bad, {**RECIPE, HOSTILE: {HOSTILE: HOSTILE}})
    (folder / "metrics.csv").write_text(f'step,"loss {HOSTILE.replace(chr(34), "")}"\n0,1\n1,2\n')
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "<img onerror=x>.png").write_bytes(b"no picture")
    return folder


def three_runs(root: Path) -> list[Path]:
    """Two whole runs, and a third of which little is known."""
    trades = {**RECIPE, "objective": {"use": "trades", "beta": 6.0}}
    quick = record({"clean": 170, "pgd20": 90}, radius_px=4.0, standard=False)
    return [
        whole_run(root / "ebjdat"), whole_run(root / "trades", 1.0, trades),
        bare_run(root / "quick", quick),
    ]  # fmt: skip
