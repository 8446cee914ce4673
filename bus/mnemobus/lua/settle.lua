-- Correct the meter if nothing is left to apply.
--
-- Entries that are deleted from the log by hand are never confirmed, or have left the pending list before (since
-- Redis 7 a claim removes them): without this the backlog would count them for ever.
--
-- KEYS[1]  log: the stream of events
-- KEYS[2]  meter: a hash, added and applied
-- ARGV[1]  the consumer group
-- ARGV[2]  what relayout.lua has added to the backlog of an ended partition
-- Returns  the error of the backlog; 0 also if something is left

if redis.call('EXISTS', KEYS[1]) == 1 then
  local last
  for _, group in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
    local fields = {}
    for i = 1, #group, 2 do
      fields[group[i]] = group[i + 1]
    end
    if fields['name'] == ARGV[1] then
      last = fields['last-delivered-id']
    end
  end
  if not last
    or redis.call('XPENDING', KEYS[1], ARGV[1])[1] > 0
    or #redis.call('XRANGE', KEYS[1], '(' .. last, '+', 'COUNT', 1) > 0
  then
    return 0
  end
end
local meter = redis.call('HMGET', KEYS[2], 'added', 'applied')
local off = (tonumber(meter[1]) or 0) - (tonumber(meter[2]) or 0)
local ended = (tonumber(meter[2]) or 0) < 0 and tonumber(ARGV[2]) or 0
if off ~= ended then
  redis.call('HSET', KEYS[2], 'applied', string.format('%d', (tonumber(meter[1]) or 0) - ended))
end
off = off - ended
return off
