"""What every page shares: the document, its sections, its tables."""

from collections.abc import Iterable, Sequence
from html import escape

# The browser itself then refuses anything the page might ask of a network.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def document(title: str, css: str, header: str, sections: Iterable[str]) -> str:
    """The whole page; sections that are empty are left out."""
    body = "\n".join(part for part in sections if part)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)} · bilevel report</title>\n<style>{css}</style>\n</head>\n"
        f"<body>\n{header}\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def section(title: str, body: str, lead: str) -> str:
    """A titled part of the page; nothing where there is nothing to show."""
    if not body:
        return ""
    said = f'<p class="lead">{lead}</p>' if lead else ""
    return f"<section>\n<h2>{title}</h2>{said}\n{body}\n</section>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], label: str) -> str:
    """A table in a box of its own that scrolls sideways on a phone. Cells are HTML already."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>' + "".join(f"<td>{cell}</td>" for cell in row[1:]) + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table>'
        f"<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )
