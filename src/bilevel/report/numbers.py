"""How figures are written: the same everywhere on the page."""

import math


def is_percent(name: str) -> bool:
    """Whether a metric of this name is a share of 1."""
    return name.endswith("accuracy")


def figure_name(name: str) -> str:
    """A metric's name as a reader says it.

    >>> figure_name("query_accuracy"), figure_name("query_mse")
    ('Query accuracy', 'Query MSE')
    """
    words = ["MSE" if word == "mse" else word for word in name.split("_")]
    text = " ".join(words)
    return text[:1].upper() + text[1:]


def measure(name: str, mean: float, half: float = math.nan) -> str:
    """A mean and the half-width of its interval, rounded to what the interval supports.

    >>> measure("query_accuracy", 0.98213, 0.0041), measure("query_loss", 0.0213, 0.00081)
    ('98.2 ± 0.4 %', '0.0213 ± 0.0008')
    """
    if not math.isfinite(mean):
        return "NaN" if math.isnan(mean) else "∞" if mean > 0 else "−∞"
    if is_percent(name):
        digits = 2 if math.isfinite(half) and 0 < 100 * half < 0.05 else 1
        width = f" ± {100 * half:.{digits}f}" if math.isfinite(half) else ""
        return f"{100 * mean:.{digits}f}{width} %"
    if abs(mean) >= 1e6 or 0 < abs(mean) < 1e-4:
        width = f" ± {half:.1e}" if math.isfinite(half) else ""
        return f"{mean:.2e}{width}".replace("-", "−")
    scale = half if math.isfinite(half) and half > 0 else abs(mean) / 100
    digits = min(max(-math.floor(math.log10(scale)), 0), 6) if scale > 0 else 3
    width = f" ± {half:.{digits}f}" if math.isfinite(half) else ""
    return f"{mean:.{digits}f}{width}".replace("-", "−")


def count(value: float) -> str:
    """
    >>> count(60000)
    '60,000'
    """
    return f"{value:,.0f}" if math.isfinite(value) else "NaN"


def duration(seconds: float) -> str:
    """
    >>> duration(12.34), duration(754), duration(7500)
    ('12.3 s', '12 min', '2 h 05 min')
    """
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 10:
        return f"{minutes} min {rest:02d} s"
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02d} min"
