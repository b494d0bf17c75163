"""The run report: self-contained, inert, and tolerant of whatever a run folder lacks."""

import json
import os
import re
import xml.dom.minidom
from html.parser import HTMLParser

import numpy as np
import pytest

from bilevel.report import write_report
from bilevel.report.numbers import measure

EVIL = "<script>alert(1)</script>&quot;\" onload='x' $x$ $\\frac{$"


def config(**fields):
    return {
        "recipe": "maml-glyphs",
        "fields": {"seed": 1, "inner": {"num_steps": 3}, **fields},
        "version": "0.1.0",
        "jax": "0.10.2",
        "command": "bilevel train maml-glyphs --seed 1",
    }


def curve(values):
    return {"mean": list(values), "ci95": [0.004] * len(values)}


def evaluation(classification=True, name="accuracy"):
    curves = {"query_loss": curve([1.6, 0.4, 0.2, 0.1])}
    scratch = {"query_loss": curve([1.6, 1.5, 1.4, 1.3])}
    if classification:
        curves[f"query_{name}"] = curve([0.2, 0.9, 0.95, 0.982])
        scratch[f"query_{name}"] = curve([0.2, 0.3, 0.35, 0.4])
    return {
        "num_tasks": 1000,
        "num_steps": 3,
        "seconds": 12.5,
        "split": "test",
        "chance": {"accuracy": 0.2} if classification else {},
        "curves": curves,
        "scratch": scratch,
        "protocol": "5-way 1-shot, 423 unseen classes",
    }


def classification_examples():
    rng = np.random.default_rng(0)
    labels = np.tile(np.repeat(np.arange(5), 4), (2, 1))
    after = np.full((2, 20, 5), 0.02)
    after[np.arange(2)[:, None], np.arange(20), labels] = 0.92
    after[0, 0] = [0.1, 0.6, 0.1, 0.1, 0.1]
    return {
        "support_x": rng.random((2, 5, 8, 8, 1)),
        "support_y": np.tile(np.arange(5), (2, 1)),
        "query_x": rng.random((2, 20, 8, 8, 1)),
        "query_y": labels,
        "before": np.full((2, 20, 5), 0.2),
        "after": after,
    }


def regression_examples():
    grid = np.linspace(-5, 5, 30)
    truth = np.stack([np.sin(grid), np.cos(grid)])
    x = np.linspace(-4, 4, 10)[None, :, None].repeat(2, 0)
    return {
        "support_x": x,
        "support_y": np.sin(x),
        "grid": np.stack([grid, grid]),
        "truth": truth,
        "steps": np.stack([truth * scale for scale in (0.0, 0.5, 0.8, 1.0)]),
    }


def make_run(folder, classification=True, points=20):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config()))
    lines = []
    for step in range(1, points + 1):
        point = {
            "step": step,
            "time": step / 10,
            "query_loss": 1 / step,
            "support_loss": 0.5 / step,
        }
        point |= {"query_loss_ci95": 0.1 / step}
        if classification:
            point |= {"query_accuracy": 1 - 0.8 / step, "query_accuracy_ci95": 0.01}
        lines.append(json.dumps(point))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "evaluation.json").write_text(json.dumps(evaluation(classification)))
    arrays = classification_examples() if classification else regression_examples()
    np.savez(folder / "examples.npz", **arrays)
    return folder


def protocol_figures():
    diagram = {"count": [0, 3, 9], "confidence": [None, 0.5, 0.9], "accuracy": [None, 0.4, 1.0]}
    return {
        "shots": {
            size: {"query_accuracy": curve([0.2, end]), "query_loss": curve([1.6, 1 - end])}
            for size, end in (("10", 0.97), ("1", 0.8), ("5", 0.95))
        },
        "calibration": {
            "num_bins": 3, "num_examples": 12, "ece": [0.3, 0.1], "before": diagram, "after": diagram,
        },
        "unseen": "unseen classes: <b>none</b> shared",
        "batch_statistics": "inductive: no answer depends on the others",
        "gaps": {"seen minus unseen accuracy": {"mean": 0.05, "ci95": 0.01}},
        "specialization": {
            "num_steps": 1,
            "query_loss": curve([1.6, 0.4, 0.5]),
            "support_loss": curve([1.6, 0.2, 0.1]),
            "moved": {"block_0": curve([0.0, 0.1, 0.2]), EVIL: curve([0.0, 0.3, 0.4])},
            "reading": "one step brings 96 % of the gain of 5",
        },
        "notes": ["all 600 tasks are wholly right"],
    }  # fmt: skip


