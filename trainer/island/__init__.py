"""Islands: a worker that consists of the processes of a node (docs/design/islands.md)."""
