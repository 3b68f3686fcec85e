"""Two ranks over gloo compute what one rank computes."""

import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

RANK = """
import importlib.util, sys
import torch, torch.distributed as dist
from model.parallel import ParallelGroup
from model.transformer import Transformer

rank, port, helpers = int(sys.argv[1]), sys.argv[2], sys.argv[3]
spec = importlib.util.spec_from_file_location("helpers", helpers)
tools = importlib.util.module_from_spec(spec)
sys.modules["helpers"] = tools
spec.loader.exec_module(tools)
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
config = tools.nano_config()
whole = tools.random_model(config, seed=13)
full = {r.name: r.destination for r in whole.checkpoint_tensors()}
group = ParallelGroup.of(dist.group.WORLD)
shared = Transformer(config, weights=tools.FLOAT32, dtype=torch.float32, device="cpu", group=group)
for record in shared.checkpoint_tensors():
    source, shard = full[record.name], record.shard
    record.destination.copy_(source if shard is None else source.narrow(shard.dim, shard.start, shard.length))
shared.finish_loading()
tokens = tools.random_tokens(config, 200, seed=1)
expected, ours = (tools.Driver(m).prompt(tokens, chunk=90)[1] for m in (whole, shared))
torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
dist.destroy_process_group()
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_two_ranks_agree_with_one() -> None:
    port = free_port()
    helpers = str(ROOT / "tests" / "model" / "conftest.py")
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(port), helpers],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    for process in ranks:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
