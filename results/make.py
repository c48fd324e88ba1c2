"""Write the README's table of results and its picture from the runs in this folder.

python results/make.py            # then look at README.md and docs/results.svg

Names of rows come from `runs.toml`; rates come from `eval.json`, episodes and minutes are summed
from `metrics.jsonl`. `tests/unit/test_results.py` fails when the README says something else.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
PICTURE = HERE.parent / "docs" / "results.svg"
BEGIN, END = "<!-- results: written by results/make.py -->\n", "<!-- end of results -->\n"
MODES = ("greedy", "sampled")
SMOOTH = 5
"""Steps whose mean success is drawn: one step's depends on the states that it drew."""
MISSING = "not measured"


class Training(NamedTuple):
    """What a run of `vlactl train` took, and its success in training by step."""

    success: list[float]
    episodes: int
    seconds: float

    @classmethod
    def read(cls, path: Path) -> Training:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        steps = [line for line in lines if "env/num_trajectories" in line]
        return cls(
            success=[step["env/success_once"] for step in steps],
            episodes=int(sum(step["env/num_trajectories"] for step in steps)),
            seconds=sum(line.get("time/step", line.get("time/eval", 0.0)) for line in lines),
        )

    def __str__(self) -> str:
        return f"{len(self.success)} steps, {self.episodes} episodes, {self.seconds / 60:.0f} min"


def sections() -> list[dict[str, Any]]:
    """What is shown, see `runs.toml`."""
    shown: list[dict[str, Any]] = tomllib.loads((HERE / "runs.toml").read_text())["section"]
    return shown


def total(row: dict[str, Any], mode: str) -> dict[str, Any] | None:
    """Of an evaluation: successes, trials, rate, interval; None = it was not made."""
    folder = HERE / row["evals"]
    if not any((folder / each / "eval.json").exists() for each in MODES):
        raise FileNotFoundError(f"there is no evaluation in {folder}")
    path = folder / mode / "eval.json"
    if not path.exists():
        return None
    found: dict[str, Any] = json.loads(path.read_text())["total"]
    return found


def rate(found: dict[str, Any] | None) -> str:
    """Such as `281/500 = 56.2 % [51.8, 60.5]`."""
    if found is None:
        return MISSING
    low, high = (100 * limit for limit in found["interval"])
    share = f"{100 * found['rate']:.1f} % [{low:.1f}, {high:.1f}]"
    return f"{found['successes']}/{found['trials']} = {share}"


def table() -> str:
    """The Markdown between the marks."""
    return "".join([BEGIN, *_lines(), END])


def _lines() -> Iterator[str]:
    yield "| | greedy | sampled | reinforcement learning |\n|---|---|---|---|\n"
    for section in sections():
        yield f"| **{section['title']}** | | | |\n"
        for row in section["row"]:
            trained = Training.read(HERE / row["training"]) if "training" in row else ""
            rates = " | ".join(rate(total(row, mode)) for mode in MODES)
            yield f"| {row['policy']} | {rates} | {trained} |\n"


def digest() -> str:
    """Of everything that is drawn; the picture carries it."""
    drawn = hashlib.sha256((HERE / "runs.toml").read_bytes())
    for section in sections():
        for row in section["row"]:
            drawn.update(repr(total(row, "greedy")).encode())
            if "training" in row:
                drawn.update((HERE / row["training"]).read_bytes())
    return drawn.hexdigest()


def draw() -> Figure:
    """Success in training by step, and the greedy rates on held-out states before and after."""
    shown = [each for each in sections() if any("training" in row for row in each["row"])]
    columns = min(2, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(5 * columns, 3.2 * rows), layout="constrained")
    places = figure.subplots(rows, columns, squeeze=False).flat
    for section, axes in zip(shown, places, strict=False):
        axes.set_title(section["title"], fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        _draw_section(axes, section)
    for unused in places:
        unused.remove()
    return figure


def _draw_section(axes: Any, section: dict[str, Any]) -> None:
    for row in (row for row in section["row"] if "training" in row):
        success = Training.read(HERE / row["training"]).success
        means = [
            sum(success[max(0, i - SMOOTH + 1) : i + 1]) / min(i + 1, SMOOTH)
            for i in range(len(success))
        ]
        first = row.get("after", 0) + 1
        steps = range(first, first + len(means))
        (line,) = axes.plot(steps, means, label=f"{row['policy']}, in training")
        _mark(axes, steps[-1], total(row, "greedy"), line.get_color(), None)
    untrained = (row for row in section["row"] if "training" not in row)
    for row, colour in zip(untrained, cycle(("black", "grey", "silver")), strict=False):
        _mark(axes, 0, total(row, "greedy"), colour, row["policy"])
    axes.legend(fontsize=6, loc="lower right", title="points: greedy, held out", title_fontsize=6)


def _mark(
    axes: Any, step: int, found: dict[str, Any] | None, colour: str, label: str | None
) -> None:
    if found is None:
        return
    low, high = found["interval"]
    error = [[found["rate"] - low], [high - found["rate"]]]
    axes.errorbar(
        [step], [found["rate"]], yerr=error, fmt="o", color=colour, capsize=3, label=label
    )


def main() -> None:
    """Replace the table in the README, and the picture."""
    before, rest = README.read_text().split(BEGIN)
    README.write_text(before + table() + rest.split(END)[1])
    draw().savefig(PICTURE, metadata={"Date": None, "Description": digest()})


if __name__ == "__main__":
    main()
