"""etcd v3: a client, leases and watches over several endpoints, and an embedded server."""
