"""Rank candidate pages: locally, through a server, in windows, by consensus, for a whole run."""
