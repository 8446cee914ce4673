-- Delete the note about an event that was requeued or dropped, unless it has changed meanwhile.
--
-- KEYS[1]  reasons: a hash, as in dead.lua
-- KEYS[2]  meter: a hash, dead_forgotten, as in dead.lua
-- ARGV[1]  version of the event
-- ARGV[2]  the note, as the caller read it
-- Returns  1 if it was deleted

local function before(a, b)
  local a_ms, a_seq = string.match(a, '^(%d+)-(%d+)$')
  local b_ms, b_seq = string.match(b, '^(%d+)-(%d+)$')
  if not a_ms or not b_ms then
    return false
  elseif a_ms == b_ms then
    a_ms, b_ms = a_seq, b_seq
  end
  if #a_ms ~= #b_ms then
    return #a_ms < #b_ms
  end
  return a_ms < b_ms
end

if redis.call('HGET', KEYS[1], ARGV[1]) ~= ARGV[2] then
  return 0
end
redis.call('HDEL', KEYS[1], ARGV[1])
local forgotten = redis.call('HGET', KEYS[2], 'dead_forgotten') or ''
if string.match(ARGV[1], '^%d+-%d+$') and not before(ARGV[1], forgotten) then
  redis.call('HSET', KEYS[2], 'dead_forgotten', ARGV[1])
end
return 1
