"""Comparisons of speed as their page shows them."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mimbench import speed
from mimbench.report.words import number, page_name


def speed_views(comparisons: Iterable[speed.Comparison]) -> list[dict[str, Any]]:
    """Each comparison as its page shows it, fastest contender first and the limit among them."""
    return [_speed_view(found) for found in sorted(comparisons, key=lambda c: (c.name, c.file))]


def _speed_view(found: speed.Comparison) -> dict[str, Any]:
    facts, ours = found.environment, found.timing(found.ours).median
    rows: list[dict[str, Any]] = [
        {
            "name": timing.name,
            "version": timing.version,
            "ours": timing.name == found.ours,
            "seconds": timing.median,
            "range": f"{number(min(timing.seconds))} to {number(max(timing.seconds))}",
            "ratio": found.ratio(timing.name),
            "note": timing.note,
        }
        for timing in found.timings
    ]
    if found.limit:
        rows.append(
            {
                **{"name": "", "version": "", "ours": False, "range": ""},
                **{"seconds": found.limit.seconds, "ratio": found.limit.seconds / ours},
                "note": found.limit.what,
            }
        )
    rows.sort(key=lambda row: row["seconds"])
    for row in rows:
        row["share"] = round(100 * row["ratio"] / rows[-1]["ratio"], 1)
    bars = []
    for bar in found.bars:
        reached = None if bar.against in found.skipped else found.ratio(bar.against)
        verdict = "not run" if reached is None else "reached" if reached >= bar.ratio else "missed"
        bars.append({"against": bar.against, "least": bar.ratio, "ratio": reached, "verdict": verdict})
    on_gpu = not found.device.startswith("cpu")
    device = f" --device {found.device}" if on_gpu else ""
    script = found.name.partition("-")[0]  # a comparison is named as its script and the variant
    names = ("python", "mimbench", "torch", "numpy", *(("driver", "cuda") if on_gpu else ()))
    return {
        "anchor": f"s-{page_name(Path(found.file).stem)}",
        "title": found.title,
        "work": found.work,
        "rows": rows,
        "rounds": len(found.timing(found.ours).seconds),
        "of_limit": found.of_limit,
        "limit": found.limit.what if found.limit else "",
        "bars": bars,
        "agreement": found.agreement,
        "skipped": found.skipped,
        "growth": found.growth,
        "weighed": any(scale.peak_bytes is not None for scale in found.growth),
        "device": found.device,
        "threads": found.threads,
        "machine": facts.get("gpu" if on_gpu else "cpu") or "an unnamed machine",
        "cores": facts.get("cores"),
        "versions": ", ".join(f"{name} {facts[name]}" for name in names if facts.get(name)),
        "date": datetime.fromisoformat(found.created).astimezone(UTC),
        "command": f"python benchmark/speed/{script}.py --threads {found.threads}{device}",
    }
