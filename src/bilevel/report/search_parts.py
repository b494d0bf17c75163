"""What the pages about a search and about a population share: the document around them, the commands."""

from collections.abc import Iterable, Sequence
from html import escape

from bilevel.report import html
from bilevel.report.runs import Note
from bilevel.report.style import CSS

_CSS = """
.trials .scroll{max-height:36rem;overflow:auto}
.trials thead th{position:sticky;top:0;background:var(--paper)}
.trials table{font-size:.85rem}
.trials th,.trials td{padding-top:.3rem;padding-bottom:.3rem}
td:nth-child(2) .finished{color:var(--good)}
.failed{color:var(--bad)}
.pruned,.running,.waiting{color:var(--muted)}
.error{display:inline-block;min-width:16rem;max-width:30rem;white-space:normal;text-align:left}
.wide{max-width:none;margin-top:1.4rem}
.wide .plot text{font-size:11px}
.bars{display:grid;grid-template-columns:minmax(6rem,max-content) 1fr max-content;gap:.45rem 1rem;
align-items:center;margin:1.4rem 0 0;max-width:46rem;font-size:.9rem}
.bars dt{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:.9em;
overflow-wrap:anywhere}
.bars dd{margin:0;font-variant-numeric:tabular-nums}
.bar{display:block;height:.75rem;border-radius:3px;background:var(--accent);min-width:1px}
section>pre+h3{margin-top:1.6rem}
"""


def document(
    kind: str, title: str, facts: Sequence[str], notes: Sequence[Note], sections: Iterable[str]
) -> str:
    """The whole page around its sections."""
    line = "".join(f"<span>{escape(fact)}</span>" for fact in facts)
    rows = []
    for note in notes:
        fix = f" Make it with <code>{escape(note.command)}</code>." if note.command else ""
        rows.append(f"<li>{escape(note.text)}{fix}</li>")
    said = f'<ul class="notes" aria-label="Notes">{"".join(rows)}</ul>' if rows else ""
    header = (
        f'<header><p class="kicker">bilevel · {escape(kind)}</p><h1>{escape(title)}</h1>'
        f'<p class="facts">{line}</p>{said}</header>'
    )
    return html.document(title, CSS + _CSS, header, sections)


def commands(pairs: Iterable[tuple[str, str]]) -> str:
    """What to type, each under what it is for."""
    return "".join(
        f'<h3>{escape(why)}</h3><pre tabindex="0"><code>{escape(command)}</code></pre>'
        for why, command in pairs
    )
