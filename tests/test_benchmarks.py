"""The comparison compares equal work, takes turns, and writes where it may."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import report
from benchmarks.__main__ import main
from benchmarks.contestants import ENTRIES, OURS, build, library_of, peers_of
from benchmarks.photos import make_photos
from benchmarks.timing import ratios, take_turns
from benchmarks.work import METHODS, QUICK, Trainer, Work

CASES = [(method, peer) for peer, methods in ENTRIES.items() for method in methods]


@pytest.mark.parametrize(("method", "peer"), CASES)
def test_peers_train_as_many_parameters_towards_a_similar_loss(method: str, peer: str) -> None:
    pytest.importorskip(library_of(peer))
    work = Work(method, "fp32", replace(QUICK, batch=16))
    ours, theirs = (build(entry, work) for entry in (OURS, peer))
    assert trained(theirs) == pytest.approx(trained(ours), rel=0.01)
    assert theirs.forward_backward().item() == pytest.approx(ours.forward_backward().item(), rel=0.3)


def trained(trainer: Trainer) -> int:
    groups = trainer.optimizer.param_groups  # type: ignore[attr-defined]
    return sum(p.numel() for group in groups for p in group["params"])


def test_quick_run_prints_a_row_for_the_peer(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lightly")
    threads = torch.get_num_threads()
    try:
        options = "--quick --method simmim --peer lightly --precision bf16 --part steps --rounds 1"
        assert main(options.split()) == 0
    finally:
        torch.set_num_threads(threads)
    assert "| simmim | bf16 | lightly | " in capsys.readouterr().out


def test_absent_library_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("benchmarks.contestants.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        main(["--quick", "--peer", "lightly"])
    assert "not installed: lightly" in capsys.readouterr().err


def test_every_method_has_a_peer() -> None:
    assert all(peers_of(method, ("lightly",)) for method in METHODS)
    assert peers_of("mae", ("transformers",)) == ["transformers"]


def test_contestants_take_turns_and_each_begins_once() -> None:
    order: list[str] = []

    def turn(name: str) -> list[float]:
        order.append(name)
        return [1.0]

    seconds = take_turns({name: lambda name=name: turn(name) for name in "ab"}, rounds=2)  # type: ignore[misc]
    assert "".join(order) == "abbaab"
    assert seconds == {"a": [[1.0]] * 2, "b": [[1.0]] * 2}, "the first round is not counted"


def test_ratio_is_taken_within_a_round() -> None:
    spread = ratios([2.0, 6.0, 3.0], [1.0, 2.0, 2.0])
    assert (spread.median, spread.low, spread.high) == (2.0, 1.5, 3.0)


def test_photos_are_as_large_as_photos_and_always_the_same() -> None:
    first = make_photos(2)
    assert first == make_photos(2) and first[0] != first[1]
    assert all(80_000 < len(data) < 110_000 for data in first)


def test_tables_replace_what_stands_between_the_markers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.write("new", page)
    assert page.read_text() == f"before\n{report.BEGIN}\nnew\n{report.END}\nafter\n"
    page.write_text("nothing")
    with pytest.raises(ValueError, match="lacks the lines"):
        report.write("new", page)


def test_the_page_has_its_markers() -> None:
    assert all(marker in report.PAGE.read_text() for marker in (report.BEGIN, report.END))
