"""The one error a checkpoint can raise."""

from pathlib import Path


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or does not fit its configuration.

    The message says where, what, what was expected, what was found and, where there is one, the nearest
    thing that works.
    """

    def __init__(
        self,
        where: Path | str,
        what: str,
        *,
        expected: str | None = None,
        found: str | None = None,
        hint: str | None = None,
    ) -> None:
        parts = [f"{where}: {what}"]
        if expected is not None:
            parts.append(f"expected {expected}" + (f", found {found}" if found is not None else ""))
        elif found is not None:
            parts.append(f"found {found}")
        message = "; ".join(parts)
        super().__init__(message if hint is None else f"{message}. {hint}")
        self.where = str(where)
        self.what = what
