"""What the pages about a search and about a population share: the document, its sections, its tables."""

from collections.abc import Iterable, Sequence
from html import escape

from bilevel.report.runs import Note
from bilevel.report.style import CSS

# The browser itself then refuses anything the page might ask of a network.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
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
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)} · bilevel report</title>\n<style>{CSS}{_CSS}</style>\n</head>\n<body>\n"
        f'<header><p class="kicker">bilevel · {escape(kind)}</p><h1>{escape(title)}</h1>'
        f'<p class="facts">{line}</p>{said}</header>\n<main>\n'
        + "\n".join(part for part in sections if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def section(title: str, body: str, lead: str) -> str:
    """A titled part of the page; nothing where there is nothing to show."""
    if not body:
        return ""
    said = f'<p class="lead">{lead}</p>' if lead else ""
    return f"<section>\n<h2>{title}</h2>{said}\n{body}\n</section>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], label: str) -> str:
    """A table in a box that scrolls by itself. Cells are HTML already."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>' + "".join(f"<td>{cell}</td>" for cell in row[1:]) + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table>'
        f"<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def commands(pairs: Iterable[tuple[str, str]]) -> str:
    """What to type, each under what it is for."""
    return "".join(
        f'<h3>{escape(why)}</h3><pre tabindex="0"><code>{escape(command)}</code></pre>'
        for why, command in pairs
    )
