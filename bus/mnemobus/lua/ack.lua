-- Confirm that a batch is applied and fanned out.
--
-- KEYS[1]  log: the stream of events
-- KEYS[2]  meter: a hash, added, applied and batches
-- ARGV[1]  the consumer group
-- ARGV[2..] IDs of the batch's entries
-- Returns  how many were pending until now; another worker may have confirmed the others

local removed = 0
for i = 2, #ARGV do
  removed = removed + redis.call('XACK', KEYS[1], ARGV[1], ARGV[i])
end
if removed > 0 then
  redis.call('HINCRBY', KEYS[2], 'applied', removed)
  redis.call('HINCRBY', KEYS[2], 'batches', 1)
end
return removed
