"""How members agree on rounds: pure functions and records, no I/O."""

PROTOCOL = 7  # version of the members' protocol; members with another version are refused
