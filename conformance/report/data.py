"""The report as data: what `--json` writes."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from lyra.conformance.record import Record
from lyra.conformance.session import Session
from lyra.conformance.tolerance import K

FORMAT = 1
PACKAGES = ("lyra", "numpy", "torch", "transformers", "jax", "flax", "hypothesis", "pytest")


def versions() -> dict[str, str]:
    """Versions of what took part, of those that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def report_data(session: Session, seconds: float) -> dict[str, Any]:
    """Everything the run saw, as plain data."""
    record = session.record
    return {
        "format": FORMAT,
        "ok": record.ok,
        "profile": session.profile.name,
        "seed": session.seed,
        "spec": session.scope.to_dict() if session.scope else None,
        "tolerance": K,
        "backends": [
            {"name": backend.name, "capabilities": sorted(backend.capabilities)} for backend in session.backends
        ],
        "cases": record.cases,
        "seconds": round(seconds, 3),
        "cases_per_second": round(record.cases / max(record.seconds, 1e-9), 1),
        "versions": versions(),
        "machine": {"platform": platform.platform(), "processor": platform.machine(), "byteorder": sys.byteorder},
        "properties": [_property(record, name) for name in record.properties],
        "distances": [_distances(*key, ratios) for key, ratios in record.distances.items()],
        "failures": [vars(failure) for failure in record.failures.values()],
    }


def _property(record: Record, name: str) -> dict[str, Any]:
    prop = record.properties[name]
    return {
        "name": prop.name,
        "summary": prop.summary,
        "statements": prop.statements,
        "backends": {
            backend: {"status": tally.status, "cases": tally.cases, "why_unsupported": tally.why_unsupported or None}
            for backend, tally in prop.tallies.items()
        },
    }


def _distances(backend: str, stage: str, ratios: list[float]) -> dict[str, Any]:
    """The distribution of |Δ|/σ: percentiles of the finite ones, and the count of the others."""
    values = np.array(ratios)
    finite = values[np.isfinite(values)]
    points = (50, 90, 99, 99.9, 100)
    percentiles = {str(p): round(float(np.percentile(finite, p)), 4) for p in points} if finite.size else {}
    return {
        "backend": backend,
        "compared": stage,
        "count": len(ratios),
        "not_finite": int(values.size - finite.size),
        "percentiles": percentiles,
    }
