-- Report which events of a log partition have been applied.
--
-- KEYS[1]  log: the stream of events
-- KEYS[2]  dead: the stream of dead letters
-- KEYS[3]  reasons: a hash, as in dead.lua
-- KEYS[4]  meter: a hash, dead_last and dead_forgotten, as in dead.lua
-- ARGV[1]  the consumer group that applies events
-- ARGV[2..] IDs of the entries in question
-- Returns  {last delivered, lowest pending, number of reasons, 1 if there are letters whose reasons are not
--          noted yet else 0, dead_forgotten, then for each ID 1 if it is pending, else 0}
--          The first two are empty if there is no such group, or nothing is pending. An entry is applied if it is not
--          above the last delivered and not pending. The low-water mark is the lowest pending (or, if nothing is
--          pending, the last delivered): all below it are applied. The reasons say whether an event is a dead letter.

local answer = {'', '', 0, 0, ''}
local groups = redis.pcall('XINFO', 'GROUPS', KEYS[1])
if groups.err then
  return answer
end
for _, group in ipairs(groups) do
  local fields = {}
  for i = 1, #group, 2 do
    fields[group[i]] = group[i + 1]
  end
  if fields['name'] == ARGV[1] then
    answer[1] = fields['last-delivered-id']
  end
end
if answer[1] == '' then
  return answer
end
local pending = redis.call('XPENDING', KEYS[1], ARGV[1])
if pending[1] > 0 then
  answer[2] = pending[2]
end

answer[3] = redis.call('HLEN', KEYS[3])
local meter = redis.call('HMGET', KEYS[4], 'dead_last', 'dead_forgotten')
answer[4] = #redis.call('XRANGE', KEYS[2], '(' .. (meter[1] or '0-0'), '+', 'COUNT', 1)
answer[5] = meter[2] or ''

for i = 2, #ARGV do
  answer[i + 4] = #redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[i], ARGV[i], 1)
end
return answer
