"""Connections between members: bulk transfer, reachability probes, and the bytes on the wire."""
