-- Tell which events of a log partition have been applied, and which of them went to the dead letters.
--
-- KEYS[1]  log: the stream of events
-- KEYS[2]  dead: the stream of dead letters
-- ARGV[1]  the consumer group that applies events
-- ARGV[2]  ID of the last dead letter that the caller knows; empty for none
-- ARGV[3]  how many dead letters to return at most
-- ARGV[4..] versions asked about
-- Returns  {last delivered, lowest pending, letters, then for each version 1 if it is pending, else 0}
--          The first two are empty where there is no such group, or nothing pends. A version is applied if it is
--          not above the last delivered and not pending. All below the lowest pending (where nothing pends: all up
--          to the last delivered) are: that is the low-water mark. Letters are {ID, version, reason}, in order, those
--          after the one that the caller knows; the newest if it knows none, less one so that it is not taken for part
--          of more.

local answer = {'', '', {}}
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

local found = {}
if ARGV[2] ~= '' then
  found = redis.call('XRANGE', KEYS[2], '(' .. ARGV[2], '+', 'COUNT', ARGV[3])
else
  local newest = redis.call('XREVRANGE', KEYS[2], '+', '-', 'COUNT', tonumber(ARGV[3]) - 1)
  for i = #newest, 1, -1 do
    found[#found + 1] = newest[i]
  end
end
for i, letter in ipairs(found) do
  local fields = {}
  for j = 1, #letter[2], 2 do
    fields[letter[2][j]] = letter[2][j + 1]
  end
  answer[3][i] = {letter[1], fields['version'] or '', fields['reason'] or ''}
end

for i = 4, #ARGV do
  answer[i] = #redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[i], ARGV[i], 1)
end
return answer
