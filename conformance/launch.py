"""Makes the session of a pytest run from its options, once, before the properties are imported."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import platformdirs
import pytest
from threadpoolctl import threadpool_limits

from lyra.backends.protocol import Backend, BackendNotFound, get_backend, known_backends
from lyra.spec.attention import AttentionSpec
from lyra.spec.errors import SpecError
from lyra.spec.model import ModelSpec, load_spec
from lyra.spec.split import HeadSplit

from .plugin import BEGUN
from .replay import Replay
from .selection import selects
from .session import PROFILES, Session, UsageError, start
from .shard import Shard

THREADS = {"OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"}
"""What a user sets to choose the threads of NumPy's linear algebra."""

REPLAY = pytest.StashKey[Replay | None]()


class SessionPlugin:
    """Hands a ready session to a pytest run: `pytest.main(args, plugins=[SessionPlugin(session)])`."""

    def __init__(self, session: Session) -> None:
        self.session = session


def begin(config: pytest.Config) -> None:
    """Start the session of this pytest run, unless it has begun."""
    if config.stash.get(BEGUN, False):
        return
    config.stash[BEGUN] = True
    given = next((one for one in config.pluginmanager.get_plugins() if isinstance(one, SessionPlugin)), None)
    path, only = config.getoption("--lyra-replay"), config.getoption("--lyra-only")
    try:
        selects(only or "test", "", "")
        config.stash[REPLAY] = Replay.read(path) if path else None
        if given is not None:
            start(given.session)
        else:
            start(
                make_session(
                    config.getoption("--lyra-backend"),
                    profile=config.getoption("--lyra-profile"),
                    seed=config.getoption("--lyra-seed"),
                    spec=config.getoption("--lyra-spec"),
                    shard=config.getoption("--lyra-shard"),
                    database=config.getoption("--lyra-database"),
                )
            )
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None


def make_session(
    names: list[str],
    *,
    profile: str,
    seed: int,
    spec: str | None,
    shard: str | None = None,
    database: Path | None = None,
) -> Session:
    """A session for backends by name, all installed ones if none is named. Raises InputError."""
    keep_numpy_to_one_thread()
    prepare_environment()
    try:
        backends = load_backends(names)
        scope, splits = read_scope(spec) if spec else (None, ())
        return Session(
            backends=backends,
            profile=PROFILES[profile],
            seed=seed,
            scope=scope,
            splits=splits,
            asked=dict(zip((backend.name for backend in backends), dict.fromkeys(names), strict=False)),
            shard=Shard.parse(shard) if shard else None,
            database=database,
        )
    except (BackendNotFound, SpecError, ImportError) as error:
        raise UsageError(str(error)) from None


def load_backends(names: list[str]) -> list[Backend]:
    """Backends by name; without names, every installed one that loads.

    Raises BackendNotFound, ImportError, and UsageError where two have one name.
    """
    if names:
        return unlike({name: get_backend(name) for name in names})
    found: dict[str, Backend] = {}
    missing = []
    for name in sorted(known_backends()):
        try:
            found[name] = get_backend(name)
        except ImportError as error:
            missing.append(str(error))
    if not found:
        raise BackendNotFound("no backend can be loaded: " + "; ".join(missing or ["none is installed"]))
    return unlike(found)


def unlike(found: Mapping[str, Backend]) -> list[Backend]:
    """Backends by what they were asked for as, once no two have one name. Raises UsageError."""
    asked: dict[str, str] = {}
    for name, backend in found.items():
        if backend.name in asked:
            raise UsageError(
                f"{asked[backend.name]!r} and {name!r} both have the name {backend.name!r}, under which a report tells "
                f"them apart; give one of them another"
            )
        asked[backend.name] = name
    return list(found.values())


def read_scope(source: str) -> tuple[AttentionSpec, tuple[HeadSplit, ...]]:
    """The attention spec that a preset or a TOML file holds the suite to: a model's global layer, with the first of its
    layers' splits, and all of these where they differ. Raises SpecError.
    """
    spec = load_spec(source)
    if not isinstance(spec, ModelSpec):
        return spec, ()
    splits = tuple(dict.fromkeys(item.split for item in spec.splits if item.split.lyra_q_heads))
    return (spec.attention.replace(split=splits[0]), splits) if splits else (spec.attention, ())


def keep_numpy_to_one_thread() -> None:
    """Leave the oracle one thread, unless the user has decided otherwise.

    NumPy has read its variables by now, so that its linear algebra has to be told. Of two threads one spins while it
    waits, beside whatever else the machine does.
    """
    if not THREADS & os.environ.keys():
        threadpool_limits(1, user_api="blas")


def prepare_environment() -> None:
    """Settings that backends read when they are imported, unless the user has decided otherwise.

    What a backend compiles is kept between runs. One thread: in arrays this small the barrier of a second one costs
    more than it brings, many times more on a busy machine.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    folder = Path(os.environ.get("LYRA_CACHE") or platformdirs.user_cache_dir("lyra")) / "compiled"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
