"""What each part of the attention is worth: `python -m embedded.evaluation.ablations MODEL_DIR`.

The same weights with one operation replaced, in this process; production code has no switch for any of it:

    random_index   CSA layers attend to random entries instead of those that the indexer picks
    without_hca    HCA layers attend to their window only         without_csa   the same for CSA layers
    own_token      no layer sees a token of the window but the query's own; entries stay

Measured on recall from long texts, teacher forced: a greedy answer is the expected one exactly if every expected token
is the likeliest behind those before it. Ten questions share a text, which is computed once.

What counts as visible: with 40 questions and a model that answers nearly all of them, a share moves by some 4 points by
chance (standard deviation sqrt(.95 * .05 / 40)), and by nothing between two runs. A loss of a tenth of the right
answers is beyond that. Random selection must lose half: it keeps the needle's entries in a few steps only.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from embedded.data.example import Example
from embedded.data.recall import haystack_questions
from embedded.data.render import training_row
from embedded.evaluation.local_model import ChangesOps, LocalModel, Request, unchanged
from embedded.evaluation.rows import QUESTIONS_PER_TEXT, SEED
from model.config import CSA_RATIO, HCA_RATIO
from model.kv_cache import RowStore
from model.ops.reference import attention as reference_attention
from model.ops.registry import AttentionOp, OpTable
from model.step import EntryPlan, Step

_NUM_TEXTS = 4
_TEXT_TOKENS = 8192
_LEAST_SHARE = 0.5
"""Of the whole model: one that answers less has nothing to lose."""
_RANDOM_SEED = 3


def random_index(ops: OpTable) -> OpTable:
    generator = torch.Generator().manual_seed(_RANDOM_SEED)

    def index(
        q_TIJ: Tensor,
        weights_TI: Tensor,
        keys: RowStore,
        step: Step,
        entries: EntryPlan,
        topk: int,
        *,
        low_precision: bool,
    ) -> Tensor:
        visible = entries.visible_T.cpu()
        chosen = torch.full((visible.shape[0], min(topk, entries.most_visible)), -1, dtype=torch.int64)
        for token, count in enumerate(visible.tolist()):
            picked = torch.randperm(count, generator=generator)[:topk].sort().values
            chosen[token, : picked.shape[0]] = picked
        return chosen.to(q_TIJ.device)

    return replace(ops, index=index)


def without_hca(ops: OpTable) -> OpTable:
    return replace(ops, attention=_without_entries(ops.attention, HCA_RATIO))


def without_csa(ops: OpTable) -> OpTable:
    return replace(ops, attention=_without_entries(ops.attention, CSA_RATIO))


def own_token(ops: OpTable) -> OpTable:
    # The reference reads the rows that the plan lists; faster operations compute them from the window's size.
    def attention(
        q_THC: Tensor,
        window_NC: Tensor,
        step: Step,
        sink_H: Tensor,
        scale: float,
        store: RowStore | None = None,
        entries: EntryPlan | None = None,
        selected_TS: Tensor | None = None,
    ) -> Tensor:
        index_TW = torch.full_like(step.window.index_TW, -1)
        index_TW[:, -1] = step.window.index_TW[:, -1]
        narrow = copy(step)
        narrow.__dict__["window"] = replace(step.window, index_TW=index_TW)
        return reference_attention.attention(q_THC, window_NC, narrow, sink_H, scale, store, entries, selected_TS)

    return replace(ops, attention=attention)


def _without_entries(attend: AttentionOp, ratio: int) -> AttentionOp:
    def attention(
        q_THC: Tensor,
        window_NC: Tensor,
        step: Step,
        sink_H: Tensor,
        scale: float,
        store: RowStore | None = None,
        entries: EntryPlan | None = None,
        selected_TS: Tensor | None = None,
    ) -> Tensor:
        if entries is not None and entries.ratio == ratio:
            return attend(q_THC, window_NC, step, sink_H, scale)
        return attend(q_THC, window_NC, step, sink_H, scale, store, entries, selected_TS)

    return attention


@dataclass(frozen=True, slots=True)
class Ablation:
    change: ChangesOps
    most_kept: float
    """Most of the whole model's share that may be left."""


