"""A report as a self-contained HTML page and as Markdown."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jinja2

from lvnas_loadtest.table import Rows


@dataclass(kw_only=True, slots=True)
class Page:
    """What a report says, in its order."""

    title: str
    lead: str
    """The workload in one sentence."""
    problems: Sequence[str] = ()
    tables: Sequence[Rows] = ()
    notes: Sequence[str] = ()
    plots: Sequence[tuple[str, str]] = field(default_factory=list)
    """(caption, SVG)"""
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def html(self) -> str:
        """The page; it needs no other file and no network."""
        environment = jinja2.Environment(
            loader=jinja2.PackageLoader("lvnas_loadtest", "."),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
        )
        provenance = json.dumps(self.provenance, indent=1)
        return environment.get_template("report.html.jinja").render(page=self, provenance=provenance)

    def markdown(self) -> str:
        """The same without plots."""
        lines = [f"# {self.title}", "", f"{self.lead}.", ""]
        lines += [f"**Problem:** {problem}\n" for problem in self.problems]
        for table in self.tables:
            if table.rows:
                lines += [_line(table.headings), _line(["---"] + ["---:"] * (len(table.headings) - 1))]
                lines += [*map(_line, table.rows), ""]
        return "\n".join(lines) + "\n" + "\n\n".join(self.notes) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
