-- Delete the keys of a retired log partition.
--
-- KEYS[1]  layout: a hash, as in layout.lua and retire.lua. swept: all partitions with lower numbers have been removed
-- KEYS[2..] all keys of the partition but its meter: while that exists, an older mnemobus can't write there
-- ARGV[1]  number of the partition
-- Returns  1 if they are deleted; 0 if it is not retired: Redis may have been flushed, and have a new one of this
--          number

local number = tonumber(ARGV[1])
if number >= tonumber(redis.call('HGET', KEYS[1], 'oldest') or '0') then
  return 0
end
redis.call('UNLINK', unpack(KEYS, 2))
redis.call('HSET', KEYS[1], 'swept', string.format('%d', number + 1))
return 1
