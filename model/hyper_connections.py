"""Manifold-constrained hyper-connections: four residual streams around every sub-layer (architecture, 2.2)."""

import torch
from torch import Tensor

from model.build import Build, CheckpointModule

Mix = tuple[Tensor, Tensor, Tensor]
"""a_TD, post_TM, comb_TMM of one site."""


class HyperSites(CheckpointModule):
    """A module with hyper-connection sites: parameters `hc_<site>_{fn,base,scale}`, fp32."""

    def __init__(self, build: Build) -> None:
        super().__init__(build)
        self._sites: list[str] = []
        self._scales: dict[str, Tensor] = {}

    def declare_site(self, site: str, outputs: int, scales: int) -> None:
        c = self.build.config
        self._sites.append(site)
        for name, shape in (("fn", (outputs, c.hc_mult * c.hidden_size)), ("base", (outputs,)), ("scale", (scales,))):
            parameter = self.declare(f"hc_{site}_{name}", shape, "F32", torch.float32)
            self.register_parameter(f"hc_{site}_{name}", parameter)

    def declare_mixing_site(self, site: str) -> None:
        """Rows of fn: M for pre, M for post, M * M for comb (row-major, source then destination)."""
        streams = self.build.config.hc_mult
        self.declare_site(site, (2 + streams) * streams, 3)

    def declare_head_site(self) -> None:
        self.declare_site("head", self.build.config.hc_mult, 1)

    def expand_scales(self) -> None:
        """Repeat each site's scales, so that there is one for each output."""
        m = self.build.config.hc_mult
        for site in self._sites:
            scale: Tensor = getattr(self, f"hc_{site}_scale")
            repeats = [m, m, m * m] if len(scale) == 3 else [m]
            self._scales[site] = scale.repeat_interleave(torch.tensor(repeats, device=scale.device))

    def _site(self, site: str) -> tuple[Tensor, Tensor, Tensor]:
        return getattr(self, f"hc_{site}_fn"), self._scales[site], getattr(self, f"hc_{site}_base")

    def hyper_pre(self, site: str, x_TMD: Tensor) -> Mix:
        c = self.build.config
        return self.build.ops.hyper_pre(
            x_TMD, *self._site(site), iters=c.hc_sinkhorn_iters, eps=c.hc_eps, norm_eps=c.rms_norm_eps
        )

    def hyper_head(self, x_TMD: Tensor) -> Tensor:
        c = self.build.config
        return self.build.ops.hyper_head(x_TMD, *self._site("head"), eps=c.hc_eps, norm_eps=c.rms_norm_eps)


def expand_streams(build: Build, x_TD: Tensor) -> Tensor:
    """Every stream starts as the embedding: [T, M, D]."""
    return x_TD.unsqueeze(1).repeat(1, build.config.hc_mult, 1)
