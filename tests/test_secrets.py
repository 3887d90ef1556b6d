"""Secrets stay out of files and messages, and ``--no-code`` refuses code from outside."""

import json
import logging
from pathlib import Path

import pytest

from flowgrpo import config as configuration
from flowgrpo.cli import main
from flowgrpo.cli.main import NO_CODE
from flowgrpo.config import ConfigError
from flowgrpo.core.imports import import_path, refuse_code
from flowgrpo.core.secrets import (
    REDACTED,
    clean_logs,
    is_secret,
    redact,
    redact_command,
    redact_table,
    redacted_in,
)
from flowgrpo.memory.meta_pipeline import EstimateError, _class
from flowgrpo.training import run_folder
from flowgrpo.training.console import Console
from flowgrpo.training.inputs import check_names

SECRET = "s3cr3tvalue"


@pytest.mark.parametrize(
    "text",
    [
        f"no answer from http://me:{SECRET}@10.0.0.5:8500/score",
        f"GET https://host/v1?model=x&api_key={SECRET}&y=1",
        f"flowgrpo serve-reward x --token={SECRET} --port 1",
        f"--set rewards.0.options.api_key={SECRET}",
        f"options = {{ password = '{SECRET}', size = 3 }}",
        f'{{"hf_token": "{SECRET}"}}',
        f"got {{'openai_api_key': '{SECRET}'}}",
        f"Authorization: Bearer {SECRET}",
        "token hf_abcdefghijklmnop" + SECRET,
        "sk-abcdefghijklmnopqrst" + SECRET,
        "sk-proj-abcdefghijklmnopqrst" + SECRET,
        "sk-ant-api03-abcdefghijklmnopqrst" + SECRET,
        "ghp_abcdefghijklmnopqrst" + SECRET,
    ],
)
def test_secrets_in_texts_are_redacted(text: str) -> None:
    assert SECRET not in redact(text)
    assert REDACTED in redact(text)
    assert redact(redact(text)) == redact(text)


@pytest.mark.parametrize(
    "text",
    [
        "max_tokens=1024, pad_token_id=3",
        "rewards[0].options.token_env = 'FLOWGRPO_TOKEN'",
        "wrong or missing token (Authorization: Bearer ...)",
        "host '0.0.0.0' is open to other machines: give a token (--token or FLOWGRPO_TOKEN)",
        "http://127.0.0.1:8500 does not answer",
        "runs/sk-sdxl-pickscore-lora-2 from hf_internal_testing/tiny",
        "me@example.org at 12:30, ratio 3:4@2",
    ],
)
def test_other_texts_stay_as_they_are(text: str) -> None:
    assert redact(text) == text


def test_names_of_secrets() -> None:
    secret = (
        "token",
        "api_key",
        "apikey",
        "hf_token",
        "PASSWORD",
        "aws.access-key",
        "authorization",
    )
    other = (
        "max_tokens",
        "token_env",
        "api_key_env",
        "pad_token",
        "key",
        "tokenizer",
        "num_token_ids",
    )
    assert [n for n in (*secret, *other) if is_secret(n)] == list(secret)


def test_tables_and_commands_are_redacted() -> None:
    table = {
        "options": {"api_key": SECRET, "url": [f"http://u:{SECRET}@h"], "empty": {"token": ""}},
        "size": 3,
    }
    assert redact_table(table) == {
        "options": {"api_key": REDACTED, "url": [f"http://{REDACTED}@h"], "empty": {"token": ""}},
        "size": 3,
    }
    command = [
        "flowgrpo",
        "serve-reward",
        "--token",
        SECRET,
        f"--token={SECRET}",
        "--token-file",
        "f",
    ]
    assert redact_command(command) == (
        f"flowgrpo serve-reward --token '{REDACTED}' '--token={REDACTED}' --token-file f"
    )


def test_the_key_of_a_value_that_was_redacted_is_found() -> None:
    table = {"a": [1, {"b": "x"}], "url": [{"c": "y"}, {"d": f"http://{REDACTED}@h"}], "token": REDACTED}  # fmt: skip
    assert redacted_in(table) == "url.1.d"
    assert redacted_in({"a": (REDACTED,)}) == "a.0"
    assert redacted_in({"a": 1, "b": ["x"]}) == ""
    assert redact_table({"a": ("x", 1), "tokens": [1, "x"], "token": ["x"]}) == {"a": ("x", 1), "tokens": [1, "x"], "token": [REDACTED]}  # fmt: skip


def test_a_run_writes_no_secret_and_resumes_with_it_given_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    settings = [
        f"run.folder={folder}",
        f"rewards.0.options.api_key={SECRET}",
        f"rewards.0.options.url=http://me:{SECRET}@host:8500",
    ]
    config = configuration.load("quickstart_flow_grpo", settings)
    for _ in range(2):  # the second is a resumed session of the same configuration
        environment = {"command": redact_command(["flowgrpo", "train", *settings])}
        lock, changed = run_folder.claim(config, 1, environment)
        lock.release()
        assert changed == ""
    files = [p for p in folder.rglob("*") if p.is_file()]
    assert {"config.toml", "environment.json", "sessions.jsonl"} <= {p.name for p in files}
    assert not [p for p in files if SECRET.encode() in p.read_bytes()]
    assert REDACTED in json.loads((folder / "environment.json").read_text())["command"]
    saved = configuration.load(str(folder / "config.toml"))
    with pytest.raises(
        ConfigError, match=r"rewards\.0\.options\.api_key is \(redacted\): .* --set"
    ):
        check_names(saved, 1)
    check_names(configuration.load(str(folder / "config.toml"), settings), 1)

    Console().say(f"http://me:{SECRET}@host does not answer")
    factory = logging.getLogRecordFactory()
    try:
        clean_logs()
        logging.getLogger("flowgrpo.test").warning("%s is wrong", f"api_key={SECRET}")
        logging.getLogger("flowgrpo.test").warning("the server said: \x1b[2J")
    finally:
        logging.setLogRecordFactory(factory)
    assert main(["train", f"no-such-{SECRET}-file?token={SECRET}x"]) == 1
    output = capsys.readouterr()
    assert f"token={REDACTED}" in output.err
    assert f"{SECRET}@" not in output.out
    assert SECRET not in caplog.text
    assert "\\x1b[2J" in caplog.text
    assert "\x1b" not in caplog.text


def test_no_code_refuses_import_paths_of_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(NO_CODE, "")  # restored afterwards
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Score: ...\n")
    for setting in (
        "rewards.0.model=mine:Score",
        'evaluation.metrics=["mine:Score"]',
        "algorithm.kind=mine:Score",
        "loss.kind=mine:Score",
    ):
        assert (
            main(["train", "quickstart_flow_grpo", "--dry-run", "--no-code", "--set", setting]) == 1
        )
        assert "--no-code" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
    assert import_path("flowgrpo.shapes.rewards:Strict")
    refuse_code(False)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert import_path("mine:Score")


def test_the_estimate_imports_no_module_that_a_model_names(tmp_path: Path) -> None:
    with pytest.raises(EstimateError, match="names Net of 'mine', which is not imported"):
        _class("mine", "Net")
    assert _class("diffusers", "UNet2DModel").__name__ == "UNet2DModel"
