"""Which transformers the model level is written against."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

OLDEST, TOO_NEW = (5, 20), (6, 0)


def check_transformers(installed: str | None = None) -> None:
    """Refuse a missing transformers, or one whose models this package does not know. Raises ImportError.

    `installed` is the version to judge, by default that of the installed package.
    """
    wanted = f"transformers>={OLDEST[0]}.{OLDEST[1]},<{TOO_NEW[0]}"
    try:
        installed = installed or version("transformers")
    except PackageNotFoundError:
        raise ImportError(f"loading a model needs {wanted}: pip install 'lyra[torch]'") from None
    major, minor = (int(part) for part in installed.split(".")[:2])
    if not OLDEST <= (major, minor) < TOO_NEW:
        raise ImportError(
            f"transformers {installed} is installed; Lyra knows the models of {wanted}: pip install '{wanted}'"
        )
