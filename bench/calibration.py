"""How far correct code is from the oracle, in σ: the distribution that K of SPEC.md, TOLERANCE, is chosen from.

Adds up the reports of runs of the suite, one in each seed, and of a run on the real weights, and writes a page with a
table and a picture.

    lyra conform --profile ci --seed 1 --json build/calibration/1.json
    lyra conform --profile ci --only "real_weights or real_size" --json build/calibration/real.json
    python bench/calibration.py build/calibration/*.json
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, NamedTuple

import matplotlib as mpl
import numpy as np
import typer
from matplotlib.figure import Figure

from lyra.cli.app import run_script
from lyra.cli.files import check_files
from lyra.conformance.report.data import DistancePart, Report, percentiles
from lyra.conformance.report.merge import read_report
from lyra.conformance.tolerance import K
from lyra.spec.files import write_atomically

KINDS = ("outputs", "stages", "gradients", "bfloat16", "real weights")
COLOURS = dict(zip(KINDS, ("#0072B2", "#009E73", "#D55E00", "#CC79A7", "#000000"), strict=True))
REAL = {"real_weights", "real_size"}


class Sample(NamedTuple):
    """Every |Δ|/σ against the oracle of one backend in one kind of comparison: value -> how often, and the largest."""

    counts: Counter[str]
    largest: float

    @property
    def total(self) -> int:
        """How many comparisons, each giving its largest element."""
        return sum(self.counts.values())


def is_real(report: Report) -> bool:
    """Whether a report is of nothing but layers with real weights or of real size."""
    return {prop.name.partition("::")[0] for prop in report.properties} <= REAL


def kind_of(part: DistancePart, limit: float, *, real: bool) -> str | None:
    """Which line a kind of comparison belongs to; None for comparisons with anything but the oracle, whose limit is K.

    `limit` is K as it was when the report was made.
    """
    if part.limit != limit or "↔" in part.backend:
        return None
    if real:
        return "real weights"
    if "bfloat16" in part.compared:
        return "bfloat16"
    if part.compared == "gradients":
        return "gradients"
    return "outputs" if part.compared == "output" else "stages"


def collect(reports: Iterable[Report]) -> dict[tuple[str, str], Sample]:
    """The samples by backend and kind."""
    found: dict[tuple[str, str], Sample] = {}
    for report in reports:
        for part in report.distances:
            kind = kind_of(part, report.tolerance, real=is_real(report))
            if kind is None or not part.percentiles:
                continue
            counts, largest = found.get((part.backend, kind), Sample(Counter(), 0.0))
            counts.update(part.values)
            found[part.backend, kind] = Sample(counts, max(largest, part.percentiles["100"]))
    return dict(sorted(found.items(), key=lambda item: (item[0][0], KINDS.index(item[0][1]))))


def draw(samples: dict[tuple[str, str], Sample]) -> Figure:
    """For each backend, the share of comparisons beyond every |Δ|/σ, both axes logarithmic, and K."""
    backends = list(dict.fromkeys(backend for backend, _ in samples))
    figure = Figure(figsize=(4.9 * len(backends), 3.9), layout="constrained")
    for place, backend in enumerate(backends):
        axes = figure.add_subplot(1, len(backends), place + 1)
        for (name, kind), sample in samples.items():
            if name == backend:
                pairs = sorted((float(value), count) for value, count in sample.counts.items())
                values, counts = zip(*pairs, strict=True)
                share = (sample.total - np.cumsum((0, *counts[:-1]))) / sample.total
                axes.step(values, share, where="pre", color=COLOURS[kind], label=f"{kind} ({sample.total:,})")
        axes.axvline(K, color="#999999", linestyle="--")
        axes.text(K * 0.93, 0.6, f"K = {K:g}", rotation=90, ha="right", va="center", color="#555555")
        axes.set(xscale="log", yscale="log", xlim=(0.05, 2 * K), title=backend, xlabel="|Δ|/σ")
        axes.set_ylabel("share of comparisons beyond")
        axes.legend(loc="lower left", frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def table(samples: dict[tuple[str, str], Sample]) -> str:
    """The Markdown table."""
    lines = ["| Backend | Compared | Comparisons | Median | 99% | 99.9% | Largest |", "|---|---|---|---|---|---|---|"]
    for (backend, kind), sample in samples.items():
        found = percentiles(sample.counts, sample.largest)
        middle = " | ".join(f"{found[share]:.2g}" for share in ("50", "99", "99.9"))
        lines.append(f"| {backend} | {kind} | {sample.total:,} | {middle} | {sample.largest:.2f} |")
    return "\n".join(lines)


PAGE = """# Where K comes from

