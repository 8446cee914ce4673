-- Repartition the log, in one step, once all of its events are applied.
--
-- KEYS[1]  layout: a hash, as in layout.lua and close.lua
-- KEYS[2..] for each log partition that takes writes: log, meter; then for each new one, which has a number that no
--          partition has had: log, meter
-- ARGV[1]  token of the caller, which has closed the log
-- ARGV[2]  the consumer group that applies events
-- ARGV[3]  first, as the caller knows it
-- ARGV[4]  count, as the caller knows it
-- ARGV[5]  the number of new partitions
-- ARGV[6]  is added to the backlog of the partitions that end, so that an older mnemobus writes nothing there any more
-- Returns  0 if it is done; else the number of partitions that still have events to apply: nothing has changed
-- Errors   LAYOUT     the log has another layout, or another caller has closed it, or new partitions have
--            events already; nothing has changed
--
-- A partition that has ended keeps all its data: the log for replays, the producers' last calls, which may still be
-- repeated, the dead letters. New ones begin above the last event of all earlier ones, whatever the clock says (G2).

local function before(a, b)
  local a_ms, a_seq = string.match(a, '^(%d+)-(%d+)$')
  local b_ms, b_seq = string.match(b, '^(%d+)-(%d+)$')
  if a_ms == b_ms then
    a_ms, b_ms = a_seq, b_seq
  end
  if #a_ms ~= #b_ms then
    return #a_ms < #b_ms
  end
  return a_ms < b_ms
end

local function fields_of(list)
  local fields = {}
  for i = 1, #list, 2 do
    fields[list[i]] = list[i + 1]
  end
  return fields
end

local there = redis.call('HMGET', KEYS[1], 'first', 'count', 'log_partitions', 'closing', 'life')
local token = there[4] and string.match(there[4], '^(%S+) ')
if not there[5] or (there[1] or '0') ~= ARGV[3] or (there[2] or there[3]) ~= ARGV[4] or token ~= ARGV[1] then
  return redis.error_reply('LAYOUT')
end

local count = tonumber(ARGV[4])
local left, last = 0, '0-0'
for i = 2, 2 * count, 2 do
  if redis.call('EXISTS', KEYS[i]) == 1 then
    local stream = fields_of(redis.call('XINFO', 'STREAM', KEYS[i]))
    local applied
    for _, group in ipairs(redis.call('XINFO', 'GROUPS', KEYS[i])) do
      group = fields_of(group)
      if group['name'] == ARGV[2] and group['pending'] == 0 then
        applied = group['last-delivered-id']
      end
    end
    if not applied or #redis.call('XRANGE', KEYS[i], '(' .. applied, '+', 'COUNT', 1) > 0 then
      left = left + 1
    elseif before(last, stream['last-generated-id']) then
      last = stream['last-generated-id']
    end
  end
end
if left > 0 then
  return left
end
for i = 2 * count + 2, #KEYS, 2 do
  if redis.call('XLEN', KEYS[i]) > 0 then
    return redis.error_reply('LAYOUT')
  end
end

redis.call('HDEL', KEYS[1], 'closing') -- a full Redis takes the next command only after another write of the same script
for i = 3, 2 * count + 1, 2 do
  redis.call('HDEL', KEYS[i], 'open', 'closed')
  redis.call('HINCRBY', KEYS[i], 'applied', '-' .. ARGV[6])
end
for i = 2 * count + 2, #KEYS, 2 do
  redis.pcall('XGROUP', 'CREATE', KEYS[i], ARGV[2], '0', 'MKSTREAM') -- a worker may have created it
  redis.call('XSETID', KEYS[i], last)
end
local first = string.format('%d', tonumber(ARGV[3]) + count)
for i = 2 * count + 3, #KEYS, 2 do
  redis.call('HSET', KEYS[i], 'open', first .. ' ' .. ARGV[5] .. ' ' .. there[5])
end
redis.call('HSET', KEYS[1], 'log_partitions', '0', 'first', first, 'count', ARGV[5])
return 0
