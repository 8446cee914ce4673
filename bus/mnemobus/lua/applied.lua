-- Tell which events of a log partition have been applied.
--
-- KEYS[1]  log: the stream of events
-- ARGV[1]  the consumer group that applies them
-- ARGV[2..] versions asked about
-- Returns  {last delivered, lowest pending, then for each version 1 if it is pending, else 0}
--          The first two are empty where there is no such group, or nothing pends. A version is applied if it is
--          not above the last delivered and not pending. All below the lowest pending (where nothing pends: all up
--          to the last delivered) are: that is the low-water mark.

local answer = {'', ''}
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
for i = 2, #ARGV do
  answer[i + 1] = #redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[i], ARGV[i], 1)
end
return answer
