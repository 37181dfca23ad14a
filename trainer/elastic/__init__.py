"""Performs what the protocol decides: members, attempts, catching up, the coordinator."""
