"""How members agree on rounds: pure functions and records, no I/O."""

PROTOCOL = 7  # version of what members exchange; members of another version are refused
