"""The model served when none is named: `nano` in the official format, made once into the user's cache directory.

`python -m model.tools.default_model` prints its directory. torch is imported only when the model has to be made.
"""

import fcntl
import json
import os
import sys
from pathlib import Path
from typing import Final

PRESET: Final = "nano"
FORMAT: Final = "fp4"
SEED: Final = 0
CONTENT_VERSION = 1
"""Raised whenever the same preset, format and seed give other bytes."""
_MARKER = "complete.json"


def default_model_dir() -> Path:
    """Directory of the embedded model, made on the first call (a few seconds) and checked by file sizes on later ones.

    Processes that start together wait for each other on a lock file.

    Raises:
        OSError: the cache directory cannot be written.
    """
    models = _cache_home() / "fathom" / "models"
    model_dir = models / f"{PRESET}-{FORMAT}-seed{SEED}-v{CONTENT_VERSION}"
    if _is_complete(model_dir):
        return model_dir
    models.mkdir(parents=True, exist_ok=True)
    with (models / f".{model_dir.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _is_complete(model_dir):
            from model.tools.make_checkpoint import make_checkpoint

            make_checkpoint(PRESET, SEED, FORMAT, model_dir, force=True)
            _mark_complete(model_dir)
    return model_dir


def _cache_home() -> Path:
    named = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG rules: a relative path is to be ignored.
    return Path(named) if named.startswith("/") else Path.home() / ".cache"


def _sizes(model_dir: Path) -> dict[str, int]:
    return {p.name: p.stat().st_size for p in sorted(model_dir.iterdir()) if p.name != _MARKER}


def _mark_complete(model_dir: Path) -> None:
    temporary = model_dir / f"{_MARKER}.new"
    sizes = _sizes(model_dir)
    temporary.write_text(json.dumps(sizes, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, model_dir / _MARKER)


def _is_complete(model_dir: Path) -> bool:
    try:
        return bool(json.loads((model_dir / _MARKER).read_text(encoding="utf-8")) == _sizes(model_dir))
    except (OSError, ValueError):
        return False


def main() -> int:
    """Print the directory; returns the exit code."""
    try:
        print(default_model_dir())
    except OSError as error:
        hint = "set XDG_CACHE_HOME to a directory that can be written, or name a MODEL_DIR"
        print(f"fathom: the embedded model could not be made: {error}; {hint}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
