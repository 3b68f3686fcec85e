"""What has been measured, in a JSON file that is written after each row and read again by --resume; and the table."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FORMAT = 1
_DIFFERENCES = 5
"""Kept of each row, so that a look at the file tells what goes wrong."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowResult:
    """One finished row."""

    name: str
    num_examples: int
    num_right: int
    target: float | None
    seconds: float
    deciles: tuple[tuple[int, int], ...] = ()
    """(right, examples) of each tenth of the depth, where the examples have one."""
    differences: tuple[str, ...] = ()
    """The first of the wrong answers."""
    notes: str = ""
    num_near_ties: int = 0
    """Of identity rows: answers that differ where the two likeliest tokens were as good as equal."""
    token_ids: tuple[tuple[int, ...], ...] = ()
    """Of each answer, for the identity rows."""

    @property
    def share(self) -> float:
        return self.num_right / self.num_examples if self.num_examples else 0.0

    @property
    def passed(self) -> bool | None:
        """None where nothing is asked for."""
        return None if self.target is None else self.share >= self.target

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "share": self.share, "passed": self.passed}

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> "RowResult":
        """Raises KeyError, TypeError or ValueError for what `to_json` has not written."""
        names = [entry.name for entry in dataclasses.fields(cls)]
        values = {name: raw[name] for name in names}
        values["deciles"] = tuple((int(right), int(count)) for right, count in raw["deciles"])
        values["differences"] = tuple(str(line) for line in raw["differences"])
        values["token_ids"] = tuple(tuple(int(token) for token in ids) for ids in raw["token_ids"])
        return cls(**values)


@dataclass(slots=True)
class Results:
    """The results of one model, kept in `path` (None: in memory only)."""

    model: str
    """Fingerprint: results of another model are not mixed with these."""
    path: Path | None
    rows: dict[str, RowResult] = field(default_factory=dict)

    @classmethod
    def open(cls, model: str, path: Path | None, *, resume: bool) -> "Results":
        """With `resume` the finished rows of the file, if they are of this model.

        Raises:
            ValueError: the file is not one that this class has written.
        """
        results = cls(model, path)
        if path is None or not resume or not path.exists():
            return results
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            if raw["format"] == FORMAT and raw["model"] == model:
                rows = [RowResult.from_json(row) for row in raw["rows"]]
                results.rows = {row.name: row for row in rows}
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: not a file of results ({error!r}); give another --out, or remove it") from None
        return results

    def finished(self, name: str, num_examples: int) -> RowResult | None:
        """The result of a row, if it was measured with so many examples."""
        row = self.rows.get(name)
        return row if row is not None and row.num_examples == num_examples else None

    def add(self, row: RowResult) -> None:
        """Keep a row and write the file."""
        self.rows[row.name] = row
        if self.path is None:
            return
        state = {"format": FORMAT, "model": self.model, "rows": [r.to_json() for r in self.rows.values()]}
        temporary = self.path.with_name(self.path.name + ".new")
        temporary.write_text(json.dumps(state, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(temporary, self.path)


def kept(differences: Iterable[str]) -> tuple[str, ...]:
    """The first few."""
    return tuple(line for _, line in zip(range(_DIFFERENCES), differences, strict=False))


def fingerprint(model_dir: Path) -> str:
    """SHA-256 over names and bytes of the files that make the model."""
    digest = hashlib.sha256()
    for path in sorted(model_dir.iterdir()):
        if path.suffix not in (".json", ".safetensors") or path.name == "expected.json":
            continue
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


HEADER = f"{'row':28} {'examples':>8} {'right':>6} {'share':>7} {'target':>7}  {'':6} {'seconds':>8}"


def table_line(row: RowResult) -> str:
    """One line under HEADER, and a second one with the deciles."""
    target = "" if row.target is None else f"{row.target:7.1%}"
    verdict = {None: "", True: "pass", False: "FAIL"}[row.passed]
    ties = f"  {row.num_near_ties} near ties" if row.num_near_ties else ""
    notes = f"  {row.notes}" if row.notes else ""
    line = (
        f"{row.name:28} {row.num_examples:8} {row.num_right:6} {row.share:7.1%} {target:>7}  {verdict:6} "
        f"{row.seconds:8.1f}{ties}{notes}"
    )
    if not row.deciles:
        return line
    shares = " ".join(f"{right / count:4.0%}" if count else "   -" for right, count in row.deciles)
    return f"{line}\n{'  by depth':28} {shares}"
