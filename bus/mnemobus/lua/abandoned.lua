-- Remove groups of `hold.lua` that no process uses any more: while they exist, the log can't be trimmed.
--
-- KEYS[1]  log: the stream of events
-- ARGV[1]  ms without activity
-- ARGV[2..] prefixes of the names of such groups
-- Returns  the names of the removed groups

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
      redis.call('XDEL', KEYS[1], '0-1') -- a full Redis takes the next command only after it, see hold.lua
      redis.call('XGROUP', 'DESTROY', KEYS[1], name)
      removed[#removed + 1] = name
    end
  end
end
return removed
