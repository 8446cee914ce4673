-- Retire the oldest log partition, which has ended, once nothing in it is needed any more. The caller deletes its keys
-- later: workers that may be reading there have to notice first.
--
-- KEYS[1]  layout: a hash, as in layout.lua. gone: number of events in all retired partitions; gone_to: the ID of the
--          last of them
-- KEYS[2]  log: the stream of events of the partition
-- KEYS[3]  producers: a hash, as in publish.lua
-- KEYS[4]  dead: the stream of dead letters
-- KEYS[5]  reasons: a hash, as in dead.lua
-- KEYS[6]  meter: a hash, added and trimmed_to
-- ARGV[1]  number of the partition
-- ARGV[2]  least ms for which events are kept
-- ARGV[3]  the consumer group that applies events
-- Returns  1 if it was retired

local there = redis.call('HMGET', KEYS[1], 'first', 'oldest', 'gone_to')
local number = tonumber(ARGV[1])
if number ~= tonumber(there[2] or '0') or number >= tonumber(there[1] or '0') then
  return 0
end
if redis.call('HLEN', KEYS[3]) + redis.call('XLEN', KEYS[4]) + redis.call('HLEN', KEYS[5]) > 0 then
  return 0
end
local last = redis.call('XREVRANGE', KEYS[2], '+', '-', 'COUNT', 1)[1]
last = last and last[1] or '0-0'
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
if tonumber(string.match(last, '^(%d+)-')) > now - tonumber(ARGV[2]) then
  return 0
end
if redis.call('EXISTS', KEYS[2]) == 1 then
  for _, group in ipairs(redis.call('XINFO', 'GROUPS', KEYS[2])) do
    local fields = {}
    for i = 1, #group, 2 do
      fields[group[i]] = group[i + 1]
    end
    -- Another group belongs to a replay that has not read everything.
    if fields['name'] ~= ARGV[3] or fields['pending'] > 0
      or #redis.call('XRANGE', KEYS[2], '(' .. fields['last-delivered-id'], '+', 'COUNT', 1) > 0
    then
      return 0
    end
  end
end

local function ms(id)
  return tonumber(string.match(id or '', '^(%d+)-')) or 0
end
local meter = redis.call('HMGET', KEYS[6], 'added', 'trimmed_to')
redis.call('HINCRBY', KEYS[1], 'gone', meter[1] or '0')
for _, id in ipairs({last, meter[2] or '0-0'}) do
  if ms(id) > ms(there[3]) then
    there[3] = id
  end
end
redis.call('HSET', KEYS[1], 'gone_to', there[3] or '0-0')
redis.call('HSET', KEYS[1], 'oldest', string.format('%d', number + 1))
return 1
