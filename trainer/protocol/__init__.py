"""How members agree on rounds: pure functions and records, no I/O."""
