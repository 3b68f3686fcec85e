"""Ablations and drafts on a random model: wrappers change what they should, and nothing else."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from embedded.data.example import Example
from embedded.data.recall import haystack_questions
from embedded.data.render import prompt_of, training_row
from embedded.data.tasks import make
from embedded.evaluation import ablations, drafts
from embedded.evaluation.ablations import ABLATIONS, Ablation, answered, is_visible
from embedded.evaluation.drafts import Acceptance, greedy_drafts, task_acceptance
from embedded.evaluation.local_model import LocalModel, Request, unchanged
from model.ops.registry import OpTable

# More than a window, an HCA group and the entries that the index selects.
LENGTH = 420


def passing(ops: OpTable) -> OpTable:
    """Every operation through a function of its own that changes nothing."""

    def passed(op: Any) -> Any:
        return None if op is None else lambda *args, **named: op(*args, **named)

    return replace(ops, **{field.name: passed(getattr(ops, field.name)) for field in fields(ops)})


def tokens(count: int, vocab: int = 256) -> list[int]:
    return torch.randint(3, vocab, (count,), generator=torch.Generator().manual_seed(4)).tolist()


def last_logits(model: LocalModel, prompt: list[int], rows: int = 40) -> torch.Tensor:
    return Request(model.transformer, len(prompt)).logits(prompt, rows)


@pytest.fixture(scope="module")
def whole(nano_dir: Path) -> LocalModel:
    return LocalModel.load(nano_dir, with_mtp=True)


def test_no_change_is_no_change(whole: LocalModel, nano_dir: Path) -> None:
    prompt = tokens(LENGTH)
    wrapped = LocalModel.load(nano_dir, change_ops=passing)
    assert torch.equal(last_logits(wrapped, prompt), last_logits(whole, prompt))


@pytest.mark.parametrize("name", list(ABLATIONS))
def test_every_ablation_changes_the_logits(whole: LocalModel, nano_dir: Path, name: str) -> None:
    ablated = LocalModel.load(nano_dir, change_ops=ABLATIONS[name].change)
    prompt = tokens(LENGTH)
    expected = last_logits(whole, prompt)
    difference = (last_logits(ablated, prompt) - expected).abs().max() / expected.abs().max()
    # Another order of sums makes 1e-5.
    assert difference > 1e-3


@pytest.mark.parametrize(
    ("name", "length"), [("random_index", 100), ("without_hca", 127), ("without_csa", 3), ("own_token", 1)]
)
def test_an_ablation_changes_nothing_where_its_part_does_nothing(
    whole: LocalModel, nano_dir: Path, name: str, length: int
) -> None:
    """While all entries are selected, before the first entry, and for the first token."""
    ablated = LocalModel.load(nano_dir, change_ops=ABLATIONS[name].change)
    prompt = tokens(length)
    expected = last_logits(whole, prompt, rows=1)
    tolerance = 1e-5 * float(expected.abs().max())
    torch.testing.assert_close(last_logits(ablated, prompt, rows=1), expected, rtol=0, atol=tolerance)


def test_random_selection_is_a_selection(whole: LocalModel) -> None:
    """Visible entries, ascending, each once, as many as there may be."""
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    ops = ablations.random_index(whole.transformer.build.ops)

    def spied(q: Any, weights: Any, keys: Any, step: Any, entries: Any, topk: int, **named: Any) -> Any:
        chosen = ops.index(q, weights, keys, step, entries, topk, **named)
        found.append((chosen, entries.visible_T))
        return chosen

    build = whole.transformer.build
    for module in whole.transformer.modules():
        if getattr(module, "build", None) is build:
            module.build = replace(build, ops=replace(build.ops, index=spied))  # type: ignore[assignment]
    try:
        last_logits(whole, tokens(LENGTH))
    finally:
        for module in whole.transformer.modules():
            if hasattr(module, "build"):
                module.build = build  # type: ignore[assignment]
    assert found
    topk = whole.transformer.config.index_topk
    for chosen, visible in found:
        for row, count in zip(chosen.tolist(), visible.tolist(), strict=True):
            kept = [entry for entry in row if entry >= 0]
            assert kept == sorted(set(kept)) and len(kept) == min(count, topk)
            assert not kept or kept[-1] < count


def test_questions_on_one_text_are_answered_as_alone(whole: LocalModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shared beginning is computed once; the verdicts are those of each question by itself."""
    examples = haystack_questions(1 << 31, 0, num_tokens=96, num_questions=3)
    row = training_row(whole.tokenizer, examples[1])
    ids = row.ids.tolist()
    greedy = []
    request = Request(whole.transformer, len(ids) + 8)
    new = ids[: row.prompt_tokens]
    for _ in range(8):
        new = [int(request.logits(new, 1).argmax())]
        greedy += new

    def answered_by_the_model(tokenizer: Any, example: Example) -> Any:
        made = training_row(tokenizer, example)
        if example is not examples[1]:
            return made
        ids = torch.tensor([*made.ids.tolist()[: made.prompt_tokens], *greedy], dtype=torch.int32).numpy()
        return replace(made, ids=ids)

    monkeypatch.setattr(ablations, "training_row", answered_by_the_model)
    assert answered(whole, examples) == [False, True, False]
    assert answered(whole, examples[1:2]) == [True]
    greedy[5] += 1
    assert answered(whole, examples) == [False, False, False]


def test_what_is_visible() -> None:
    ablation = Ablation(unchanged, 0.9)
    assert is_visible(1.0, 0.9, ablation) and not is_visible(1.0, 0.95, ablation)
    assert not is_visible(0.3, 0.0, ablation), "a model that answers nothing has nothing to lose"


def test_the_table_of_ablations(nano_dir: Path) -> None:
    lines: list[str] = []
    assert ablations.main([str(nano_dir), "--texts", "1", "--num-tokens", "256"], show=lines.append) == 1
    assert [line.split()[0] for line in lines[1:-1]] == ["whole", *ABLATIONS]
    assert "The whole model answers less than 50%" in lines[-1]


def test_drafts_are_those_of_one_pass_over_everything(whole: LocalModel) -> None:
    """Prompt and answer once more from the start, in one piece."""
    prompt = prompt_of(whole.tokenizer, make("chat", 1 << 31, 0)).token_ids.tolist()
    pairs = greedy_drafts(whole, prompt, most_tokens=6)
    request = Request(whole.transformer, len(prompt) + 6)
    sequence = list(prompt)
    for _ in range(6):
        sequence.append(int(Request(whole.transformer, len(sequence)).logits(sequence, 1).argmax()))
    streams = request.streams(sequence[:-1])
    drafted = request.draft_logits(sequence, streams).argmax(-1).tolist()
    assert [said for _, said in pairs] == sequence[len(prompt) + 1 :]
    assert [draft for draft, _ in pairs] == drafted[len(prompt) - 1 : -1]


def test_an_oracle_of_drafts_is_accepted(whole: LocalModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def oracle(self: Request, sequence: list[int], streams: torch.Tensor) -> torch.Tensor:
        said = torch.tensor([*sequence[2:], 0])
        return torch.nn.functional.one_hot(said, 2048).float()

    monkeypatch.setattr(Request, "draft_logits", oracle)
    assert task_acceptance(whole, "chat", 2, most_tokens=5) == Acceptance(8, 8)


def test_the_table_of_drafts(nano_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert drafts.main([str(nano_dir), "--tasks", "chat", "--examples", "1", "--max-tokens", "4"]) == 1
    assert "mean of the tasks" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        drafts.main([str(nano_dir), "--tasks", "nothing"])
