-- Agree on the layout of the bus: the first caller writes it, all later ones read it.
--
-- KEYS[1]  layout: a hash. log_partitions and feed_partitions; 0 log partitions once the log was repartitioned: an
--          older mnemobus knows only these two, and must not take part then. first and count: the numbers of the log
--          partitions that take writes. oldest: the lowest number of those that are kept. closing: see close.lua. life:
--          a new one each time that all this was lost and is agreed on again, so that a partition's number never gets a
--          second meaning
-- KEYS[2..] meters of the log partitions that take writes, as far as the caller knows. open: first, count and life of
--          the layout in which the partition takes writes
-- ARGV[1]  feed partitions in the caller's settings
-- ARGV[2]  the number of the first of these log partitions
-- ARGV[3]  a new life, if one begins; never used before
-- Returns  {feed partitions, first, count, oldest, life} as they are now. If first and count are not those of the
--          caller, it calls again, with the right KEYS.

local there = redis.call('HMGET', KEYS[1], 'log_partitions', 'feed_partitions', 'first', 'count', 'oldest', 'life')
local first, count, oldest, life = there[3] or '0', there[4] or there[1], there[5] or '0', there[6]
if not there[1] or not there[2] then
  redis.call('HSETNX', KEYS[1], 'log_partitions', #KEYS - 1)
  redis.call('HSETNX', KEYS[1], 'feed_partitions', ARGV[1])
  there = redis.call('HMGET', KEYS[1], 'log_partitions', 'feed_partitions')
  first, count, oldest = '0', there[1], '0'
end
if not life then -- there was no layout yet, or an older mnemobus wrote it
  life = ARGV[3]
  redis.call('HDEL', KEYS[1], 'life') -- a full Redis takes the next command only after another write of the same script
  redis.call('HSET', KEYS[1], 'life', life)
end
if tonumber(first) == tonumber(ARGV[2]) and tonumber(count) == #KEYS - 1 then
  local shape = string.format('%d %d ', tonumber(first), tonumber(count)) .. life
  for i = 2, #KEYS do
    if redis.call('HGET', KEYS[i], 'open') ~= shape then -- if it is right, don't write: a full Redis would refuse
      redis.call('HDEL', KEYS[i], 'open')
      redis.call('HSET', KEYS[i], 'open', shape)
    end
  end
end
return {there[2], first, count, oldest, life}
