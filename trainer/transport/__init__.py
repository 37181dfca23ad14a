"""Connections between members: bulk transfer, reachability, and what the wire carried."""
