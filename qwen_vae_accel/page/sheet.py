"""What is shown of one result: an answer, then paragraphs, tables, charts and pictures, whatever renders them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Table:
    """A table of texts.

    Attributes:
        title: its heading.
        columns: headings of the columns.
        rows: as many texts each as there are columns.
        words: how many columns, from the left, hold words; the others hold numbers.
        folded: whether an HTML page shows it only when asked.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1
    folded: bool = False


@dataclass(frozen=True, slots=True)
class Panel:
    """One pair of axes of a chart.

    Attributes:
        title: its heading, of at most 60 characters.
        height: in inches, title and legend included; the width is that of all panels.
        draw: draws on matplotlib axes and labels what belongs into the legend.
    """

    title: str
    height: float
    draw: Callable[[Any], None]


@dataclass(frozen=True, slots=True)
class Chart:
    """Panels under one name.

    Attributes:
        title: its heading.
        panels: at least one.
        suffix: what the name of its PNG ends with, before ``.png``.
    """

    title: str
    panels: Sequence[Panel]
    suffix: str = ""


@dataclass(frozen=True, slots=True)
class Drawing:
    """A chart that was drawn for an HTML page: one ``<svg>`` element per panel."""

    title: str
    svgs: Sequence[str]


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture as a data URI, with what is said of it; width and height in pixels."""

    name: str
    title: str
    line: str
    uri: str
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """Pictures of one size behind a slider, at least three, and the difference between two of them."""

    pictures: Sequence[Picture]
    difference: Picture


Block = str | Table | Chart | Drawing | Comparison


@dataclass(frozen=True, slots=True)
class Answer:
    """What a reader wants to know first.

    Attributes:
        figures: pairs of a number and what it measures, such as ``("10.8x", "decode")``; none where nothing was measured.
        line: what the figures compare.
    """

    figures: Sequence[tuple[str, str]]
    line: str

    def __str__(self) -> str:
        return f"{', '.join(f'{what} {value}' for value, what in self.figures)}: {self.line}." if self.figures else ""


@dataclass(frozen=True, slots=True)
class Sheet:
    """What is shown of one result.

    Attributes:
        title: its heading.
        answer: shown first.
        blocks: the rest in its order; a text is a paragraph.
        created: date and time, "" where the result does not say.
        command: the command line that made it, "" where the result does not say.
        facts: of the machine and the versions, ``package:NAME`` being the version of a package.
        source: the file it was read from, "" where there is none.
    """

    title: str
    answer: Answer
    blocks: Sequence[Block]
    created: str = ""
    command: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""
