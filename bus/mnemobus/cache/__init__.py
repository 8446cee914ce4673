"""The tiers of a read: L1 in this process, L2 in Redis, and the read path through them."""