class Page(HTMLParser):
    """Checks that tags nest, and keeps attributes and text."""

    VOID = frozenset({"meta", "img", "br", "link", "input"})

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.open, self.words = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join("".join(self.words).split())


def assert_self_contained(text):
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\((?!#)", text)
    page = Page(text)
    assert not {"script", "link", "iframe", "object", "base", "form"} & set(page.tags)
    for tag, name, value in page.attributes:
        if name in ("src", "href", "xlink:href", "srcset", "action"):
            assert value.startswith("#" if tag == "use" else "data:image/png;base64,")
        assert not name.startswith("on")
    for tag in ("img", "svg"):
        said = [t for t, name, _ in page.attributes if t == tag and name in ("alt", "aria-label")]
        hidden = [t for t, name, _ in page.attributes if t == tag and name == "aria-hidden"]
        assert len(said) + len(hidden) == page.tags.count(tag)
    for svg in re.findall(r"<svg.*?</svg>", text, flags=re.S):
        xml.dom.minidom.parseString(svg)
    return page


def test_classification(tmp_path):
    out = write_report([make_run(tmp_path / "run")])
    assert out == tmp_path / "run" / "report.html"
    text = out.read_text(encoding="utf-8")
    page = assert_self_contained(text)
    for part in ("98.2 ± 0.4 %", "Chance", "From scratch", "1,000 (test)", "423 unseen classes",
                 "bilevel train maml-glyphs --seed 1", "inner.num_steps", "0.10.2",
                 "19 of 20 after", "15 of 20 shown"):  # fmt: skip
        assert part in page.text, part
    assert text.count('class="card wrong"') == 1
    assert 'class="notes"' not in text
    assert "prefers-color-scheme" in text
    assert not [name for name in os.listdir(tmp_path / "run") if name.endswith(".tmp")]


def test_regression(tmp_path):
    out = write_report([make_run(tmp_path / "run", classification=False)], tmp_path / "page.html")
    page = assert_self_contained(out.read_text(encoding="utf-8"))
    assert "0.100 ± 0.004" in page.text
    assert "support points" in page.text and "after 3 steps" in page.text
    assert "Chance" not in page.text


def test_comparison(tmp_path):
    first, second = make_run(tmp_path / "a" / "run"), make_run(tmp_path / "b" / "run")
    (second / "config.json").write_text(json.dumps(config(learning_rate=0.4)))
    out = write_report([first, second])
    assert out == first / "report.html"
    page = assert_self_contained(out.read_text(encoding="utf-8"))
    assert "2 runs compared" in page.text
    assert "a/run" in page.text and "b/run" in page.text  # told apart by their parents
    assert "learning_rate ≠" in page.text


def test_foreign_text_is_inert(tmp_path):
    run = make_run(tmp_path / "$x$ & <b>")
    wild = config(**{EVIL: EVIL}) | {"recipe": EVIL, "version": EVIL, "jax": EVIL, "command": EVIL}
    (run / "config.json").write_text(json.dumps(wild))
    wilder = evaluation(name=EVIL) | {"protocol": EVIL, "split": EVIL}
    (run / "evaluation.json").write_text(json.dumps(wilder))
    point = {"step": 1, f"query_{EVIL}": 1.0, "query_loss": 2.0}
    (run / "metrics.jsonl").write_text(json.dumps(point))
    page = assert_self_contained(write_report([run]).read_text(encoding="utf-8"))
    assert "b" not in [tag for tag, name, _ in page.attributes if name == "onload"]
    assert page.text.count(" ".join(EVIL.split())) >= 6  # shown as it was written
    assert_self_contained(write_report([run, run]).read_text(encoding="utf-8"))


@pytest.mark.parametrize("missing", ["config.json", "metrics.jsonl", "evaluation.json",
                                     "examples.npz"])  # fmt: skip
@pytest.mark.parametrize("damage", [None, b"", b"\xff{]", b"[1]", b'"words"'])
def test_missing_or_damaged_parts(tmp_path, missing, damage):
    run = make_run(tmp_path / "run")
    (run / missing).unlink()
    if damage is not None:
        (run / missing).write_bytes(damage)
    page = assert_self_contained(write_report([run]).read_text(encoding="utf-8"))
    assert missing in page.text
    if missing in ("evaluation.json", "examples.npz"):
        assert f"bilevel eval {run}" in page.text


def test_only_a_config(tmp_path):
    run = make_run(tmp_path / "run")
    for name in ("metrics.jsonl", "evaluation.json", "examples.npz"):
        (run / name).unlink()
    page = assert_self_contained(write_report([run]).read_text(encoding="utf-8"))
    assert "Not evaluated yet" in page.text
    other = make_run(tmp_path / "other")
    assert_self_contained(write_report([run, other]).read_text(encoding="utf-8"))


def test_a_damaged_file_of_examples_is_a_note(tmp_path):
    run = make_run(tmp_path / "run")
    path = run / "examples.npz"
    with np.load(path) as arrays:
        np.savez_compressed(path, **dict(arrays))
    bytes_ = bytearray(path.read_bytes())
    bytes_[80:120] = bytes(40)  # inside the compressed data: zlib says so, not zipfile
    path.write_bytes(bytes_)
    page = assert_self_contained(write_report([run]).read_text(encoding="utf-8"))
    assert "examples.npz is not readable" in page.text


def test_half_written_line(tmp_path):
    run = make_run(tmp_path / "run")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 21, "query_lo')
    page = assert_self_contained(write_report([run]).read_text(encoding="utf-8"))
    assert "Skipped 1 unreadable line of metrics.jsonl" in page.text
    assert "20 outer steps" in page.text


def test_values_that_are_not_finite(tmp_path):
    run = make_run(tmp_path / "run")
    values = [1.0, float("nan"), float("inf"), None, "word", 1e308, -1e308]
    points = [{"step": step, "query_loss": value} for step, value in enumerate(values)]
    (run / "metrics.jsonl").write_text("\n".join(json.dumps(point) for point in points))
    found = evaluation()
    found["curves"]["query_accuracy"] = {"mean": [float("nan")] * 4, "ci95": None}
    found["curves"]["query_loss"] = {"mean": [1.0, float("inf"), None, 2.0], "ci95": [1, 2]}
    (run / "evaluation.json").write_text(json.dumps(found | {"scratch": None, "chance": None}))
    arrays = classification_examples()
    arrays["after"][0, 1] = np.nan
    arrays["query_x"][0, 0] = np.nan
    np.savez(run / "examples.npz", **arrays)
    page = assert_self_contained(write_report([run]).read_text(encoding="utf-8"))
    assert "4 values not finite, left out" in page.text
    assert "NaN" in page.text


def test_protocol_sections(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "evaluation.json").write_text(json.dumps(evaluation() | protocol_figures()))
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 21, "query_loss": 1.0, "validation_loss": 0.7}) + "\n")
    page = assert_self_contained(write_report([run]).read_text(encoding="utf-8"))
    for text in ("expected calibration error 10.0 % after adaptation, 30.0 % before; 3 bins, 12 answers",
                 "seen minus unseen accuracy: +5.00 ± 1.00 points", "96 % of the gain", "wholly right",
                 "<b>none</b> shared", "query, validation classes", "1 block_0, 2 <script>"):  # fmt: skip
        assert text in page.text, text
    labels = " ".join(value for _, name, value in page.attributes if name == "aria-label")
    assert "80.0 ± 0.4 % with 1, 95.0 ± 0.4 % with 5, 97.0 ± 0.4 % with 10" in labels
    other = make_run(tmp_path / "other")
    (other / "evaluation.json").write_text(json.dumps(evaluation() | protocol_figures()))
    page = assert_self_contained(write_report([run, other]).read_text(encoding="utf-8"))
    assert page.text.count("96 % of the gain") == 2


