-- Tell everyone that scopes of one feed partition have changed, atomically.
--
-- KEYS[1]  feed: the stream of invalidations; its name is the channel's, too
-- KEYS[2..] buckets of L2 to drop, some thousands at most
-- ARGV[1]  payload: see feed.decode
-- ARGV[2]  about how many messages the stream keeps
-- Returns  the ID of the message

if #KEYS > 1 then
  redis.call('UNLINK', unpack(KEYS, 2))
end
local last = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)
local previous = last[1] and last[1][1] or '0-0'
local id = redis.call('XADD', KEYS[1], 'MAXLEN', '~', ARGV[2], '*', 'prev', previous, 'm', ARGV[1])
redis.call('PUBLISH', KEYS[1], id .. ' ' .. previous .. ' ' .. ARGV[1])
return id
