-- Report which entries a log has, and how many it no longer has, all at the same moment.
--
-- KEYS[1]  log: the stream of events
-- KEYS[2]  meter: a hash; added counts all entries ever written, trimmed those that `trim.lua` removed, all before
--          trimmed_to
-- Returns  {ID of the first entry, of the last, how many were removed, how many of them by trim.lua, trimmed_to}
--          The IDs are empty if the log is empty; trimmed_to is empty if nothing was trimmed.

local function id(found)
  return found[1] and found[1][1] or ''
end

local meter = redis.call('HMGET', KEYS[2], 'added', 'trimmed', 'trimmed_to')
return {
  id(redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', 1)),
  id(redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)),
  math.max((tonumber(meter[1]) or 0) - redis.call('XLEN', KEYS[1]), 0),
  tonumber(meter[2]) or 0,
  meter[3] or '',
}