def test_panels_are_shown_where_they_mean_something(tmp_path):
    run = make_run(tmp_path / "run")
    one_point = evaluation()
    one_point["curves"] = {"query_accuracy": curve([0.9]), "query_loss": curve([0.3])}
    one_point["scratch"] = {}
    (run / "evaluation.json").write_text(json.dumps(one_point))
    page = assert_self_contained(write_report([run]).read_text(encoding="utf-8"))
    assert "Adaptation" not in page.text and "90.0" in page.text  # there are no steps to draw
    (run / "evaluation.json").write_text(json.dumps(evaluation() | {"adapts": False}))
    page = assert_self_contained(write_report([run]).read_text(encoding="utf-8"))
    assert "Inner training" in page.text and "after 3 inner steps" in page.text
    assert "Adaptation" not in page.text and "query, after inner training" in page.text
    thinned = evaluation()
    for found in thinned["curves"].values():
        found["steps"] = [0, 1, 50, 300]
    (run / "evaluation.json").write_text(json.dumps(thinned))
    page = assert_self_contained(write_report([run]).read_text(encoding="utf-8"))
    assert "after 300 adaptation steps" in page.text


@pytest.mark.parametrize("junk", [3, "x", [1, 2], {"before": 1, "after": {"confidence": 2}}, None])
def test_protocol_figures_that_make_no_sense(tmp_path, junk):
    run = make_run(tmp_path / "run")
    (run / "evaluation.json").write_text(json.dumps(evaluation() | dict.fromkeys(protocol_figures(), junk)))
    assert_self_contained(write_report([run]).read_text(encoding="utf-8"))


