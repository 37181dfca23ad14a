"""Watching a run: its events, and everything that reads them."""
