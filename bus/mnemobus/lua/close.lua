-- Close the log to new calls for a while, before it gets a new layout; or open it again.
--
-- KEYS[1]  layout: a hash, first and count as in layout.lua, and closing: "<token> <ms> <ms>": the token of the caller
--          that closed the log, since when and until when, by the server's clock
-- KEYS[2..] meters of the log partitions that take writes: closed, the same value
-- ARGV[1]  token of the caller
-- ARGV[2]  ms for which to close the log from now on; 0 opens it
-- ARGV[3]  first, as the caller knows it
-- ARGV[4]  count, as the caller knows it
-- Returns  1
-- Errors   BUSY n     another caller has closed the log, for at most n ms more; nothing has changed
--          LAYOUT     the log has another layout by now; nothing has changed
--
-- Nothing has to be undone: if the caller dies, the log is open again when the time has passed. And correctness does
-- not depend on the closing: relayout.lua itself checks whether all is applied.

local there = redis.call('HMGET', KEYS[1], 'first', 'count', 'log_partitions', 'closing')
if (there[1] or '0') ~= ARGV[3] or (there[2] or there[3]) ~= ARGV[4] then
  return redis.error_reply('LAYOUT')
end
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
if there[4] then
  local token, since, till = string.match(there[4], '^(%S+) (%d+) (%d+)$')
  if token ~= ARGV[1] and tonumber(since) <= now and now < tonumber(till) then
    return redis.error_reply('BUSY ' .. string.format('%d', tonumber(till) - now))
  end
end
local ms = tonumber(ARGV[2])
redis.call('HDEL', KEYS[1], 'closing') -- a full Redis takes an HSET only after another write of the same script
local closed = ARGV[1] .. string.format(' %d %d', now, now + ms)
if ms > 0 then
  redis.call('HSET', KEYS[1], 'closing', closed)
end
for i = 2, #KEYS do
  if ms > 0 then
    redis.call('HSET', KEYS[i], 'closed', closed)
  else
    redis.call('HDEL', KEYS[i], 'closed')
  end
end
return 1
