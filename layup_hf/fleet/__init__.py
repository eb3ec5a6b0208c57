"""Who is there: the store, leases, joining, process groups, the network between hosts."""