ABLATIONS: Mapping[str, Ablation] = {
    "random_index": Ablation(random_index, 0.5),
    "without_hca": Ablation(without_hca, 0.9),
    "without_csa": Ablation(without_csa, 0.9),
    "own_token": Ablation(own_token, 0.9),
}


def is_visible(whole: float, ablated: float, ablation: Ablation) -> bool:
    """Whether the loss shows what the part is for."""
    return whole >= _LEAST_SHARE and ablated <= ablation.most_kept * whole


def recall_share(model: LocalModel, texts: Sequence[Sequence[Example]]) -> float:
    """Share of the questions whose expected answer is the greedy one; questions of a text begin alike."""
    right = [answer for questions in texts for answer in answered(model, questions)]
    return sum(right) / len(right)


def answered(model: LocalModel, questions: Sequence[Example]) -> list[bool]:
    """Whether each is answered as expected; what their prompts share is computed once."""
    rows = [training_row(model.tokenizer, question) for question in questions]
    ids = [row.ids.tolist() for row in rows]
    shared = _shared_tokens([row_ids[: row.prompt_tokens] for row_ids, row in zip(ids, rows, strict=True)])
    request = Request(model.transformer, max(map(len, ids)))
    if shared:
        request.logits(ids[0][:shared], 1)
    saved = request.save()
    found = []
    for row_ids, row in zip(ids, rows, strict=True):
        request.restore(saved)
        expected = row_ids[row.prompt_tokens :]
        # Logits behind the prompt and behind each answered token but the last.
        logits_LV = request.logits(row_ids[shared:-1], len(expected))
        found.append(logits_LV.argmax(-1).tolist() == expected)
    return found


def _shared_tokens(prompts: Sequence[Sequence[int]]) -> int:
    """Length of the beginning that all prompts have in common; each keeps a token of its own."""
    shared = min(map(len, prompts)) - 1
    for prompt in prompts[1:]:
        at = next((n for n in range(shared) if prompt[n] != prompts[0][n]), shared)
        shared = min(shared, at)
    return shared


def main(argv: Sequence[str] | None = None, *, show: Callable[[str], None] = print) -> int:
    """Print the table; exit code 0 when every loss is visible."""
    parser = argparse.ArgumentParser(prog="python -m embedded.evaluation.ablations", description="Parts left out.")
    parser.add_argument("model_dir", type=Path, metavar="MODEL_DIR")
    parser.add_argument("--texts", type=int, default=_NUM_TEXTS, metavar="N", help="of ten questions (%(default)s)")
    parser.add_argument("--num-tokens", type=int, default=_TEXT_TOKENS, metavar="N", help="of a text (%(default)s)")
    arguments = parser.parse_args(argv)
    if arguments.texts < 1:
        parser.error("--texts must be at least 1")
    texts = [
        haystack_questions(SEED, index, num_tokens=arguments.num_tokens, num_questions=QUESTIONS_PER_TEXT)
        for index in range(arguments.texts)
    ]
    try:
        whole = recall_share(LocalModel.load(arguments.model_dir, change_ops=unchanged), texts)
        show(f"{'model':16} {'recall':>7}  at most")
        show(f"{'whole':16} {whole:7.1%}")
        failed = 0
        for name, ablation in ABLATIONS.items():
            share = recall_share(LocalModel.load(arguments.model_dir, change_ops=ablation.change), texts)
            visible = is_visible(whole, share, ablation)
            failed += not visible
            show(f"{name:16} {share:7.1%}  {ablation.most_kept * whole:7.1%}  {'pass' if visible else 'FAIL'}")
    except ValueError as error:
        parser.error(str(error))
    if whole < _LEAST_SHARE:
        show(f"The whole model answers less than {_LEAST_SHARE:.0%}: what a part is worth cannot be seen.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
