"""Command-line flags are the configuration dataclasses, with their docstrings as help."""

import argparse
import dataclasses
from typing import Any

import pytest

from engine.config import EngineConfig
from server.cli import main, serve_parser
from server.config import ServerConfig
from server.flags import field_docs, from_args, size


def parse(*argv: str) -> tuple[ServerConfig, EngineConfig]:
    arguments = serve_parser().parse_args(argv)
    return from_args(ServerConfig, arguments), from_args(EngineConfig, arguments, model_dir=arguments.model_dir or "")


def test_every_field_is_a_flag_with_help() -> None:
    text = serve_parser().format_help()
    for config in (ServerConfig, EngineConfig):
        for field in dataclasses.fields(config):
            if field.name != "model_dir":
                assert "--" + field.name.replace("_", "-") in text
    docs = field_docs(ServerConfig)
    assert set(docs) == {field.name for field in dataclasses.fields(ServerConfig)}
    assert sum(1 for line in text.splitlines() if line.startswith("  --")) <= 60


def test_defaults_and_values() -> None:
    assert parse() == (ServerConfig(), EngineConfig(model_dir=""))
    server, engine = parse(
        *("dir", "--host", "0.0.0.0", "--port", "9", "--served-model-name", "m", "--body-limit", "1MiB"),
        *("--drain-timeout", "2.5", "--dtype", "float32", "--kv-cache-bytes", "8GiB", "--max-model-len", "1000"),
        *("--numerics", "official", "--deterministic", "--max-num-seqs", "7", "--kv-cache-dtype", "fp8", "--simulate"),
    )
    assert (server.host, server.port, server.served_model_name, server.body_limit) == ("0.0.0.0", 9, "m", 2**20)
    assert server.drain_timeout == 2.5
    assert engine == EngineConfig(
        **{"model_dir": "dir", "dtype": "float32", "kv_cache_bytes": 8 * 2**30, "max_model_len": 1000},
        **{"numerics": "official", "deterministic": True, "max_num_seqs": 7, "kv_cache_dtype": "fp8", "simulate": True},
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1", 1), ("8GiB", 2**33), ("1.5 GiB", 3 * 2**29), ("2MB", 2_000_000), ("3kib", 3072), ("1TiB", 2**40)],
)
def test_sizes(text: str, expected: int) -> None:
    assert size(text) == expected


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1XB", "1e9", "nan"])
def test_wrong_sizes(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        size(text)


@pytest.mark.parametrize(
    "argv",
    [["--dtype", "int8"], ["--port", "x"], ["--nope"], ["a", "b"], ["--kv-cache-bytes", "lots"]],
)
def test_wrong_flags_exit_with_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["serve", *argv])
    assert caught.value.code == 2
    assert capsys.readouterr().err


def test_version_and_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    from server.config import VERSION

    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"fathom {VERSION}\n"
    for argv in ([], ["fly"]):
        with pytest.raises(SystemExit) as caught:
            main(argv)
        assert caught.value.code == 2


def test_version_is_the_distribution_s() -> None:
    import tomllib
    from pathlib import Path

    from server.config import VERSION

    project: Any = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["version"] == VERSION


def test_trouble_before_the_start_is_one_sentence(capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    assert main(["serve", str(tmp_path / "absent"), "--port", "0"]) == 2
    assert "no such model directory" in capsys.readouterr().err
    assert main(["serve", str(tmp_path), "--host", "0.0.0.0"]) == 2
    assert "--api-key-file" in capsys.readouterr().err
    assert main(["serve", str(tmp_path), "--api-key-file", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_prefix_cache_can_be_switched_off_and_sized() -> None:
    arguments = serve_parser().parse_args(["--no-enable-prefix-cache", "--host-cache-bytes", "2GiB"])
    config = from_args(EngineConfig, arguments, model_dir="m")
    assert config.enable_prefix_cache is False and config.host_cache_bytes == 2 << 30
    assert from_args(EngineConfig, serve_parser().parse_args([]), model_dir="m").enable_prefix_cache is True
