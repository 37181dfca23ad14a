"""How members agree on rounds: pure functions and records, no I/O."""

PROTOCOL = 6  # version of the members' protocol; members with another version are refused
