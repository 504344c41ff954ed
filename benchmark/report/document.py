"""A document of headings, texts, lists, tables and pictures, as Markdown and as one self-contained HTML page.

Its tables come as LaTeX too, a file each.
"""

import base64
import html
import re
import unicodedata
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from benchmark.common import markdown
from benchmark.report.pictures import called


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
    name: str = ""  # of its file for LaTeX, without .tex
    printed: tuple[int, ...] = ()  # the columns that print has; none named: all


class Picture(NamedTuple):
    path: Path
    caption: str


Block = Heading | Text | Bullets | Table | Picture

STYLE = """body { font: 16px/1.5 sans-serif; max-width: 72em; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; font-size: 85%; }
th, td { border: 1px solid #ccc; padding: 2px 8px; text-align: left; }
td, li { overflow-wrap: anywhere; }
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


LATEX = {
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "−": "$-$",
}
NOT_IN_EVERY_FONT = "ªºµÐðÞþ"
LATEX_ROWS = 40  # of a tabular, which cannot break over pages
GREEK = "αβγδεζηθικλμνξπρστυφχψωΓΔΘΛΞΠΣΥΦΨΩ"


def sign_as_latex(sign: str) -> str:
    """One character so that LaTeX sets it with its first fonts: Latin letters, Greek ones, others by their number."""
    if sign in GREEK:
        _, size, _, name = unicodedata.name(sign).split()  # GREEK SMALL LETTER ALPHA
        name = name.replace("LAMDA", "LAMBDA")
        return f"$\\{name.lower() if size == 'SMALL' else name.title()}$"
    is_latin = ord(sign) < 0x100 and sign.isalpha() and sign not in NOT_IN_EVERY_FONT
    return LATEX.get(sign, sign if is_latin or " " <= sign <= "~" else f"[U+{ord(sign):04X}]")


def text_as_latex(text: str) -> str:
    """Escaped; the minus of a number is set as one. A row that begins with [ or * would be an option of the last."""
    text = re.sub(r"(?<![\w.+-])-(?=\d)", "−", text)
    escaped = re.sub("(?<=-)(?=-)", "{}", "".join(map(sign_as_latex, text)))  # no dash
    return "{}" * escaped.startswith(("[", "*")) + escaped


def table_as_latex(table: Table) -> str:
    """A tabular with booktabs' rules; numbers are set to the right, and long texts into lines.

    It shrinks to the line's width if it is wider, and goes on in a second tabular if it is longer than a page. A first
    column of tasks names each once, and sets them apart.
    """
    kept = table.printed or range(len(table.header))
    header, *rows = ([row[i] for i in kept] for row in [table.header, *table.rows])
    columns = list(zip(*rows, strict=True)) or [()] * len(header)
    numbers = [all(re.match(r"[-+]?[\d.,]+( |$)|$", cell) for cell in column) and any(column) for column in columns]
    kinds = [
        "r" if n else "p{4cm}" if len(max(c, key=len, default="")) > 40 else "l"
        for n, c in zip(numbers, columns, strict=True)
    ]
    head, *lines = [" & ".join(text_as_latex(called(cell)) for cell in row) + r" \\" for row in [header, *rows]]
    if header[0] == "task":
        for i in range(len(rows) - 1, 0, -1):
            again = rows[i][0] == rows[i - 1][0] and i % LATEX_ROWS
            lines[i] = lines[i][lines[i].index(" & ") :] if again else r"\addlinespace " + lines[i]
    begin = [r"\noindent\begin{adjustbox}{max width=\linewidth}", rf"\begin{{tabular}}{{{''.join(kinds)}}}"]
    end = [r"\end{tabular}", r"\end{adjustbox}%"]  # no space after it, which would be too much
    pages = [lines[i : i + LATEX_ROWS] for i in range(0, len(lines), LATEX_ROWS)] or [[]]
    text = [[*begin, r"\toprule", head, r"\midrule", *page, r"\bottomrule", *end] for page in pages]
    return (
        "\n\n".join("\n".join(each) for each in [[r"% needs \usepackage{booktabs,adjustbox}", *text[0]], *text[1:]])
        + "\n"
    )


def write_documents(blocks: list[Block], out: Path) -> None:
    """report.md and report.html in the folder `out`, and each table as NAME.tex. The first block is the title."""
    for table in (block for block in blocks if isinstance(block, Table) and block.name):
        (out / f"{table.name}.tex").write_text(table_as_latex(table), encoding="utf-8")
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
