-- Look up one query's result in a bucket of L2, or get the lease to fill it.
--
-- KEYS[1]  bucket: a hash, q:<query> -> result and l:<query> -> "<token> <granted in ms> <expiry in ms>". The whole
--          key, with its leases, is deleted when its scope is invalidated (or evicted, or expires).
-- ARGV[1]  query
-- ARGV[2]  token of the lease, if one is granted; never used before
-- ARGV[3]  ms after which another caller may get the lease
-- ARGV[4]  time to live of a bucket in ms
-- ARGV[5]  most fields of a bucket: one that has as many is emptied first, as if it had been evicted
-- Returns  the result; or 1: the lease is granted; 0: another caller has it

local result = redis.call('HGET', KEYS[1], 'q:' .. ARGV[1])
if result then
  return result
end
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local field = 'l:' .. ARGV[1]
local lease = redis.call('HGET', KEYS[1], field)
if lease then
  local granted = tonumber(string.match(lease, ' (%d+) %d+$')) -- nil if an older mnemobus granted it
  local expiry = tonumber(string.match(lease, ' (%d+)$'))
  if expiry > now and (granted or now) <= now then -- else it has expired, or the clock was set back since
    return 0
  end
elseif redis.call('HLEN', KEYS[1]) >= tonumber(ARGV[5]) then
  redis.call('UNLINK', KEYS[1])
end
redis.call('HSET', KEYS[1], field, ARGV[2] .. string.format(' %d %d', now, now + tonumber(ARGV[3])))
if redis.call('PTTL', KEYS[1]) < 0 then
  redis.call('PEXPIRE', KEYS[1], ARGV[4])
end
return 1