The tolerance has one constant: a value passes within K·σ of the oracle ([SPEC.md](../spec/SPEC.md), clause TOLERANCE).
σ is what float32 rounding is expected to do to that value, so |Δ|/σ of correct code is of order one whatever the sizes,
and K is read off its distribution. Below it stands for {cases:,} compared cases, {runs} runs of the suite's profile
{profiles} with different seeds, and for the layers of the real Gemma-3 270M. Each comparison counts with its worst
element. K is {k:g}; the largest |Δ|/σ that correct code showed in any stage is {largest:.2f}.

![Share of comparisons beyond each |Δ|/σ](images/calibration.png)

{table}

*outputs*: a layer's output against the oracle; *stages*: each traced stage, along the whole layer or from the backend's
own previous stage; *gradients*: of inputs, weights and static keys and values; *bfloat16*: outputs and stages in that
type; *real weights*: outputs and stages of the global layers of Gemma-3 270M, and layers of Gemma-3 12B's size.

Against this stand mistakes: RoPE's theta off by 0.01% gives 14 to 110, scores in float16 200 to 1,400, values in
bfloat16 over 4,600. A worst-case bound in place of σ (sums of absolute values) was 500 times looser at the size of
Gemma-3 12B.

Versions: {versions}.

To draw this page anew, run the suite in as many seeds as you like and add up the reports:

```bash
lyra conform --profile ci --seed 1 --json build/calibration/1.json
lyra conform --profile ci --only "real_weights or real_size" --json build/calibration/real.json
```

then `python bench/calibration.py build/calibration/*.json`.
"""


def page(reports: list[Report], samples: dict[tuple[str, str], Sample]) -> str:
    """The Markdown page."""
    generated = [report for report in reports if not is_real(report)]
    versions = reports[0].versions
    return PAGE.format(
        cases=sum(report.cases for report in generated),
        runs=len(generated),
        profiles=" and ".join(f"`{name}`" for name in dict.fromkeys(report.profile for report in generated)),
        k=K,
        largest=max(sample.largest for sample in samples.values()),
        table=table(samples),
        versions=", ".join(f"{name} {versions[name]}" for name in ("torch", "jax", "numpy") if name in versions),
    )


def main(
    reports: Annotated[list[Path], typer.Argument(help="JSON reports of `lyra conform`.", exists=True)],
    docs: Annotated[Path, typer.Option(help="Where calibration.md and images/calibration.png go.")] = Path("docs"),
) -> None:
    """Add up reports; write the page and its picture."""
    mpl.use("agg")
    picture = docs / "images" / "calibration.png"
    check_files(picture, docs / "calibration.md", inputs=reports)
    read = [read_report(path) for path in reports]
    failed = [str(path) for path, report in zip(reports, read, strict=True) if not report.ok]
    if failed:
        raise typer.BadParameter(f"{', '.join(failed)}: the run failed, so it says nothing of correct code")
    samples = collect(read)
    if not samples:
        raise typer.BadParameter("the reports hold no comparison with the oracle; give those of whole runs")
    drawn = io.BytesIO()
    draw(samples).savefig(drawn, dpi=150)
    write_atomically(picture, drawn.getvalue())
    write_atomically(docs / "calibration.md", page(read, samples).encode())


if __name__ == "__main__":
    run_script(main)
