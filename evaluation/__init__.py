"""What judges it: the ladder of baselines, figures, verdict, pictures, the report."""
