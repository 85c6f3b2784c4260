"""Arguments reach the rooms unchanged; errors of users are one message and exit code 2."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest

from hybrid_ssl.cli import main
from hybrid_ssl.storage import StorageError


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stand-ins for the reader and the loop that write down what they were called with."""
    seen: dict[str, Any] = {}
    config, train = ModuleType("hybrid_ssl.config"), ModuleType("hybrid_ssl.train")

    def read_recipe(path: str, overrides: list[str]) -> str:
        seen.update(path=path, overrides=overrides)
        if path == "bad.yaml":
            raise ValueError("optimizer.lrr: unknown key; did you mean 'lr'?")
        return "a recipe"

    def pretrain(recipe: str, **flags: bool) -> int:
        seen.update(recipe=recipe, flags=flags)
        return 3

    config.read_recipe = read_recipe  # type: ignore[attr-defined]
    train.pretrain = pretrain  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "hybrid_ssl.config", config)
    monkeypatch.setitem(sys.modules, "hybrid_ssl.train", train)
    return seen


def test_flags_and_overrides_may_be_mixed(calls: dict[str, Any]) -> None:
    assert main(["pretrain", "r.yaml", "a.b=1", "--show", "c=-2e-4", "--resume"]) == 3
    assert calls["path"] == "r.yaml" and calls["overrides"] == ["a.b=1", "c=-2e-4"]
    assert calls["flags"] == {"resume": True, "dry_run": False, "show": True}


def test_user_error_is_one_line_and_exit_code_2(calls: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "bad.yaml"]) == 2
    assert capsys.readouterr().err == "error: optimizer.lrr: unknown key; did you mean 'lr'?\n"
    assert "recipe" not in calls  # nothing was started


def test_only_the_first_process_prints(
    calls: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("hybrid_ssl.cli.time.sleep", waited.append)
    assert main(["pretrain", "bad.yaml"]) == 2
    assert capsys.readouterr().err == "" and waited  # the first has time to speak before the launcher stops all


def test_traceback_flag_raises(calls: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="unknown key"):
        main(["pretrain", "bad.yaml", "--traceback"])


@pytest.mark.parametrize("argv", [[], ["pretrain"], ["pretrain", "r.yaml", "--lr", "3"], ["train", "r.yaml"]])
def test_wrong_arguments_exit_with_2(calls: dict[str, Any], argv: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2


def test_every_target_of_an_export_can_be_asked_for() -> None:
    from hybrid_ssl.cli import build_parser
    from hybrid_ssl.hub.targets import TARGETS, TIMM

    commands = next(action for action in build_parser()._actions if isinstance(action.choices, dict))
    assert commands.choices is not None
    to = next(action for action in commands.choices["export"]._actions if action.dest == "to")
    assert list(to.choices or ()) == [TIMM, *TARGETS]


def test_a_disk_that_refuses_is_exit_code_5(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: object, **options: object) -> None:
        raise StorageError("cannot write out: No space left on device")

    monkeypatch.setattr("hybrid_ssl.hub.targets.export_to", full)
    assert main(["export", "a", "b"]) == 5
    assert capsys.readouterr().err == "error: cannot write out: No space left on device\n"
