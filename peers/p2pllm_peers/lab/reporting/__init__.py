"""From the evidence of a run to conclusions: the report, the verdict, the page, and two runs side by side."""
