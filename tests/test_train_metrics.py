"""The metrics files and the progress display of a run."""

import csv
import json
import os
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from bilevel.train import display
from bilevel.train.display import progress
from bilevel.train.metrics import MetricsWriter, read_metrics

# Metrics


def read_table(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def write_rows(writer: MetricsWriter, steps):
    for step in steps:
        more = {"grad_norm": step / 7} if step >= 20 else {}
        writer.write(step, step / 3, {"query_loss": 1 / step, **more})


def test_both_files_have_the_same_rows(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        write_rows(writer, (10, 20, 30))
        assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3, "a row is readable at once"
        assert len(read_table(tmp_path)) == 3
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert rows[0] == {"step": 10, "time": 3.333, "query_loss": 0.1}
    table = read_table(tmp_path)
    assert list(table[0]) == ["step", "time", "query_loss", "grad_norm"]
    for line, row in zip(table, rows, strict=True):
        assert {name: float(text) for name, text in line.items() if text} == row


def test_not_finite_is_null_and_empty(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, 0.0, {"a": float("nan"), "b": jnp.float32(jnp.inf), "c": np.float32(0.5)})
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail)["a"] is None
    assert read_table(tmp_path) == [{"step": "1", "time": "0.0", "a": "", "b": "", "c": "0.5"}]


def test_killed_and_resumed_has_the_rows_of_one_never_killed(tmp_path):
    with MetricsWriter(tmp_path / "whole") as writer:
        write_rows(writer, (10, 20, 30, 40))
    with MetricsWriter(tmp_path / "killed") as writer:
        write_rows(writer, (10, 20, 30))
    for name in ("metrics.jsonl", "metrics.csv"):
        with (tmp_path / "killed" / name).open("a") as file:
            file.write('{"step": 4' if name.endswith("jsonl") else "40,1")
    with MetricsWriter(tmp_path / "killed", resume_step=10) as writer:
        assert [row["step"] for row in read_metrics(tmp_path / "killed/metrics.jsonl")] == [10]
        write_rows(writer, (20, 30, 40))
    for name in ("metrics.jsonl", "metrics.csv"):
        assert (tmp_path / "killed" / name).read_text() == (tmp_path / "whole" / name).read_text()
    assert not list(tmp_path.rglob("*.unfinished"))


def test_a_new_run_starts_the_files_anew(tmp_path):
    for _ in range(2):
        with MetricsWriter(tmp_path) as writer:
            write_rows(writer, (10, 20))
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == len(read_table(tmp_path)) == 2


def test_a_half_written_last_line_is_no_row_and_another_is_an_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1}]
    path.write_text('{"step": 1}\n{"step": 2, "lo\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl:2 must be a JSON object"):
        read_metrics(path)


def test_tensorboard_files_are_written_where_it_is_installed(tmp_path, monkeypatch):
    with MetricsWriter(tmp_path / "with") as writer:
        write_rows(writer, (10,))
    assert b"query_loss" in next((tmp_path / "with/tensorboard").iterdir()).read_bytes()
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.warns(UserWarning, match=r"pip install 'bilevel\[train\]'") as caught:
        writer = MetricsWriter(tmp_path / "without")
    with writer:
        write_rows(writer, (10, 20))
    assert len(caught) == 1
    assert sorted(os.listdir(tmp_path / "without")) == ["metrics.csv", "metrics.jsonl"]


def test_reserved_names_are_refused(tmp_path):
    with MetricsWriter(tmp_path) as writer, pytest.raises(ValueError, match="rename it"):
        writer.write(1, 0.0, {"step": 2.0})


# Display

VALUES = {"query_loss": 0.5, "query_accuracy": 0.75, "support_loss": 2e-5, "grad_norm": 3.0}


def test_elsewhere_than_on_a_terminal_plain_lines_now_and_then(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
    with progress("maml", total=4000, start=1000) as shown:
        for step in range(1100, 4001, 100):
            now[0] += 1
            shown.update(step, VALUES)
    out = capsys.readouterr().out
    figures = "query loss 0.5000 accuracy 75.0%  support loss 2.000e-05"
    assert out.splitlines() == [
        f"maml 1100/4000  {figures}",
        f"maml 2100/4000  100 steps/s  0:19 left  {figures}",
        f"maml 3100/4000  100 steps/s  0:09 left  {figures}",
        f"maml 4000/4000  100 steps/s  0:00 left  {figures}",
    ]


def test_the_bar_fits_eighty_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with progress("a-recipe-with-quite-a-long-name", total=60000, enabled=True) as shown:
        shown.update(100, VALUES)
        shown.update(200, VALUES)
    out = capsys.readouterr().out
    assert "\x1b[" in out and "200/60000" in out and "query loss 0.5000 accuracy 75.0%" in out


@pytest.mark.parametrize("terminal", ["plain", "without rich", "disabled"])
def test_no_escape_codes_without_a_bar(capsys, monkeypatch, terminal):
    if terminal == "without rich":
        monkeypatch.setattr(display.importlib.util, "find_spec", lambda name: None)
    enabled = {"plain": None, "without rich": True, "disabled": False}[terminal]
    with progress("maml", total=200, enabled=enabled) as shown:
        shown.update(100, VALUES)
        shown.update(200, {})
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert len(out.splitlines()) == (0 if terminal == "disabled" else 2)
