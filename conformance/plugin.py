"""pytest options of the conformance suite. pytest itself loads this (entry point pytest11): nothing heavy in it."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of `pytest --pyargs lyra.conformance`."""
    group = parser.getgroup("lyra", "Lyra conformance suite")
    group.addoption(
        "--lyra-backend",
        action="append",
        default=[],
        metavar="NAME",
        help="backend under test, by name or package.module:Class; may be repeated (default: all installed)",
    )
    group.addoption("--lyra-profile", default="smoke", choices=["smoke", "ci", "thorough"], help="how much to generate")
    group.addoption("--lyra-seed", type=int, default=0, help="seed of the generated cases")
    group.addoption("--lyra-spec", default=None, metavar="PRESET|FILE.toml", help="hold the suite to one spec or split")
    group.addoption("--lyra-replay", default=None, metavar="FILE.json", help="run one recorded case only")


def pytest_configure(config: pytest.Config) -> None:
    """The marker that declares a property."""
    config.addinivalue_line("markers", "lyra(declaration): a property of the conformance suite and what it cites")
