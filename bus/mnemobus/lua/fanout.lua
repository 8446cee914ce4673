-- Tell everyone that scopes of one feed partition have changed, atomically.
--
-- KEYS[1]  feed: the stream of invalidations; its name is the channel's, too. Of a message: prev, the ID of the one before
--          it; m, the payload; c, bytes of payloads up to here
-- KEYS[2..] buckets of L2 to drop, some thousands at most
-- ARGV[1]  payload: see feed.decode
-- ARGV[2]  about how many messages the stream keeps
-- ARGV[3]  about how many bytes: where messages are large, it keeps fewer
-- Returns  the ID of the message

if #KEYS > 1 then
  redis.call('UNLINK', unpack(KEYS, 2))
end
local last = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)[1]
local previous, written = '0-0', 0
if last then
  previous, written = last[1], tonumber(last[2][6]) or 0 -- none, of an older worker
end
local bytes = string.len(ARGV[1])
written = string.format('%.0f', written + bytes)
local id = redis.call('XADD', KEYS[1], 'MAXLEN', '~', ARGV[2], '*', 'prev', previous, 'm', ARGV[1], 'c', written)
if bytes > 1024 then -- as many small ones as it keeps come to less than the limit
  for _ = 1, 16 do
    local first = redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', 1)[1]
    local before = tonumber(first[2][6])
    if first[1] == id or not before or written - before < tonumber(ARGV[3]) then
      break
    end
    redis.call('XDEL', KEYS[1], first[1])
  end
end
redis.call('PUBLISH', KEYS[1], id .. ' ' .. previous .. ' ' .. ARGV[1])
return id
