"""A document of headings, texts, lists, tables and pictures, as Markdown and as one self-contained HTML page."""

import base64
import html
import re
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from benchmark.common import markdown


class Heading(NamedTuple):
    text: str
    level: int = 2


class Text(NamedTuple):
    text: str  # `code` is the only markup


class Bullets(NamedTuple):
    items: list[str]


class Table(NamedTuple):
    header: list[str]
    rows: list[list[str]]


class Picture(NamedTuple):
    path: Path
    caption: str


Block = Heading | Text | Bullets | Table | Picture

STYLE = """body { font: 16px/1.5 sans-serif; max-width: 72em; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; font-size: 85%; }
th, td { border: 1px solid #ccc; padding: 2px 8px; text-align: left; }
th { background: #eee; } img { max-width: 100%; } figcaption { font-size: 85%; }"""


def block_as_markdown(block: Block) -> str:
    """One block, without the empty line that follows it."""
    match block:
        case Heading(text, level):
            return f"{'#' * level} {text}"
        case Text(text):
            return text
        case Bullets(items):
            return "\n".join(f"- {item}" for item in items)
        case Table(header, rows):
            return markdown(header, [[cell.replace("|", "\\|") for cell in row] for row in rows])
        case Picture(path, caption):
            return f"![{caption}]({path.name})\n\n{caption}"


def text_as_html(text: str) -> str:
    """Escaped, with `code` marked up."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))


def block_as_html(block: Block) -> str:
    """One block; a picture is embedded, so that the page needs no other file."""
    match block:
        case Heading(text, level):
            return f"<h{level}>{text_as_html(text)}</h{level}>"
        case Text(text):
            return f"<p>{text_as_html(text)}</p>"
        case Bullets(items):
            return "<ul>\n" + "\n".join(f"<li>{text_as_html(item)}</li>" for item in items) + "\n</ul>"
        case Table(header, rows):
            head = "".join(f"<th>{text_as_html(cell)}</th>" for cell in header)
            lines = ["".join(f"<td>{text_as_html(cell)}</td>" for cell in row) for row in rows]
            return "\n".join(["<table>", *(f"<tr>{line}</tr>" for line in [head, *lines]), "</table>"])
        case Picture(path, caption):
            data, caption = base64.b64encode(path.read_bytes()).decode(), text_as_html(caption)
            image = f'<img alt="{caption}" src="data:image/png;base64,{data}">'
            return f"<figure>{image}\n<figcaption>{caption}</figcaption></figure>"


def write_documents(blocks: list[Block], out: Path) -> None:
    """report.md and report.html in the folder `out`. The first block is the title."""
    (out / "report.md").write_text("\n\n".join(block_as_markdown(block) for block in blocks) + "\n", encoding="utf-8")
    head = f'<meta charset="utf-8">\n<title>{html.escape(blocks[0].text)}</title>\n<style>\n{STYLE}\n</style>'
    body = "\n".join(block_as_html(block) for block in blocks)
    page = f'<!doctype html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n'
    (out / "report.html").write_text(page, encoding="utf-8")


def write_csv(path: Path, records: list[dict]) -> None:
    """A table as CSV, nan as an empty cell."""
    table = pd.DataFrame(records)
    numbers = table.select_dtypes("float").columns
    table[numbers] += 0.0  # so that no -0 is left
    table.to_csv(path, index=False, lineterminator="\n", float_format="%.10g")
