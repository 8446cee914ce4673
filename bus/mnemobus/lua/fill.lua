-- Put a query's result into its bucket, if its lease is still there.
--
-- KEYS[1]  bucket: as in lookup.lua
-- ARGV[1]  query
-- ARGV[2]  token of the lease
-- ARGV[3]  result
-- ARGV[4]  most percent of its memory that Redis may have in use, including this result, if it has a limit and evicts
--          nothing: the rest is for the log
-- Returns  1 if the result was accepted, 0 if the bucket was invalidated (or evicted) since, 2 if there is no space

local field = 'l:' .. ARGV[1]
local lease = redis.call('HGET', KEYS[1], field)
if not lease or string.match(lease, '^(%S+) ') ~= ARGV[2] then
  return 0
end
local info = redis.call('INFO', 'memory')
local limit = tonumber(string.match(info, '\nmaxmemory:(%d+)') or 0)
if limit > 0 and string.match(info, '\nmaxmemory_policy:(%a+)') == 'noeviction' then
  if tonumber(string.match(info, '\nused_memory:(%d+)')) + string.len(ARGV[3]) > limit * tonumber(ARGV[4]) / 100 then
    redis.call('HDEL', KEYS[1], field)
    return 2
  end
end
redis.call('HSET', KEYS[1], 'q:' .. ARGV[1], ARGV[3])
redis.call('HDEL', KEYS[1], field)
return 1
