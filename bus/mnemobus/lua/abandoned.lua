-- Remove groups of `hold.lua` that nobody uses any more: they keep the log from being trimmed.
--
-- KEYS[1]  log: the stream of events
-- ARGV[1]  ms without a sign of life
-- ARGV[2..] how the names of such groups begin
-- Returns  the names of those that were removed

local groups = redis.pcall('XINFO', 'GROUPS', KEYS[1])
if groups.err then
  return {}
end

local function named(reply)
  local fields = {}
  for i = 1, #reply, 2 do
    fields[reply[i]] = reply[i + 1]
  end
  return fields
end

local removed = {}
for _, group in ipairs(groups) do
  local name = named(group)['name']
  local ours = false
  for i = 2, #ARGV do
    ours = ours or string.sub(name, 1, #ARGV[i]) == ARGV[i]
  end
  if ours then
    local used = false
    for _, consumer in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[1], name)) do
      used = used or named(consumer)['idle'] <= tonumber(ARGV[1])
    end
    if not used then
      redis.call('XDEL', KEYS[1], '0-1') -- a full Redis takes the next only after it, see hold.lua
      redis.call('XGROUP', 'DESTROY', KEYS[1], name)
      removed[#removed + 1] = name
    end
  end
end
return removed
