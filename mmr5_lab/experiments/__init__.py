"""Notebooks as runs: parameters, fingerprints, chains, grids, scheduler, history."""
