-- Agree on how the bus is laid out: the first to connect writes it, everyone after reads it.
--
-- KEYS[1]  layout: a hash, log_partitions and feed_partitions
-- ARGV[1]  log partitions that the caller is configured for
-- ARGV[2]  feed partitions that the caller is configured for
-- Returns  {log partitions, feed partitions} as they stand

local there = redis.call('HMGET', KEYS[1], 'log_partitions', 'feed_partitions')
if there[1] and there[2] then
  return there -- without trying to write, which a full Redis refuses
end
redis.call('HSETNX', KEYS[1], 'log_partitions', ARGV[1])
redis.call('HSETNX', KEYS[1], 'feed_partitions', ARGV[2])
return redis.call('HMGET', KEYS[1], 'log_partitions', 'feed_partitions')
