"""An evaluation in words, as the command line prints it."""

from typing import Any


def summary(result: dict[str, Any]) -> str:
    """The headline table: chance, from scratch, meta-learned, each with its 95% half-width."""
    curves, scratch = result["curves"], result["scratch"] or {}
    name = "query_accuracy" if "query_accuracy" in curves else "query_loss"
    percent = name.endswith("accuracy")
    scale, unit = (100.0, " %") if percent else (1.0, "")
    steps, adapts = points(curves[name]), result.get("adapts", True)
    # One test set and no randomness give the same figure each time: an interval of 0 would be no interval.
    spreads = adapts or any(curves[name]["ci95"])

    def cell(curve: dict[str, list[float]], place: int) -> str:
        mean, half = scale * curve["mean"][place], scale * curve["ci95"][place]
        text, interval = (f"{mean:6.2f}", f"{half:.2f}") if percent else (f"{mean:7.4f}", f"{half:.4f}")
        return (f"{text} ± {interval}" if spreads else text) + unit

    rows = []
    chance = result["chance"].get(name.removeprefix("query_"))
    if chance is not None:
        rows.append(("chance", f"{scale * chance:6.2f}{unit}"))
    if name in scratch:
        budget = points(scratch[name])[-1]
        rows.append((f"from scratch, {budget} steps on the support set", cell(scratch[name], -1)))
    for place, step in enumerate(steps):
        if step in (0, 1, 5, steps[-1]):
            after = f"{step} {'adaptation' if adapts else 'inner'} step{'s' * (step != 1)}"
            learned = "as trained" if not adapts and steps == [0] else f"meta-learned, {after}"
            rows.append((learned, cell(curves[name], place)))
    for condition, other in result["other_tests"].items():
        rows.append((f"the same, {condition}", cell(other[name], -1)))
    for shots, other in result["shots"].items():
        rows.append((f"the same, {shots} shot{'s' * (shots != '1')}", cell(other[name], -1)))
    if result["seen"] is not None:
        rows.append(("the same, classes seen in training", cell(result["seen"][name], -1)))
    width = max(len(label) for label, _ in rows)
    label = name.replace("_", " ").replace("query", "test")
    over = f", mean ± 95% over {result['num_tasks']} tasks" if spreads else ""
    head = f"{label}{over}\n{result['protocol']}\n"
    table = "\n".join(f"  {text:<{width}}  {value}" for text, value in rows)
    return "\n".join([head + table, *(f"  {line}" for line in _remarks(result))])


def points(curve: dict[str, list]) -> list[int]:
    """After which inner steps the points of a curve are; older files hold one for each.

    >>> points({"mean": [0.2, 0.9]}), points({"mean": [0.2, 0.9], "steps": [0, 50]})
    ([0, 1], [0, 50])
    """
    return curve.get("steps") or list(range(len(curve["mean"])))


def _remarks(result: dict[str, Any]) -> list[str]:
    """What the table does not say: the protocol as measured, calibration, meta-overfitting."""
    lines = [result["unseen"], result["batch_statistics"]]
    if result["checkpoint"] != "newest":
        lines.append(f"checkpoint of outer step {result['meta_step']}: {result['checkpoint']}")
    if (found := result["calibration"]) is not None:
        errors = [f"{100 * error:.1f} %" for error in found["ece"]]
        what = "adaptation" if result.get("adapts", True) else "inner training"
        both = f"{errors[0]} before and {errors[-1]} after {what}" if len(errors) > 1 else errors[0]
        lines.append(f"calibration error {both} ({found['num_bins']} bins)")
    for gap, value in result["gaps"].items():
        scale, unit = (100, " points") if gap.endswith("accuracy") else (1, "")
        lines.append(f"{gap}: {scale * value['mean']:+.2f} ± {scale * value['ci95']:.2f}{unit}")
    lines += [f"{name}: {value:.4g}" for name, value in result["learned"]["figures"].items()]
    if (found := result["specialization"]) is not None:
        lines.append(found["reading"])
    return lines + result["notes"]
