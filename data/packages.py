"""Where the data of packages lies: installed by the system, or unpacked by scripts/make_small_llava.sh."""

from pathlib import Path

UNPACKED = Path(".cache/packages")


def shared(name: str) -> Path:
    """The folder /usr/share/NAME, or where it was unpacked if it is only there."""
    installed, unpacked = Path("/usr/share", name), UNPACKED / "usr" / "share" / name
    return unpacked if unpacked.is_dir() and not installed.is_dir() else installed
