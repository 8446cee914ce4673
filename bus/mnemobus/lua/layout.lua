-- Agree on how the bus is laid out: the first to connect writes it, everyone after reads it.
--
-- KEYS[1]  layout: a hash. log_partitions and feed_partitions; 0 log partitions once the log was laid out anew: an older
--          mnemobus, which knows these two only, must not take part. first and count: the numbers of the log partitions that
--          are written to. oldest: the lowest number of those that are kept. closing: see close.lua. life: another one each time that
--          all this was lost and is agreed on anew, so that numbers of partitions never mean what they meant before
-- KEYS[2..] meters of the log partitions that the caller takes for those that are written to. open: first, count and life
--          of the layout by which it is one of them
-- ARGV[1]  feed partitions that the caller is configured for
-- ARGV[2]  the number of the first of these log partitions
-- ARGV[3]  a new life, should one begin; never used before
-- Returns  {feed partitions, first, count, oldest, life} as they stand. Where first and count are not the caller's, it asks once
--          more, with those as KEYS.

local there = redis.call('HMGET', KEYS[1], 'log_partitions', 'feed_partitions', 'first', 'count', 'oldest', 'life')
local first, count, oldest, life = there[3] or '0', there[4] or there[1], there[5] or '0', there[6]
if not there[1] or not there[2] then
  redis.call('HSETNX', KEYS[1], 'log_partitions', #KEYS - 1)
  redis.call('HSETNX', KEYS[1], 'feed_partitions', ARGV[1])
  there = redis.call('HMGET', KEYS[1], 'log_partitions', 'feed_partitions')
  first, count, oldest = '0', there[1], '0'
end
if not life then -- nobody had agreed on any, or an older mnemobus did
  life = ARGV[3]
  redis.call('HDEL', KEYS[1], 'life') -- a full Redis takes what follows only after another write of the same script
  redis.call('HSET', KEYS[1], 'life', life)
end
if tonumber(first) == tonumber(ARGV[2]) and tonumber(count) == #KEYS - 1 then
  local shape = string.format('%d %d ', tonumber(first), tonumber(count)) .. life
  for i = 2, #KEYS do
    if redis.call('HGET', KEYS[i], 'open') ~= shape then -- else without trying to write, which a full Redis refuses
      redis.call('HDEL', KEYS[i], 'open')
      redis.call('HSET', KEYS[i], 'open', shape)
    end
  end
end
return {there[2], first, count, oldest, life}
