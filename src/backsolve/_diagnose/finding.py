"""One line of a report: what was looked at, what was seen, how bad it is, and what to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["good", "note", "not certain", "warning", "wrong"]


@dataclass(frozen=True)
class Finding:
    """One line of a report.

    Attributes:
        topic: what was looked at.
        level: "wrong" makes `report.ok` False; "not certain" says that the measurement could not decide.
        text: what was seen, with numbers.
        advice: what to do about it, or nothing.
    """

    topic: str
    level: Level
    text: str
    advice: str = ""
