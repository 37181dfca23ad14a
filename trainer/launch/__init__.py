"""Starting workers: the local launcher, the torchrun agent, its rendezvous backends, and checks before a start."""
