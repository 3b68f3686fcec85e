"""The suite of prompts against servers that behave and servers that do not; table and exit codes."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest

from embedded.data.tasks import make
from embedded.evaluation.client import Client, ClientError, Reply
from embedded.selfcheck import command, features
from embedded.selfcheck.features import FeatureChecks
from embedded.selfcheck.prompts import SEED, SuitePrompt, answer_of, load_prompts, save_prompts
from embedded.selfcheck.report import Check, Outcome, header, line, run_checks
from server.cli import COMMANDS, main

TASKS = ("recall_list", "repeat", "chat", "tool_call")


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "_SECONDS_BETWEEN", 0.002)


def suite(answering: Any, *, expected: bool = False) -> list[SuitePrompt]:
    """Prompts whose right answers the server knows."""
    prompts = []
    for number, task in enumerate(TASKS):
        example = make(task, SEED, number)
        answering.teach([example])
        prompts.append(SuitePrompt(task, {**example.body(), "max_tokens": 768}))
    if not expected:
        return prompts
    client = Client(answering.url)
    return [SuitePrompt(p.name, p.body, answer_of(client.chat(p.body))) for p in prompts]


def outcomes_of(checks: FeatureChecks) -> dict[str, Outcome]:
    return {outcome.name: outcome for outcome in run_checks(checks.checks(), lambda outcome: None)}


GRAMMARS = {"a grammar: JSON by a schema", "a grammar: a call is forced"}
"""The answering server's script knows nothing of grammars; the simulated engine alone follows them."""


def test_a_server_that_behaves(answering: Any) -> None:
    prompts = suite(answering, expected=True)
    outcomes = outcomes_of(FeatureChecks(lambda: Client(answering.url), prompts, None))
    assert {name for name, outcome in outcomes.items() if not outcome.passed} <= GRAMMARS, outcomes
    assert "the answers are right" in outcomes and "a grammar that allows everything" in outcomes
    assert len(outcomes) == 11


def test_without_known_answers_only_identities_are_checked(answering: Any) -> None:
    outcomes = outcomes_of(FeatureChecks(lambda: Client(answering.url), suite(answering), None))
    assert "the answers are right" not in outcomes and len(outcomes) == 9


def test_wrong_answers_are_told(answering: Any) -> None:
    prompts = suite(answering, expected=True)
    answering.teach([make("chat", SEED, 2)], answer=make("repeat", SEED, 1).answer)
    outcomes = outcomes_of(FeatureChecks(lambda: Client(answering.url), prompts, None))
    told = outcomes["the answers are right"].difference
    assert told is not None and told.startswith("chat: expected {")
    assert outcomes["streamed"].passed and outcomes["16 at once"].passed


class Wrong(Client):
    """Answers well, but not when a feature is on."""

    def __init__(self, url: str, feature: str) -> None:
        super().__init__(url)
        self._feature = feature
        self.num_chats = 0

    def choices(self, body: Any) -> tuple[Reply, ...]:
        self.num_chats += 1
        replies = super().choices(body)
        broken = {
            "cache": self.num_chats > len(TASKS),
            "choices": "n" in body,
            "logprobs": "logprobs" in body,
        }.get(self._feature, False)
        return (*replies[:-1], changed(replies[-1])) if broken else replies

    def streamed(self, body: Any) -> Reply:
        reply = super().streamed(body)
        return changed(reply) if self._feature == "streamed" else reply


def changed(reply: Reply) -> Reply:
    from dataclasses import replace

    return replace(reply, token_ids=(*reply.token_ids[:-1], reply.token_ids[-1] + 1))


@pytest.mark.parametrize(
    ("feature", "check"),
    [
        ("cache", "again, from the prefix cache"),
        ("streamed", "streamed"),
        ("choices", "three choices"),
        ("logprobs", "log probabilities"),
    ],
)
def test_a_broken_feature_is_found_and_named(answering: Any, feature: str, check: str) -> None:
    client = Wrong(answering.url, feature)
    outcomes = outcomes_of(FeatureChecks(lambda: client, suite(answering), None))
    told = outcomes[check].difference
    assert told is not None and told.startswith("recall_list")
    if feature != "cache":
        assert {name for name, outcome in outcomes.items() if not outcome.passed} <= {check, *GRAMMARS}
    assert outcomes["answers, one request at a time"].passed


