-- Publish which scopes have changed, and confirm the batch that changed them: all of it, or nothing.
--
-- KEYS[1]  epoch: a hash, see epoch.lua
-- KEYS[2]  identity: a hash, see identity.py: gets the facts that the store must match from now on
-- KEYS[3..] for each message: a feed, then buckets of L2 to drop, at most some thousands; then for each log partition
--          to confirm: its log, its meter (a hash, added, applied and batches)
-- ARGV[1]  the epoch of the buckets
-- ARGV[2]  about how many messages a feed keeps
-- ARGV[3]  about how many bytes a feed keeps: if messages are large, it keeps fewer
-- ARGV[4]  the consumer group
-- ARGV[5..] number of messages, for each: its payload (see feed/messages.py), number of buckets; number of log
--          partitions, for each: number of IDs of entries, these; then fields and values for the identity
-- Returns  {epoch, how many entries were pending until now, keys that hold no log...}. If that epoch is not ARGV[1],
--          nothing was done. It is empty if there is none: a new epoch begins with what is committed.
--
-- A feed is a stream, and a channel of the same name. Fields of a message: prev, the ID of the message before it; m,
-- the payload; c, bytes of payloads up to here. Another worker may have confirmed the entries that were not pending.

local current = redis.call('HGET', KEYS[1], 'epoch') or ''
if current ~= '' and current ~= ARGV[1] then
  return {current, 0}
end

local i, at = 3, 6
for _ = 1, tonumber(ARGV[5]) do
  local payload, buckets = ARGV[at], tonumber(ARGV[at + 1])
  -- First: a full Redis takes the next commands only after a write that needs no space (before Redis 7).
  if buckets > 0 then
    redis.call('UNLINK', unpack(KEYS, i + 1, i + buckets))
  end
  local last = redis.call('XREVRANGE', KEYS[i], '+', '-', 'COUNT', 1)[1]
  local previous, written = '0-0', 0
  if last then
    previous, written = last[1], tonumber(last[2][6]) or 0 -- an older worker adds no c
  end
  local bytes = string.len(payload)
  written = string.format('%.0f', written + bytes)
  local id = redis.call('XADD', KEYS[i], 'MAXLEN', '~', ARGV[2], '*', 'prev', previous, 'm', payload, 'c', written)
  if bytes > 1024 then -- smaller messages stay below the limit in any case
    for _ = 1, 16 do
      local first = redis.call('XRANGE', KEYS[i], '-', '+', 'COUNT', 1)[1]
      local before = tonumber(first[2][6])
      if first[1] == id or not before or written - before < tonumber(ARGV[3]) then
        break
      end
      redis.call('XDEL', KEYS[i], first[1])
    end
  end
  redis.call('PUBLISH', KEYS[i], id .. ' ' .. previous .. ' ' .. payload)
  i, at = i + 1 + buckets, at + 2
end

local confirmed, answer = 0, {current, 0}
local logs = tonumber(ARGV[at])
at = at + 1
for _ = 1, logs do
  local last, removed = at + tonumber(ARGV[at]), 0
  for first = at + 1, last, 1000 do -- Lua unpacks at most some thousands
    local some = redis.pcall('XACK', KEYS[i], ARGV[4], unpack(ARGV, first, math.min(first + 999, last)))
    if type(some) == 'number' then
      removed = removed + some
    elseif string.find(some.err, 'WRONGTYPE', 1, true) then
      answer[#answer + 1] = KEYS[i] -- the other partitions must not wait for that
      break
    else
      return some
    end
  end
  i = i + 1
  if removed > 0 then
    redis.call('HINCRBY', KEYS[i], 'applied', removed)
    redis.call('HINCRBY', KEYS[i], 'batches', 1)
  end
  confirmed = confirmed + removed
  i, at = i + 1, last + 1
end
if at <= #ARGV then
  redis.call('HSET', KEYS[2], unpack(ARGV, at))
end
answer[2] = confirmed
return answer
