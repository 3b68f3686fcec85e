"""The ranks that share one model: tensor parallelism over dense layers, expert parallelism over routed experts.

A group of size 1 needs no `torch.distributed`; every collective is then the identity.
"""

import torch
import torch.distributed as dist
from torch import Tensor


class ParallelGroup:
    """Rank and size of this process among the ranks that share the model, and the collectives the model needs."""

    def __init__(self, process_group: "dist.ProcessGroup | None", *, rank: int, size: int) -> None:
        assert 0 <= rank < size
        assert process_group is not None or size == 1
        self._process_group = process_group
        self.rank = rank
        self.size = size

    @classmethod
    def single(cls) -> "ParallelGroup":
        return cls(None, rank=0, size=1)

    @classmethod
    def of(cls, process_group: "dist.ProcessGroup") -> "ParallelGroup":
        return cls(process_group, rank=dist.get_rank(process_group), size=dist.get_world_size(process_group))

    def share(self, field: str, total: int, multiple_of: int = 1) -> tuple[int, int]:
        """(start, length) of this rank's equal share of `total`.

        Raises:
            ValueError: `total` does not divide into equal shares of a multiple of `multiple_of`; names `field`.
        """
        if self.size == 1:
            return 0, total
        if total % (self.size * multiple_of):
            unit = f" in units of {multiple_of}" if multiple_of > 1 else ""
            raise ValueError(f"{field} = {total} does not divide{unit} over {self.size} ranks")
        length = total // self.size
        return self.rank * length, length

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over the ranks; may overwrite `x`."""
        if self.size > 1:
            dist.all_reduce(x, group=self._process_group)
        return x

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        """The ranks' tensors concatenated along `dim` in rank order."""
        if self.size == 1:
            return x
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous(), group=self._process_group)
        return torch.cat(parts, dim)
