"""Starting workers: the local launcher, the torchrun agent and its rendezvous backends, checks before a start."""
