"""Judging a module: the ladder of baselines, metrics, figures, the verdict, pictures, the report."""
