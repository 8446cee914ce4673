-- Confirm that a batch is applied and fanned out.
--
-- KEYS[1]  log: the stream of events
-- KEYS[2]  meter: a hash, added, applied and batches
-- ARGV[1]  the consumer group
-- ARGV[2..] IDs of the batch's entries
-- Returns  how many were pending until now; another worker may have confirmed the others

local removed = 0
for first = 2, #ARGV, 1000 do -- Lua unpacks some thousands at most
  local last = math.min(first + 999, #ARGV)
  removed = removed + redis.call('XACK', KEYS[1], ARGV[1], unpack(ARGV, first, last))
end
if removed > 0 then
  redis.call('HINCRBY', KEYS[2], 'applied', removed)
  redis.call('HINCRBY', KEYS[2], 'batches', 1)
end
return removed
