-- Remove from the log what every consumer group has applied and retention no longer asks for.
--
-- KEYS[1]  log: the stream of events
-- KEYS[2]  meter: a hash; trimmed counts the entries that this script has removed, all of them before trimmed_to
-- ARGV[1]  least ms for which events are kept
-- ARGV[2]  the consumer group that applies events
-- ARGV[3]  an ID that was delivered at least that long ago, by the caller's own clock; 0-0 for none
-- Returns  {how many entries were removed, at most some thousands at a time; the ID that was last delivered}
--
-- IDs come from Redis's clock. If it was ahead once and is right again, they lie in the future, and by the IDs alone
-- nothing would be removed until the clock has reached them: so there is ARGV[3].
--
-- Nothing is removed at or above a group's low-water mark: the lowest pending ID, or the last delivered if nothing is
-- pending. A log without the group that applies events is not trimmed.

-- IDs are two unsigned 64-bit numbers; a Lua number would lose digits of them.
local function smaller(a, b)
  if #a ~= #b then
    return #a < #b
  end
  return a < b
end

local function before(a, b)
  local a_ms, a_seq = string.match(a, '^(%d+)-(%d+)$')
  local b_ms, b_seq = string.match(b, '^(%d+)-(%d+)$')
  if a_ms ~= b_ms then
    return smaller(a_ms, b_ms)
  end
  return smaller(a_seq, b_seq)
end

local groups = redis.pcall('XINFO', 'GROUPS', KEYS[1])
if groups.err then
  return {0, '0-0'}
end
local applying
local time = redis.call('TIME')
local oldest = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000) - tonumber(ARGV[1])
local mark = string.format('%d-0', math.max(oldest, 0))
if before(mark, ARGV[3]) then
  mark = ARGV[3]
end
for _, group in ipairs(groups) do
  local fields = {}
  for i = 1, #group, 2 do
    fields[group[i]] = group[i + 1]
  end
  if fields['name'] == ARGV[2] then
    applying = fields['last-delivered-id']
  end
  local low = fields['last-delivered-id']
  local pending = redis.call('XPENDING', KEYS[1], fields['name'])
  if pending[1] > 0 then
    low = pending[2]
  end
  if before(low, mark) then
    mark = low
  end
end
if not applying then
  return {0, '0-0'}
end
local removed = redis.call('XTRIM', KEYS[1], 'MINID', '~', mark)
if removed > 0 then
  redis.call('HINCRBY', KEYS[2], 'trimmed', removed)
  redis.call('HSET', KEYS[2], 'trimmed_to', mark)
end
return {removed, applying}
