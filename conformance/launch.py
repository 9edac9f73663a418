"""Makes the session of a pytest run from its options, once."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import platformdirs
import pytest
from threadpoolctl import threadpool_limits

from lyra.backends.protocol import Backend, BackendNotFound, get_backend, known_backends
from lyra.backends.raised import interrupts_watched
from lyra.spec.attention import AttentionSpec
from lyra.spec.errors import SpecError
from lyra.spec.model import ModelSpec, load_spec
from lyra.spec.split import HeadSplit

from .replay import Replay
from .selection import selects
from .session import PROFILES, Profile, Session, UsageError
from .shard import Shard
from .stash import OWN, REPLAY, SESSION

THREADS = {"OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"}
"""What a user sets to choose the threads of NumPy's linear algebra."""


class SessionPlugin:
    """Hands a ready session to a pytest run: `pytest.main(args, plugins=[SessionPlugin(session)])`."""

    def __init__(self, session: Session) -> None:
        self.session = session


def begin(config: pytest.Config) -> None:
    """Start the session of this pytest run, unless it has begun. Raises UsageError of pytest for what it cannot be."""
    if SESSION in config.stash:
        return
    watch = ExitStack()
    config.add_cleanup(watch.close)
    watch.enter_context(interrupts_watched())
    plugins = config.pluginmanager.get_plugins()
    given = next((plugin for plugin in plugins if isinstance(plugin, SessionPlugin)), None)
    path, only = config.getoption("--lyra-replay"), config.getoption("--lyra-only")
    try:
        if only is not None:
            selects(only, "", "")
        config.stash[REPLAY] = Replay.read(path) if path is not None else None
        if given is not None:
            config.stash[SESSION] = given.session
        else:
            for option in ("--lyra-json", "--lyra-report"):
                check_place(config.getoption(option), option)
            config.stash[SESSION] = make_session(
                config.getoption("--lyra-backend"),
                profile=config.getoption("--lyra-profile"),
                seed=config.getoption("--lyra-seed"),
                spec=config.getoption("--lyra-spec"),
                shard=config.getoption("--lyra-shard"),
                database=config.getoption("--lyra-database"),
            )
            config.stash[OWN] = True
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None


def check_place(path: Path | None, option: str) -> None:
    """Refuse a file that could not be written after the run. Raises UsageError."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        wrong = "it is a folder" if path.is_dir() else f"there is no folder {str(path.parent)!r}"
        raise UsageError(f"{option} {str(path)!r} cannot be written: {wrong}")


def make_session(
    names: Sequence[str],
    *,
    profile: str | Profile,
    seed: int,
    spec: str | None,
    shard: str | None = None,
    database: Path | None = None,
) -> Session:
    """A session for backends by name, all installed ones if none is named. Raises InputError."""
    session = settled(profile=profile, seed=seed, spec=spec, shard=shard, database=database)
    try:
        backends = load_backends(names)
    except (BackendNotFound, ImportError) as error:
        raise UsageError(str(error)) from None
    session.backends = backends
    session.requested_as = dict(zip((backend.name for backend in backends), dict.fromkeys(names), strict=False))
    return session


def settled(
    *, profile: str | Profile, seed: int, spec: str | None, shard: str | None = None, database: Path | None = None
) -> Session:
    """A session without a backend: all that its options say. Raises InputError for what they cannot be."""
    keep_numpy_to_one_thread()
    prepare_environment()
    try:
        attention, splits = read_attention(spec) if spec is not None else (None, ())
    except (SpecError, OSError) as error:
        raise UsageError("; ".join(str(error).splitlines())) from None
    return Session(
        profile=PROFILES[profile] if isinstance(profile, str) else profile,
        seed=seed,
        spec=attention,
        splits=splits,
        shard=Shard.parse(shard) if shard is not None else None,
        database=database,
    )


def load_backends(names: Sequence[str]) -> list[Backend]:
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
    requested_as: dict[str, str] = {}
    for name, backend in found.items():
        if backend.name in requested_as:
            raise UsageError(
                f"{requested_as[backend.name]!r} and {name!r} both have the name {backend.name!r}, under which a "
                f"report tells them apart; give one of them another"
            )
        requested_as[backend.name] = name
    return list(found.values())


def read_attention(source: str) -> tuple[AttentionSpec, tuple[HeadSplit, ...]]:
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
