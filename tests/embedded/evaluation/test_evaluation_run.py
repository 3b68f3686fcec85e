"""The evaluation against a server whose answers are known: shares, the file, resuming, identities, exit codes."""

import json
from pathlib import Path
from typing import Any

import pytest

from embedded.data.example import Answer
from embedded.evaluation import __main__ as command
from embedded.evaluation.client import Client, ClientError
from embedded.evaluation.identities import compared, first_difference
from embedded.evaluation.pressure import GROUP, small_cache_flags
from embedded.evaluation.results import Results, RowResult, fingerprint, table_line
from embedded.evaluation.rows import ROWS_BY_NAME
from embedded.evaluation.scoring import score
from engine.config import EngineConfig, MachineFacts, resolve
from model.config import load_config

NAMES = ("recall_1k", "tool_call", "tool_calls", "tool_result", "arithmetic", "json", "chat")
WRONG = Answer(content="I am wrong.")


def teach(server: Any, *names: str, count: int = 10) -> None:
    for name in names:
        server.teach(ROWS_BY_NAME[name].examples(count))


def test_right_answers_score_in_full(answering: Any, capsys: pytest.CaptureFixture[str]) -> None:
    teach(answering, *NAMES, count=4)
    rows = ",".join(NAMES)
    assert command.main(["--url", answering.url, "--rows", f"{rows},warm,batch16", "--examples", "4"]) == 0
    out = capsys.readouterr().out
    assert "19 of 19 rows are as they should be" in out
    assert [line.split()[:3] for line in out.splitlines() if line.startswith(NAMES) and "/" not in line] == [
        [name, "4", "4"] for name in NAMES
    ]
    assert "% cached" in out


def test_wrong_answers_are_counted_where_they_are(answering: Any) -> None:
    row = ROWS_BY_NAME["recall_1k"]
    examples = row.examples(10)
    answering.teach(examples)
    # An answer cannot be wrong in thinking mode without a thought.
    wrong = [examples[2], examples[7]]
    answering.teach(wrong, Answer(content=WRONG.content, reasoning="Hm." if wrong[0].thinking else None))
    result = score(Client(answering.url), row, 10)
    assert (result.num_examples, result.num_right, result.share, result.passed) == (10, 8, 0.8, False)
    assert [right for right, _ in result.deciles] == [1, 1, 0, 1, 1, 1, 1, 0, 1, 1]
    assert {count for _, count in result.deciles} == {1}
    assert len(result.differences) == 2 and "found 'I am wrong.'" in result.differences[0]
    assert "FAIL" in table_line(result) and "80.0%" in table_line(result)


def test_json_is_asked_without_a_grammar(answering: Any) -> None:
    """Prose would not survive the grammar of its response format; here it is counted as wrong."""
    row = ROWS_BY_NAME["json"]
    examples = row.examples(6)
    answering.teach(examples)
    wrong = next(e for e in examples if e.response_format is not None)
    answering.teach([wrong], Answer(content="No JSON.", reasoning="Hm." if wrong.thinking else None))
    result = score(Client(answering.url), row, 6)
    assert result.num_right == 5
    assert result.differences == ("expected 'JSON', found 'No JSON.'",)