def test_shapes_that_do_not_fit(tmp_path):
    run = make_run(tmp_path / "run")
    np.savez(run / "examples.npz", **(classification_examples() | {"after": np.zeros((2, 3, 5))}))
    page = assert_self_contained(write_report([run]).read_text(encoding="utf-8"))
    assert "examples.npz cannot be drawn" in page.text


def test_long_runs_are_thinned(tmp_path):
    run = make_run(tmp_path / "run", points=6000)
    text = write_report([run]).read_text(encoding="utf-8")
    assert "6,000 points, drawn as means of neighbours" in text
    assert len(text) < 400_000


def test_same_bytes_twice(tmp_path):
    run = make_run(tmp_path / "run")
    first = write_report([run], tmp_path / "1.html").read_bytes()
    assert first == write_report([run], tmp_path / "2.html").read_bytes()


def test_not_a_run(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(FileNotFoundError, match=r"expected a run folder.*bilevel train RECIPE"):
            write_report([folder])
    with pytest.raises(ValueError, match="at least one run folder"):
        write_report([])
    with pytest.raises(TypeError, match="sequence of run folders"):
        write_report(str(tmp_path))


def test_folder_that_cannot_be_written(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run")
    page = write_report([run])
    before = page.read_bytes()

    def refuse(self, target):
        raise PermissionError(13, "Permission denied")

    # Replaced rather than chmod, which does not stop a superuser.
    monkeypatch.setattr("pathlib.Path.replace", refuse)
    with pytest.raises(PermissionError, match="--out PATH"):
        write_report([run])
    assert page.read_bytes() == before
    assert not [name for name in os.listdir(run) if name.endswith(".tmp")]


def test_pyplot_is_left_alone(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    write_report([make_run(tmp_path / "run")])
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize(
    "arguments, text",
    [
        (("query_accuracy", 0.98213, 0.0041), "98.2 ± 0.4 %"),
        (("query_accuracy", 0.2), "20.0 %"),
        (("query_loss", 0.0213, 0.00081), "0.0213 ± 0.0008"),
        (("query_loss", 3.2, 0.16), "3.2 ± 0.2"),
        (("query_loss", 123456.0, 12.0), "123456 ± 12"),
        (("query_loss", -1.5, 0.1), "−1.5 ± 0.1"),
        (("query_loss", 0.0, 0.0), "0.000 ± 0.000"),
        (("query_loss", float("nan"), 0.1), "NaN"),
    ],
)
def test_measure(arguments, text):
    assert measure(*arguments) == text
