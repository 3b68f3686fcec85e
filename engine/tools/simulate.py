"""`fathom simulate`: the production scheduler on a virtual clock, against a trace, beside two baselines.

Nothing computes and nothing is allocated: a card's arithmetic says how long a step takes (engine.simulation.hardware).
"""

import argparse
import inspect
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine.config import EngineConfigError, ResolvedConfig
from engine.scheduler import Scheduler
from engine.simulation.baselines import BASELINES, BaselineScheduler
from engine.simulation.clock import Planner, Run, SimulationError, add_message, keyed_message, simulate
from engine.simulation.generators import GENERATORS
from engine.simulation.hardware import GPUS, Machine, gpu, simulated_config
from engine.simulation.plot import PlotError, write_png
from engine.simulation.report import Goals, Report, summarize, table
from engine.simulation.traces import TraceError, read_trace
from engine.simulation.workload import Trace
from model.config import ModelConfig
from model.presets import PRESET_NAMES, preset

POLICIES = ("fathom", *BASELINES)
ITL_MARGIN = 0.9
"""The policy aims below the goal that it is judged by."""
_EOS = 1
_GIB = 2**30
USAGE_ERROR = 2


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        model, card = preset(arguments.preset), gpu(arguments.gpu, efficiency=arguments.efficiency)
        config = simulated_config(
            model,
            kv_bytes=int(arguments.kv_gib * _GIB),
            host_bytes=int(arguments.host_gib * _GIB),
            max_num_seqs=arguments.max_num_seqs,
        )
        step_seconds = arguments.step_seconds or config.scheduling.step_seconds
        goal = max(step_seconds, ITL_MARGIN * arguments.slo_itl)
        scheduling = replace(
            config.scheduling, step_seconds=step_seconds, interactive_itl_seconds=goal, long_itl_seconds=goal
        )
        config = replace(config, scheduling=scheduling)
        trace = _trace(arguments)
        runs: dict[str, Run] = {}
        reports: list[Report] = []
        for policy in arguments.policy or POLICIES:
            machine = Machine(model, config.layout(model), card)
            runs[policy] = simulate(
                trace,
                _planner(policy, config, model),
                machine,
                until=arguments.until,
                to_message=keyed_message if arguments.keys else add_message,
            )
            goals = Goals(ttft_seconds=arguments.slo_ttft, ttft_work=arguments.slo_work, itl_seconds=arguments.slo_itl)
            reports.append(summarize(runs[policy], machine, policy=policy, goals=goals))
        print(table(reports))
        if arguments.json is not None:
            written = {"settings": _settings(arguments), "reports": [r.to_dict() for r in reports]}
            arguments.json.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
        if arguments.plot is not None:
            write_png(arguments.plot, runs)
    except (TraceError, EngineConfigError, SimulationError, PlotError, ValueError, OSError) as error:
        print(f"fathom simulate: {error}", file=sys.stderr)
        return USAGE_ERROR
    return 0


def _planner(policy: str, config: ResolvedConfig, model: ModelConfig) -> Planner:
    match policy:
        case "fcfs" | "prefill-first":
            return BaselineScheduler(config, policy)
        case _:
            return Scheduler(config, config.layout(model), eos_token_id=_EOS)


def _trace(arguments: argparse.Namespace) -> Trace:
    """The file, or a generated trace with the generator's own arguments given as `--set name=value`."""
    if arguments.trace is not None:
        if arguments.set:
            raise ValueError("--set belongs to --generate, not to --trace")
        return read_trace(arguments.trace, max_requests=arguments.max_requests)
    generate: Callable[..., Trace] = GENERATORS[arguments.generate]
    parameters = inspect.signature(generate).parameters
    given: dict[str, Any] = {"seed": arguments.seed}
    if "seconds" in parameters:
        given["seconds"] = arguments.seconds
    for text in arguments.set:
        name, _, value = text.partition("=")
        if name not in parameters:
            raise ValueError(f"--set {name}: {arguments.generate} has {', '.join(parameters)}")
        kind = parameters[name].annotation
        try:
            given[name] = int(value) if kind in (int, "int") else float(value)
        except ValueError:
            raise ValueError(f"--set {name}: expected a number, found {value!r}") from None
    missing = [n for n, p in parameters.items() if p.default is inspect.Parameter.empty and n not in given]
    if missing:
        raise ValueError(f"{arguments.generate} needs --set {missing[0]}=NUMBER")
    return generate(**given)


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    hidden = ("json", "plot")
    return {k: str(v) if isinstance(v, Path) else v for k, v in vars(arguments).items() if k not in hidden}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fathom simulate", description=(__doc__ or "").split("\n")[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--trace", type=Path, metavar="FILE", help="Mooncake or AIPerf/agent trace, JSONL or JSON")
    source.add_argument("--generate", choices=GENERATORS, help="a generated load instead of a file")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="argument of the generator")
    parser.add_argument("--seconds", type=float, default=3600.0, help="length of a generated load (default: 3600)")
    parser.add_argument("--max-requests", type=int, help="read no more of the trace")
    parser.add_argument("--preset", default="flash", help=f"model: {', '.join(PRESET_NAMES)} (default: flash)")
    parser.add_argument("--gpu", choices=GPUS, default="h200", help="card (default: h200)")
    parser.add_argument("--efficiency", type=float, help="share of the card's arithmetic that is reached")
    parser.add_argument("--kv-gib", type=float, default=80.0, help="GiB for pages and slots (default: 80)")
    parser.add_argument("--host-gib", type=float, default=64.0, help="GiB of host memory for the cache (default: 64)")
    parser.add_argument("--max-num-seqs", type=int, default=256, help="slots (default: 256)")
    parser.add_argument("--step-seconds", type=float, help="longest step that the policy aims at")
    parser.add_argument("--policy", action="append", choices=POLICIES, help="repeatable (default: all)")
    parser.add_argument("--keys", action="store_true", help="be fair between the trace's keys (default: one party)")
    parser.add_argument("--until", type=float, metavar="SECONDS", help="stop the virtual clock there")
    parser.add_argument("--seed", type=int, default=0, help="of a generated load (default: 0)")
    parser.add_argument("--slo-ttft", type=float, default=1.0, help="goal: seconds to the first token (default: 1)")
    parser.add_argument("--slo-work", type=float, default=3.0, help="and this many times its own work (default: 3)")
    parser.add_argument("--slo-itl", type=float, default=0.1, help="goal: p95 of the token gaps (default: 0.1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the curves (needs the `plot` extra)")
    return parser
