"""Names and versions of the packages that scorers are built on."""

from __future__ import annotations

from importlib import metadata


def installed(package: str) -> str:
    """Returns a package's name with its installed version, for `Reward.version`."""
    try:
        return f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:
        return f"{package} (not installed)"