@pytest.fixture
def servers(answering: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Servers of their own are the answering one; `broken` flags make it lie while such a server is up."""

    class Servers:
        broken = ""
        started: list[tuple[str, ...]] = []

    @contextlib.contextmanager
    def launched(model_dir: Path, *flags: str) -> Iterator[Client]:
        Servers.started.append(flags)
        if Servers.broken and Servers.broken in flags:
            # Early, so that no grammar of a call has begun.
            answering.meddle = lambda ids: [ids[0] + 1, *ids[1:]]
        try:
            yield Client(answering.url)
        finally:
            answering.meddle = lambda ids: ids

    Servers.started = []
    monkeypatch.setattr(features, "launched", launched)
    monkeypatch.setattr(command, "launched", launched)
    return Servers


HIBERNATED = "hibernated and woken"
"""The simulated engine of the answering server has all the pages that there are."""


@pytest.mark.parametrize(
    ("flag", "check"),
    [
        ("128", "steps of 128 tokens"),
        ("--no-enable-prefix-cache", "without a prefix cache"),
        ("--host-cache-bytes", "without host memory (slots are replayed)"),
        ("--deterministic", "deterministic, alone and together"),
    ],
)
def test_a_server_that_answers_otherwise_is_found(answering: Any, servers: Any, flag: str, check: str) -> None:
    servers.broken = flag
    checks = FeatureChecks(lambda: Client(answering.url), suite(answering), answering.model_dir)
    outcomes = outcomes_of(checks)
    failed = {name for name, outcome in outcomes.items() if not outcome.passed}
    also = {"deterministic, alone and together"} if flag == "--no-enable-prefix-cache" else set()
    cached = {"again, from the prefix cache"}
    assert check in failed and failed <= {check, HIBERNATED, *GRAMMARS, *also, *cached}
    assert "token 0: expected" in str(outcomes[check].difference) and "margin 0.69" in str(outcomes[check].difference)
    assert outcomes[HIBERNATED].difference == "expected hibernations, found 0, and 0 wakes"


def test_a_check_that_breaks_hides_no_other() -> None:
    def broken() -> str | None:
        raise KeyError("gone")

    shown: list[Outcome] = []
    outcomes = run_checks([Check("a", broken), Check("b", lambda: None), Check("c", lambda: "x\ny")], shown.append)
    assert shown == outcomes
    assert [(o.name, o.difference) for o in outcomes] == [("a", "KeyError: 'gone'"), ("b", None), ("c", "x\ny")]
    assert line(outcomes[0]).split()[:2] == ["a", "FAIL"] and line(outcomes[1]).split()[:2] == ["b", "pass"]
    assert line(outcomes[2]).endswith("x y") and header().split()[0] == "check"


def test_no_first_answers_fail_what_compares_with_them() -> None:
    def connect() -> Client:
        raise ClientError("nobody there")

    outcomes = outcomes_of(FeatureChecks(connect, [SuitePrompt("p", {"messages": []})], None))
    assert not any(outcome.passed for outcome in outcomes.values()) and len(outcomes) == 9


def test_expected_answers_are_written_and_read(answering: Any, tmp_path: Path) -> None:
    prompts = suite(answering)
    client = Client(answering.url)
    replies = [client.chat(prompt.body) for prompt in prompts]
    path = save_prompts(tmp_path, prompts, replies)
    loaded = load_prompts(tmp_path)
    assert [(p.name, p.body) for p in loaded] == [(p.name, p.body) for p in prompts]
    assert [p.expected for p in loaded] == [answer_of(reply) for reply in replies]
    path.write_text(json.dumps({"format": 2}))
    with pytest.raises(ValueError, match="not a file of expected answers"):
        load_prompts(tmp_path)
    path.unlink()
    assert len(load_prompts(tmp_path)) == 12 and all(p.expected is None for p in load_prompts(None))


def test_the_command_on_this_machine(
    answering: Any, servers: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "load_prompts", lambda model_dir: suite(answering, expected=True))
    monkeypatch.setattr(FeatureChecks, "_hibernated", lambda self: None)
    monkeypatch.setattr(FeatureChecks, "_cached", lambda self: None)
    monkeypatch.setattr(FeatureChecks, "_schema", lambda self: None)
    monkeypatch.setattr(FeatureChecks, "_forced_call", lambda self: None)
    assert main(["selfcheck", str(answering.model_dir)]) == 0
    out = capsys.readouterr().out
    assert "its answers are known" in out and "32 of 32 checks passed" in out and "FAIL" not in out
    servers.broken = "2048"
    assert main(["selfcheck", str(answering.model_dir)]) == 1
    out = capsys.readouterr().out
    assert "31 of 32 checks passed" in out and out.count("FAIL") == 1


@pytest.mark.parametrize("broken", [False, True])
def test_expected_answers_are_kept_only_when_all_passes(
    answering: Any, servers: Any, monkeypatch: pytest.MonkeyPatch, broken: bool
) -> None:
    monkeypatch.setattr(command, "built_in_prompts", lambda max_tokens: suite(answering)[2:3])
    monkeypatch.setattr("embedded.selfcheck.op_checks.op_cases", lambda: ())
    for check in ("_hibernated", "_cached", "_schema", "_forced_call", "_at_once"):
        monkeypatch.setattr(FeatureChecks, check, lambda self, *arguments: None)
    servers.broken = "2048" if broken else ""
    path = answering.model_dir / "expected.json"
    try:
        assert main(["selfcheck", str(answering.model_dir), "--write-expected"]) == int(broken)
        assert path.exists() != broken
        if not broken:
            (prompt,) = load_prompts(answering.model_dir)
            assert prompt.expected == {"calls": [], "content": make("chat", SEED, 2).answer.content, "reasoning": ANY}
    finally:
        path.unlink(missing_ok=True)


def test_the_command_with_a_url(
    answering: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "built_in_prompts", lambda: suite(answering))
    monkeypatch.setattr(FeatureChecks, "_schema", lambda self: None)
    monkeypatch.setattr(FeatureChecks, "_forced_call", lambda self: None)
    assert main(["selfcheck", "--url", answering.url]) == 0
    out = capsys.readouterr().out
    assert "9 of 9 checks passed" in out and " op " not in out


@pytest.mark.parametrize("arguments", [["/nowhere"], ["--url", "http://x", "dir"], ["--url", "http://127.0.0.1:9"]])
def test_usage_and_unreachable_servers(arguments: list[str]) -> None:
    assert "selfcheck" in COMMANDS
    with pytest.raises(SystemExit) as exit_:
        main(["selfcheck", *arguments])
    assert exit_.value.code == 2


@pytest.mark.long
def test_the_whole_selfcheck_passes_with_random_weights(nano_dir: Path) -> None:
    assert main(["selfcheck", str(nano_dir)]) == 0
