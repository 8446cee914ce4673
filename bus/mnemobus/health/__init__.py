"""Whether the bus would work now: the checkup, what workers tell, and what an error comes from."""
