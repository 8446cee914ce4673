-- Put a query's result into its bucket, if the lease that was granted for it is still there.
--
-- KEYS[1]  bucket: as in lookup.lua
-- ARGV[1]  query
-- ARGV[2]  token of the lease
-- ARGV[3]  result
-- Returns  1 if the result was accepted, 0 if the bucket was invalidated (or evicted) since

local field = 'l:' .. ARGV[1]
local lease = redis.call('HGET', KEYS[1], field)
if not lease or string.match(lease, '^(%S+) ') ~= ARGV[2] then
  return 0
end
redis.call('HSET', KEYS[1], 'q:' .. ARGV[1], ARGV[3])
redis.call('HDEL', KEYS[1], field)
return 1
