"""Draw the demo's PPO curve as a small SVG: mean score and KL to the reference against updates.

    python scripts/demo_figure.py runs/demo/ppo docs/demo.svg

Reads `metrics.jsonl` of the run directory. The colours are mid-tones on a transparent background, readable on a light
and on a dark page.
"""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

PANELS = (
    ("objective/scores", "mean score of the reward model", "#3b82f6"),
    ("objective/kl", "KL to the SFT model, nats per answer", "#e07b39"),
)
WIDTH, HEIGHT = 330, 170  # of one panel's axes
LEFT, TOP, GAP = 40, 34, 62
GREY = "#808080"


def axis_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten that enclose [low, high]: the axis runs from the first to the last.

    At most `most` steps lie between them.
    """
    span = (high - low) or 1.0
    power = 10 ** math.floor(math.log10(span / most))
    steps = (factor * power for factor in (1, 2, 5, 10, 20))
    step = next(step for step in steps if math.ceil(high / step) - math.floor(low / step) <= most)
    return [step * i for i in range(math.floor(low / step), math.ceil(high / step) + 1)]


def panel(steps: Sequence[float], values: Sequence[float], left: float, title: str, colour: str) -> list[str]:
    """SVG elements of one curve with its axes."""
    x_ticks, y_ticks = axis_ticks(0, max(steps)), axis_ticks(min(values), max(values))

    def x(step: float) -> float:
        return left + WIDTH * step / x_ticks[-1]

    def y(value: float) -> float:
        return TOP + HEIGHT * (y_ticks[-1] - value) / (y_ticks[-1] - y_ticks[0])

    elements = [f'<text x="{left}" y="{TOP - 14}" font-weight="bold">{title}</text>']
    for tick in y_ticks:
        elements.append(
            f'<line x1="{left}" x2="{left + WIDTH}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" stroke="{GREY}" '
            'stroke-opacity="0.35"/>'
        )
        elements.append(f'<text x="{left - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in x_ticks:
        elements.append(f'<text x="{x(tick):.1f}" y="{TOP + HEIGHT + 17}" text-anchor="middle">{tick:g}</text>')
    elements.append(f'<text x="{left + WIDTH / 2}" y="{TOP + HEIGHT + 34}" text-anchor="middle">PPO update</text>')
    points = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in zip(steps, values, strict=True))
    elements.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
    return elements


def figure(records: Sequence[dict[str, float]]) -> str:
    """The SVG of a run's records, one panel for each of `PANELS`."""
    width, height = 2 * (LEFT + WIDTH) + GAP - LEFT + 14, TOP + HEIGHT + 44
    elements = []
    for place, (key, title, colour) in enumerate(PANELS):
        logged = [(record["step"], record[key]) for record in records if key in record]
        steps, values = zip(*logged, strict=True)
        elements += panel(steps, values, LEFT + place * (WIDTH + GAP), title, colour)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            f'font-family="sans-serif" font-size="12" fill="{GREY}">',
            *elements,
            "</svg>\n",
        ]
    )


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit("usage: python scripts/demo_figure.py RUN_DIRECTORY FILE.svg")
    lines = (Path(sys.argv[1]) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    Path(sys.argv[2]).write_text(figure([json.loads(line) for line in lines]), encoding="utf-8")


if __name__ == "__main__":
    main()
