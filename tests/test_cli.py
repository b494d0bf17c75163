"""The command line as a user meets it: a whole run, and every mistake answered in one clear line."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import bilevel as bl
from bilevel.cli import main
from bilevel.recipes import RECIPES, find_recipe
from bilevel.recipes.config import from_fields, to_fields

RECIPE = f"{Path(__file__).parent / 'small_recipe.py'}:Small"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of the small recipe."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    assert main(["train", RECIPE, "--folder", str(folder), "--num-meta-steps", "12", "--seed", "3"]) == 0
    return folder


def fails(capsys, *words, status=2):
    """Run a command that must fail, and return the one line it says."""
    assert main([str(word) for word in words]) == status
    err = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(err) == 1 and err[0].startswith("bilevel: "), err
    return err[0]


def test_a_whole_run_leaves_everything_in_its_folder(run, capsys):
    assert main(["eval", str(run), "--num-tasks", "10", "--num-steps", "3"]) == 0
    assert "meta-learned, 3 adaptation steps" in capsys.readouterr().out
    assert main(["report", str(run)]) == 0
    for name in ("config.json", "metrics.jsonl", "metrics.csv", "evaluation.json", "examples.npz",
                 "report.html", "tensorboard", "checkpoints"):  # fmt: skip
        assert (run / name).exists(), name
    config = json.loads((run / "config.json").read_text())
    assert config["fields"]["num_meta_steps"] == 12 and config["fields"]["seed"] == 3
    assert config["command"].startswith("bilevel train ")
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert evaluation["num_steps"] == 3 and len(evaluation["curves"]["query_loss"]["mean"]) == 4
    page = (run / "report.html").read_text()
    assert "cannot be drawn" not in page and "is missing" not in page
    assert np.load(run / "examples.npz")["steps"].shape == (4, 4, 10)


def test_a_second_run_on_top_is_refused_and_resuming_it_is_not(run, capsys):
    line = fails(capsys, "train", RECIPE, "--folder", run)
    assert "--resume" in line and "--folder" in line
    assert main(["train", RECIPE, "--folder", str(run), "--resume"]) == 0  # keeps steps and seed
    assert "12 outer steps" in capsys.readouterr().out


def test_resuming_with_another_flag_or_recipe_is_refused(run, capsys):
    assert "width is 8 there and 9 here" in fails(
        capsys, "train", RECIPE, "--folder", run, "--resume", "--width", 9
    )
    assert "holds a run of" in fails(
        capsys, "train", RECIPE.replace(":Small", ":Diverging"), "--folder", run, "--resume"
    )


def test_loop_options_may_change_on_resume(run):
    assert main(["train", RECIPE, "--folder", str(run), "--resume", "--loop.chunk-size", "2"]) == 0


def test_mistakes_before_a_run(capsys, tmp_path):
    assert "no command" in fails(capsys, "trane")
    assert "maml-glyphs" in fails(capsys, "train", "maml-glyph")
    assert "no file" in fails(capsys, "train", tmp_path / "gone.py:Recipe")
    assert "no recipe" in fails(capsys, "train", RECIPE.replace(":Small", ":not_a_recipe"))
    assert "has no Missing" in fails(capsys, "train", RECIPE.replace(":Small", ":Missing"))
    line = fails(capsys, "train", "maml-glyphs", "--foo", 3, "--folder", tmp_path / "x")
    assert "--foo" in line and "--help" in line
    assert "--seed" in fails(capsys, "train", "maml-glyphs", "--seed", "abc")
    assert "chunk_size" in fails(capsys, "train", "maml-glyphs", "--loop.chunk-size", 0)
    assert not (tmp_path / "x").exists()


def test_mistakes_about_runs(capsys, tmp_path):
    for words in (["eval", tmp_path], ["train", RECIPE, "--folder", tmp_path, "--resume"]):
        assert "no run folder" in fails(capsys, *words)
    assert "run folder" in fails(capsys, "report", tmp_path / "gone")
    (tmp_path / "config.json").write_text('{"recipe": "maml-')
    assert "damaged" in fails(capsys, "eval", tmp_path)
    (tmp_path / "config.json").write_text(
        json.dumps({"recipe": "maml-sinusoid", "fields": to_fields(RECIPES["maml-sinusoid"]())})
    )
    assert "no checkpoint yet" in fails(capsys, "eval", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"recipe": "maml-sinusoid", "fields": {"sed": 1}}))
    assert "no field 'sed'" in fails(capsys, "eval", tmp_path)


def test_a_folder_that_cannot_be_written(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert "file" in fails(capsys, "train", RECIPE, "--folder", tmp_path / "file" / "run")
    assert "in use" in fails(capsys, "train", RECIPE, "--folder", tmp_path / "file")


def test_missing_and_damaged_data(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("BILEVEL_DATA", str(tmp_path / "empty"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    words = ["train", "maml-omniglot", "--folder", tmp_path / "run"]
    assert "--download" in fails(capsys, *words)
    assert not (tmp_path / "run").exists()  # nothing to clean up before the next try
    (tmp_path / "omniglot.npz").write_bytes(b"PK\x03\x04 this is not an archive")
    line = fails(
        capsys, "train", "maml-omniglot", "--folder", tmp_path / "b", "--task.data", tmp_path / "omniglot.npz"
    )
    assert "omniglot.npz" in line


def test_impossible_tasks(capsys, tmp_path, data_folder, monkeypatch):
    monkeypatch.setenv("BILEVEL_DATA", str(data_folder))
    line = fails(capsys, "train", "maml-omniglot", "--folder", tmp_path / "a", "--task.ways", 5000)
    assert "5000" in line
    assert "20" in fails(capsys, "train", "maml-omniglot", "--folder", tmp_path / "b", "--task.shots", 20)


def test_a_checkpoint_cut_in_half_falls_back_to_the_one_before(run, tmp_path, capsys):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    newest = max((copy / "checkpoints").glob("[0-9]*"))
    for file in newest.rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.warns(UserWarning, match=newest.name):
        assert main(["train", RECIPE, "--folder", str(copy), "--resume"]) == 0
    assert "12 outer steps" in capsys.readouterr().out


def test_check_and_advise_answer_in_words(capsys, tmp_path, monkeypatch):
    few = {"Mixed": bl.hypergrad.Mixed(), "FirstOrder": bl.hypergrad.FirstOrder()}
    monkeypatch.setattr(
        sys.modules["bilevel.analysis.advise"], "candidates", lambda *args: few
    )  # all of them take a minute
    assert main(["check", RECIPE, "--num-tasks", "1"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "Trust it." and "finite differences" in out
    page = tmp_path / "advice.html"
    assert main(["advise", RECIPE, "--memory", "4GiB", "--out", str(page)]) == 0
    out, said = capsys.readouterr()
    assert "Take " in out and "FirstOrder" in out and str(page) in out
    assert "1  Mixed: " in said and "2  FirstOrder: " in said  # while they wait
    assert "<svg" in page.read_text()
    assert 'like "8GiB"' in fails(capsys, "advise", RECIPE, "--memory", "much")
    assert "no recipe" in fails(capsys, "check", "maml-glyph")


def test_help_and_version_need_no_run(capsys):
    for words in (["--help"], ["--version"], ["recipes"], []):
        assert main(words) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in RECIPES)
    with pytest.raises(SystemExit) as stop:
        main(["train", "maml-sinusoid", "--help"])
    assert stop.value.code == 0 and "--maml.rate" in capsys.readouterr().out


def test_the_traceback_is_there_for_those_who_ask(capsys):
    assert main(["--traceback", "train", "nothing"]) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("name", RECIPES)
def test_every_field_of_every_recipe_is_a_flag_and_survives_json(name, capsys):
    cls = find_recipe(name)
    assert from_fields(cls, to_fields(cls())) == cls()
    with pytest.raises(SystemExit):
        main(["train", name, "--help"])
    out = capsys.readouterr().out
    for field in vars(cls()):
        assert f"--{field.replace('_', '-')}" in out
    assert "(required)" not in out


def test_the_module_runs_as_a_program():
    out = subprocess.run(
        [sys.executable, "-m", "bilevel", "recipes"], capture_output=True, text=True, check=True
    ).stdout
    assert "maml-omniglot" in out


def test_a_recipe_that_has_got_a_field_since_goes_on(tmp_path, capsys):
    """Its default is what the older version did."""
    file, run = tmp_path / "mine.py", tmp_path / "run"
    text = (Path(__file__).parent / "small_recipe.py").read_text()
    file.write_text(text)
    name = f"{file}:Small"
    assert main(["train", name, "--folder", str(run), "--num-meta-steps", "8"]) == 0
    file.write_text(text.replace("    width: int = 8\n", "    width: int = 8\n    depth: int = 1\n", 1))
    find_recipe.cache_clear()
    assert main(["eval", str(run), "--num-tasks", "20"]) == 0
    assert main(["train", name, "--folder", str(run), "--resume"]) == 0
    assert "depth is 1 there and 2 here" in fails(
        capsys, "train", name, "--folder", run, "--resume", "--depth", 2
    )


def test_searches_and_populations_are_told_apart(tmp_path, capsys):
    (tmp_path / "search.json").write_text("{}")
    assert main(["search", "maml-sinusoid", "--method", "grid"]) == 2
    assert "--method is pbt, a population, or left out for a search; got grid" in capsys.readouterr().err
    assert main(["search", "maml-sinusoid", "--method", "pbt"]) == 2
    assert "--space." in capsys.readouterr().err  # nothing is searched: how it is said
    assert main(["report", str(tmp_path), str(tmp_path)]) == 2
    assert "is a search: a page is about one search, or about runs" in capsys.readouterr().err
