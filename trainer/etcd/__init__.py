"""etcd v3: one client, leases and watches over several endpoints, and an embedded server."""
