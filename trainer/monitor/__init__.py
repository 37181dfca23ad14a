"""Monitoring a run: everything that reads its workers' events."""
