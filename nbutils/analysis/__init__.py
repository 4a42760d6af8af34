"""From tables of runs to answers: intervals, summaries, verdicts."""
