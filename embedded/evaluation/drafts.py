"""How often the MTP block's first draft is what the model says next: `python -m embedded.evaluation.drafts MODEL_DIR`.

Offline: the model answers greedily, then its MTP block drafts, behind every answered token, the token after it. A
speculating engine accepts exactly those drafts that the model would have said itself.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from embedded.data.render import prompt_of
from embedded.data.tasks import TASKS, make
from embedded.evaluation.local_model import LocalModel, Request
from embedded.evaluation.rows import SEED

TARGET = 0.75
MOST_TOKENS = 256
"""Of one answer."""
_EXAMPLES = 20


@dataclass(frozen=True, slots=True)
class Acceptance:
    """Of the answers of one task."""

    num_drafts: int
    num_accepted: int

    @property
    def share(self) -> float:
        return self.num_accepted / self.num_drafts if self.num_drafts else 0.0


def greedy_drafts(model: LocalModel, prompt: Sequence[int], most_tokens: int = MOST_TOKENS) -> list[tuple[int, int]]:
    """(draft, what the model said) behind each token of the greedy answer to `prompt` that was followed by another."""
    transformer = model.transformer
    assert transformer.mtp is not None, "the model was loaded without its MTP block"
    request = Request(transformer, len(prompt) + most_tokens)
    tokens, streams = list(prompt), []
    new = tokens
    while len(tokens) < len(prompt) + most_tokens:
        streams_TMD = request.streams(new)
        streams.append(streams_TMD)
        hidden = transformer.norm(transformer.hyper_head(streams_TMD[-1:]))
        new = [int(transformer.logits(hidden).argmax())]
        tokens += new
        if new[0] == transformer.config.eos_token_id:
            break
    # Every row but the last token's, which was not computed; of the last draft nothing can be said.
    drafted = request.draft_logits(tokens, torch.cat(streams)).argmax(-1).tolist()
    return list(zip(drafted[len(prompt) - 1 : -1], tokens[len(prompt) + 1 :], strict=True))


def task_acceptance(model: LocalModel, task: str, num_examples: int, most_tokens: int = MOST_TOKENS) -> Acceptance:
    """All answers of a task together."""
    found: list[tuple[int, int]] = []
    for index in range(num_examples):
        prompt = prompt_of(model.tokenizer, make(task, SEED, index)).token_ids.tolist()
        found += greedy_drafts(model, prompt, most_tokens)
    return Acceptance(len(found), sum(draft == said for draft, said in found))


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; exit code 0 when the mean over the tasks reaches TARGET."""
    parser = argparse.ArgumentParser(prog="python -m embedded.evaluation.drafts", description="Acceptance of drafts.")
    parser.add_argument("model_dir", type=Path, metavar="MODEL_DIR")
    parser.add_argument("--tasks", metavar="NAMES", help="separated by commas; all when absent")
    parser.add_argument("--examples", type=int, default=_EXAMPLES, metavar="N", help="of each task (%(default)s)")
    parser.add_argument("--max-tokens", type=int, default=MOST_TOKENS, metavar="N", help="of an answer (%(default)s)")
    arguments = parser.parse_args(argv)
    tasks = list(TASKS) if arguments.tasks is None else arguments.tasks.split(",")
    unknown = [task for task in tasks if task not in TASKS]
    if unknown or arguments.examples < 1 or arguments.max_tokens < 2:
        parser.error(f"no task {', '.join(unknown)}" if unknown else "--examples from 1, --max-tokens from 2")
    try:
        if not LocalModel.has_mtp(arguments.model_dir):
            parser.error(f"{arguments.model_dir} has no MTP block")
        model = LocalModel.load(arguments.model_dir, with_mtp=True)
    except ValueError as error:
        parser.error(str(error))
    print(f"{'task':24} {'drafts':>8} {'accepted':>9} {'share':>7}")
    shares = []
    for task in tasks:
        found = task_acceptance(model, task, arguments.examples, arguments.max_tokens)
        shares.append(found.share)
        print(f"{task:24} {found.num_drafts:8} {found.num_accepted:9} {found.share:7.1%}", flush=True)
    mean = sum(shares) / len(shares)
    verdict = "pass" if mean >= TARGET else "FAIL"
    print(f"{'mean of the tasks':24} {'':8} {'':9} {mean:7.1%}  target {TARGET:.0%}: {verdict}")
    return 0 if mean >= TARGET else 1


if __name__ == "__main__":
    sys.exit(main())
