"""Who trains, and how they meet: etcd, the torchrun rendezvous, the quorum, and `launch` for one machine."""
