"""Markdown tables of benchmarks/results, for README and docs."""

import json
from typing import Any

from tools import RESULTS

COLUMNS = {
    "clean_accuracy": ("clean", "{:.1%}"),
    "pgd_accuracy": ("PGD-20", "{:.1%}"),
    "energy_gap_mean": ("gap, mean", "{:.3f}"),
    "energy_gap_variance": ("gap, variance", "{:.4f}"),
    "energy_gap_relative": ("gap / std E(x)", "{:.2f}"),
    "seconds": ("seconds", "{:.0f}"),
}


def results(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return content


def table(rows: dict[str, dict[str, Any]], first: str, columns: list[str]) -> str:
    heads = [first, *(COLUMNS[c][0] for c in columns)]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, row in rows.items():
        cells = [COLUMNS[c][1].format(row[c]) if c in row else "diverged" for c in columns]
        lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    acceptance = results("acceptance")["figures"]
    print(table(acceptance["table"], "backbone x objective", list(COLUMNS)), "\n")
    for name, difference in acceptance["pgd20_differences"].items():
        low, high = difference["interval95"]
        print(
            f"| {name} | {100 * difference['mean']:+.1f} | [{100 * low:+.1f}, {100 * high:+.1f}] |"
        )
    print()
    print(table(results("sweep")["figures"], "setting", list(COLUMNS)[:-1]))
