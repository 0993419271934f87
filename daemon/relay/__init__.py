"""Many nodes: what members, which have the database, and gateways, which have none, tell each other."""
