"""Trainings on Omniglot beside the published figures: keep small files of a run, print the table of all kept.

    python bench/omniglot_table.py keep runs/protonet protonet --processor-minutes 34
    python bench/omniglot_table.py              # the Markdown table of docs/results/omniglot.md

`keep` writes docs/results/omniglot/NAME.json (command, evaluation) and NAME.csv (at most 60 rows of metrics).
"""

import argparse
import csv
import json
from pathlib import Path

KEPT = Path(__file__).parent.parent / "docs" / "results" / "omniglot"
_ROWS = 60
_SETTINGS = ("5w1s", "5w5s", "20w1s", "20w5s")
_COLUMNS = ("step", "time", "query_loss", "query_accuracy", "support_loss", "support_accuracy")
# Finn et al., 2017; Nichol et al., 2018 (transductive); Rajeswaran et al., 2019 (FOMAML too); Li et al.,
# 2017; Antoniou et al., 2019; Snell et al., 2017; Bertinetto et al., 2019; Raghu et al., 2020 (ANIL).
PUBLISHED = {
    "MAML": {"5w1s": "98.7 ± 0.4", "5w5s": "99.9 ± 0.1", "20w1s": "95.8 ± 0.3", "20w5s": "98.9 ± 0.2"},
    "FOMAML": {"5w1s": "98.3 ± 0.5", "5w5s": "99.2 ± 0.2", "20w1s": "89.4 ± 0.5", "20w5s": "97.9 ± 0.1"},
    "Reptile": {"5w1s": "97.7 ± 0.04", "5w5s": "99.5 ± 0.1", "20w1s": "89.4 ± 0.1", "20w5s": "97.1 ± 0.3"},
    "iMAML": {
        "5w1s": "99.50 ± 0.26",
        "5w5s": "99.74 ± 0.11",
        "20w1s": "96.18 ± 0.36",
        "20w5s": "99.14 ± 0.10",
    },
    "ANIL": {"20w1s": "96.2 ± 0.5", "20w5s": "98.0 ± 0.3"},
    "Meta-SGD": {
        "5w1s": "99.53 ± 0.26",
        "5w5s": "99.93 ± 0.09",
        "20w1s": "95.93 ± 0.38",
        "20w5s": "98.97 ± 0.19",
    },
    "MAML++": {"5w1s": "99.47", "5w5s": "99.93", "20w1s": "97.65 ± 0.05", "20w5s": "99.33 ± 0.03"},
    "ProtoNet": {"5w1s": "98.8", "5w5s": "99.7", "20w1s": "96.0", "20w5s": "98.9"},
    "R2-D2": {"5w1s": "98.6", "5w5s": "99.7", "20w1s": "94.7", "20w5s": "98.9"},
    "ProtoNet, drawn characters alone": {},
}
NAMES = {
    "maml": "MAML",
    "fomaml": "FOMAML",
    "reptile": "Reptile",
    "imaml": "iMAML",
    "anil": "ANIL",
    "meta-sgd": "Meta-SGD",
    "maml-plus-plus": "MAML++",
    "protonet": "ProtoNet",
    "r2d2": "R2-D2",
    "glyphs": "ProtoNet, drawn characters alone",
}


def keep(run: Path, name: str, processor_minutes: float | None) -> None:
    """Copy what a reader needs of a run into docs/."""
    evaluation = json.loads((run / "evaluation.json").read_text())
    config = json.loads((run / "config.json").read_text())
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    step = max(1, len(rows) // _ROWS)
    kept = rows[step - 1 :: step]
    KEPT.mkdir(parents=True, exist_ok=True)
    with (KEPT / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [c for c in _COLUMNS if c in rows[0]], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(kept)
    fields = config["fields"]
    task = fields.get("task", fields)
    train_ways, train_shots = task["train_ways"] or task["ways"], fields.get("train_shots", task["shots"])
    found = {
        "learner": NAMES[next(key for key in sorted(NAMES, key=len, reverse=True) if name.startswith(key))],
        "command": config["command"],
        "setting": f"{task['ways']}w{task['shots']}s",
        "trained_on": f"{train_ways}w{train_shots}s",
        "protocol": evaluation["protocol"],
        "outer_steps": evaluation["meta_step"],
        "minutes": round(float(rows[-1]["time"]) / 60, 1),
        "processor_minutes": processor_minutes,
        "num_tasks": evaluation["num_tasks"],
        "num_steps": evaluation["num_steps"],
        "accuracy": _both(evaluation["curves"]),
        "other_tests": {what: _both(curves) for what, curves in evaluation["other_tests"].items()},
        "other_shots": {shots: _both(curves) for shots, curves in evaluation["shots"].items()},
        "batch_statistics": evaluation["batch_statistics"],
    }
    (KEPT / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")


def _both(curves: dict) -> dict:
    curve = curves["query_accuracy"]
    return {"mean": [round(v, 6) for v in curve["mean"]], "ci95": [round(v, 6) for v in curve["ci95"]]}


def table() -> None:
    """Print a row for each setting of each kept run."""
    print("| learner | test | ours, % | published, % | trained on | steps | processor minutes | queries |")
    print("|---|---|---|---|---|---|---|---|")
    order = list(PUBLISHED)
    runs = [(path.stem, json.loads(path.read_text())) for path in sorted(KEPT.glob("*.json"))]
    for name, run in sorted(runs, key=lambda pair: (order.index(pair[1]["learner"]), pair[0])):
        own = run["protocol"].split(" a class")[0].rpartition(", ")[2]
        rows = [(setting, own, accuracy) for setting, accuracy in _cells(run).items()]
        rows += [
            (run["setting"], what.split()[0], accuracy)
            for what, accuracy in run["other_tests"].items()
            if "a class at once" in what
        ]
        for setting, queries, accuracy in rows:
            mean, half = (100 * accuracy[what][-1] for what in ("mean", "ci95"))
            published = PUBLISHED[run["learner"]].get(setting, "none")
            minutes = f"{run['processor_minutes']:g}" if run["processor_minutes"] else "not measured"
            print(
                f"| [{run['learner']}](omniglot/{name}.json) | {setting} | {mean:.2f} ± {half:.2f} | "
                f"{published} | {run['trained_on']} | {run['outer_steps']} | {minutes} | {queries} |"
            )


def _cells(run: dict) -> dict[str, dict]:
    """Accuracies of a run by setting: the recipe's own, its other tests, other support sizes."""
    cells = {run["setting"]: run["accuracy"]}
    ways = run["setting"].split("w")[0]
    cells |= {f"{ways}w{shots}s": accuracy for shots, accuracy in run.get("other_shots", {}).items()}
    for what, accuracy in run["other_tests"].items():
        if "-way" in what:
            ways, shots = (part.split("-")[0] for part in what.split())
            cells[f"{ways}w{shots}s"] = accuracy
    return {setting: cells[setting] for setting in _SETTINGS if setting in cells}


def main() -> None:
    """Keeps a run, or prints the table."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = options.add_subparsers(dest="command")
    one = commands.add_parser("keep", help="copy small files of an evaluated run")
    one.add_argument("run", type=Path)
    one.add_argument("name", help=f"begins with one of {', '.join(NAMES)}")
    one.add_argument("--processor-minutes", type=float)
    args = options.parse_args()
    if args.command == "keep":
        keep(args.run, args.name, args.processor_minutes)
    else:
        table()


if __name__ == "__main__":
    main()
