"""Hand-written floors: the shortest programs that do only the bare operation, on the same client libraries or less.

They keep no promises: no version is compared, nothing is repeated, no cache is protected. The difference to mnemobus
is the cost of its promises. They read and write the same data as mnemobus: the entries of its log, the rows of its
table.

| | |
|---|---|
| `reads.py` | a coroutine over a dict; HGET; a query of the store between two round trips to Redis |
| `writes.py` | XADD, one at a time over a raw socket or through redis-py, and in pipelines |
| `hop.py` | PUBLISH, and a process that hears it |
| `drain.py` | a process that moves the log into the store |
| `chain.py` | XADD, a worker process that commits and publishes, a process that hears of it |
| `start.py` | from nothing to the first answer |
"""
