"""A document of headings, sentences and tables, as Markdown and as one HTML page.

The page needs nothing beside itself: no script, no font, no host. It is light or dark as its reader's system is.
"""

import html
from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import Final

import msgspec


class Mark(StrEnum):
    NONE = ""
    GOOD = "good"
    BAD = "bad"  # bold in Markdown
    SOFT = "soft"


class Cell(msgspec.Struct, frozen=True):
    """`heat`, from 0 to 1, colours it on a page."""

    text: str
    mark: Mark = Mark.NONE
    heat: float = 0.0


class Heading(msgspec.Struct, frozen=True):
    text: str
    level: int = 2


class Text(msgspec.Struct, frozen=True):
    text: str
    mark: Mark = Mark.NONE


class Listing(msgspec.Struct, frozen=True):
    """What a program said, or what it is to be told."""

    text: str


class Table(msgspec.Struct, frozen=True):
    """Of the columns, the first `words` are text, the others numbers. On a page it may be `folded` behind its title."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    words: int = 1
    folded: str = ""


Block = Heading | Text | Listing | Table


# Markdown -----------------------------------------------------------------------------------------------


def markdown(title: str, blocks: Iterable[Block]) -> str:
    return "\n\n".join([f"# {title}", *(_block_in_markdown(block) for block in blocks)]) + "\n"


def _block_in_markdown(block: Block) -> str:
    match block:
        case Heading():
            return f"{'#' * block.level} {block.text}"
        case Text():
            return f"**{block.text}**" if block.mark is Mark.BAD else block.text
        case Listing():
            fence = "~~~~" if "~~~" in block.text else "~~~"
            return f"{fence}\n{block.text}\n{fence}"
        case Table():
            return table_in_markdown(block)


def table_in_markdown(table: Table) -> str:
    rules = ["---" if number < table.words else "---:" for number in range(len(table.headings))]
    rows = [table.headings, rules, *([_cell_in_markdown(cell) for cell in row] for row in table.rows)]
    text = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"{table.folded}:\n\n{text}" if table.folded else text


def _cell_in_markdown(cell: str | Cell) -> str:
    text = (cell if isinstance(cell, str) else cell.text).replace("|", "\\|").replace("\n", " ")
    return f"**{text}**" if isinstance(cell, Cell) and cell.mark is Mark.BAD and text else text


# HTML ---------------------------------------------------------------------------------------------------

STYLE: Final = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --line: #d5d9de; --soft: #5a636e; --good: #0b6b3a;
  --bad: #a11d1d; --heat: #0072b2; --well: #f3f5f7 }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --paper: #14171a; --line: #363c43; --soft: #a0a8b2;
  --good: #5fd08f; --bad: #ff8f8f; --heat: #56b4e9; --well: #1d2125 } }
body { background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; max-width: 66rem;
  margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.5rem } h3 { font-size: 1rem }
.scroll { overflow-x: auto; margin: 1rem 0 } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .6rem; text-align: right; white-space: nowrap }
th.word, td.word { text-align: left; white-space: normal; overflow-wrap: break-word }
.heat { background: color-mix(in srgb, var(--heat) calc(var(--share) * 45%), transparent) }
.good { color: var(--good); font-weight: 600 } .bad { color: var(--bad); font-weight: 700 } .soft { color: var(--soft) }
pre { background: var(--well); padding: .75rem 1rem; overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere }
summary { cursor: pointer }
"""


def page(title: str, blocks: Iterable[Block]) -> str:
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>{html.escape(title)}</title><style>{STYLE}</style>"
    body = "\n".join([f"<h1>{html.escape(title)}</h1>", *(_block_on_page(block) for block in blocks)])
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body><main>\n{body}\n</main></body></html>\n'


def _block_on_page(block: Block) -> str:
    match block:
        case Heading():
            return f"<h{block.level}>{html.escape(block.text)}</h{block.level}>"
        case Text():
            return f"<p{_class(block.mark)}>{html.escape(block.text)}</p>"
        case Listing():
            return f"<pre>{html.escape(block.text)}</pre>"
        case Table():
            table = _table_on_page(block)
            if not block.folded:
                return table
            return f"<details><summary>{html.escape(block.folded)}</summary>{table}</details>"


def _table_on_page(table: Table) -> str:
    def kind(number: int) -> str:
        return "word" if number < table.words else ""

    head = "".join(
        f'<th scope="col"{_class(kind(number))}>{html.escape(heading)}</th>'
        for number, heading in enumerate(table.headings)
    )
    rows = "\n".join(
        f"<tr>{''.join(_cell_on_page(cell, kind(number)) for number, cell in enumerate(row))}</tr>"
        for row in table.rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{rows}\n</tbody></table></div>'


def _cell_on_page(cell: str | Cell, kind: str) -> str:
    if isinstance(cell, str):
        return f"<td{_class(kind)}>{html.escape(cell)}</td>"
    heat = f' style="--share: {cell.heat:.2f}"' if cell.heat else ""
    return f"<td{_class(kind, cell.mark, 'heat' if cell.heat else '')}{heat}>{html.escape(cell.text)}</td>"


def _class(*names: str) -> str:
    used = " ".join(name for name in names if name)
    return f' class="{used}"' if used else ""
