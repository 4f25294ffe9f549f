"""Metrics, comparison, errors, robustness, the paper's tables."""