def test_finished_rows_are_not_run_again(answering: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teach(answering, "tool_call", "chat", count=3)
    out = tmp_path / "results.json"
    arguments = ["--url", answering.url, "--examples", "3", "--out", str(out), "--resume"]
    assert command.main([*arguments, "--rows", "tool_call"]) == 0
    assert [row["name"] for row in json.loads(out.read_text())["rows"]] == ["tool_call"]
    asked = answering.num_asked
    assert command.main([*arguments, "--rows", "tool_call,chat"]) == 0
    assert answering.num_asked == asked + 3
    assert capsys.readouterr().out.count("tool_call ") == 2
    # Another number of examples is another measurement.
    teach(answering, "tool_call", count=4)
    assert (
        command.main(["--url", answering.url, "--examples", "4", "--out", str(out), "--resume", "--rows", "tool_call"])
        == 0
    )
    assert {row["name"]: row["num_examples"] for row in json.loads(out.read_text())["rows"]} == {
        "tool_call": 4,
        "chat": 3,
    }


def test_results_of_another_model_or_file_are_not_mixed(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    row = RowResult(
        name="x",
        num_examples=2,
        num_right=1,
        target=0.5,
        seconds=1.0,
        deciles=((1, 2),),
        differences=("d",),
        token_ids=((1, 2), ()),
    )
    Results("model a", path).add(row)
    assert Results.open("model a", path, resume=True).finished("x", 2) == row
    assert Results.open("model a", path, resume=True).finished("x", 3) is None
    assert not Results.open("model b", path, resume=True).rows
    assert not Results.open("model a", path, resume=False).rows
    path.write_text('{"format": 1, "model": "model a", "rows": [{}]}')
    with pytest.raises(ValueError, match="not a file of results"):
        Results.open("model a", path, resume=True)


def test_fingerprint_follows_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"abc")
    first = fingerprint(tmp_path)
    (tmp_path / "expected.json").write_text("{}")
    assert fingerprint(tmp_path) == first
    (tmp_path / "model.safetensors").write_bytes(b"abd")
    assert fingerprint(tmp_path) != first


def test_answers_that_change_are_found(answering: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """The same questions again, from a server that now says something else: not right answers, but other ones."""
    teach(answering, "chat", "tool_result", count=3)
    first = command.score

    def meddled(ids: list[int]) -> list[int]:
        return [*ids[:2], ids[2] + 1, *ids[3:]]

    def score_then_meddle(*args: Any) -> RowResult:
        result = first(*args)
        answering.meddle = meddled
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "score", score_then_meddle)
        code = command.main(["--url", answering.url, "--rows", "tool_result,alone", "--examples", "3"])
    out = capsys.readouterr().out
    assert code == 1
    # Log probabilities of the simulated engine are far apart, so this is no near tie.
    assert "tool_result/alone: question 0, token 2: expected" in out and "margin 0.69" in out


class Margins(Client):
    def __init__(self, margin: float) -> None:
        self.asked: list[list[int]] = []
        self._margin = margin

    def margin(self, prompt: Any) -> float:
        self.asked.append(list(prompt))
        return self._margin


def test_near_ties_are_told_apart() -> None:
    prompts, expected = [[1], [2], [3]], [[7, 8], [7, 8], [7, 8]]
    found = [[7, 8], [7, 9], [7, 8, 9]]
    for margin, right, ties in ((1e-4, 3, 1), (0.5, 2, 0)):
        client = Margins(margin)
        result = compared("n", client, prompts, expected, found, epsilon=1e-3)
        assert (result.num_right, result.num_near_ties, result.passed) == (right, ties, right == 3)
        assert client.asked == [[2, 7]]
    assert first_difference([1, 2], [1, 2, 3]) is None
    assert first_difference([1, 2], [1]) == 1
    assert first_difference([1, 2], [3, 2]) == 0


def test_the_small_cache_holds_what_is_shared_once(answering: Any) -> None:
    model = load_config(answering.model_dir)
    haystack = list(range(1000))
    shared = [[*haystack, n, n, n] for n in range(GROUP)]
    apart = [[n, *haystack] for n in range(GROUP)]
    pages = []
    for prompts in (shared, apart):
        flags = small_cache_flags(answering.model_dir, "float32", prompts)
        named = dict(zip(flags[::2], flags[1::2], strict=True))
        config = EngineConfig(
            model_dir="",
            kv_cache_bytes=int(named["--kv-cache-bytes"]),
            max_num_seqs=int(named["--max-num-seqs"]),
            output_quantile=float(named["--output-quantile"]),
        )
        facts = MachineFacts(device="cpu", has_bf16=False, free_bytes=8 << 30, num_cores=1)
        pages.append(resolve(config, model, facts).num_pages)
    # Three full pages and one for each prompt's end; two to spare.
    assert pages == [3 + GROUP + 2, 3 * GROUP + GROUP + 2]


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--url", "http://x", "dir"],
        ["/nowhere"],
        ["--url", "http://x", "--rows", "nothing"],
        ["--url", "http://x", "--rows", "chunk128"],
    ],
)
def test_usage(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        command.main(arguments)
    assert exit_.value.code == 2


def test_a_row_that_cannot_be_asked_hides_no_other(answering: Any, capsys: pytest.CaptureFixture[str]) -> None:
    teach(answering, "chat", "tool_result", count=2)
    score_row = command.score

    def no_room(client: Client, row: Any, count: int) -> RowResult:
        if row.name == "tool_result":
            raise ClientError("HTTP 400: too long")
        return score_row(client, row, count)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "score", no_room)
        code = command.main(["--url", answering.url, "--rows", "tool_result,chat,alone", "--examples", "2"])
    out = capsys.readouterr().out
    assert code == 1 and "HTTP 400: too long" in out and "1 of 2 rows are as they should be" in out


def test_no_server_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--url", "http://127.0.0.1:9", "--rows", "chat"]) == 1
    assert "no answer from http://127.0.0.1:9" in capsys.readouterr().err
    with pytest.raises(ClientError, match="is not an address"):
        Client("ftp://x")
