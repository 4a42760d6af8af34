"""What is said of one claim, and of several as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd


@dataclass(frozen=True)
class Verdict:
    """What the runs say of a claim.

    Attributes:
        number: Of the claim in the post's order, such as "3" or "7a".
        claim: In the post's words, shortened.
        shows: One effect, with its interval and the number of seeds n.
        verdict: A few words, the first of them "holds", "fails" or "open", and the bound.
        details: What else belongs to it, as sentences.
    """

    number: str
    claim: str
    shows: str
    verdict: str
    details: str


def verdict_table(verdicts: Sequence[Verdict]) -> pd.DataFrame:
    """One row per claim: `claim`, `these runs show`, `verdict`; indexed by its number."""
    return pd.DataFrame(
        [(each.claim, each.shows, each.verdict) for each in verdicts],
        index=[each.number for each in verdicts],
        columns=["claim", "these runs show", "verdict"],
    )


def verdict_details(verdicts: Sequence[Verdict]) -> str:
    """The details of each claim as a Markdown list."""
    return "\n".join(f"- **Claim {each.number}.** {each.details}" for each in verdicts)
