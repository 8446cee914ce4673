-- Set how long entries have been idle, those that still are a consumer's own: 0 keeps others from claiming them,
-- a large number hands them over. Neither counts as a delivery.
--
-- KEYS[1]  log: the stream of events
-- ARGV[1]  the consumer group
-- ARGV[2]  the consumer
-- ARGV[3]  ms that the entries shall have been idle
-- ARGV[4..] IDs of entries
-- Returns  how many are the consumer's own

local own = 0
for i = 4, #ARGV do
  local pending = redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[i], ARGV[i], 1)
  if pending[1] and pending[1][2] == ARGV[2] then
    redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, ARGV[i], 'IDLE', ARGV[3], 'JUSTID')
    own = own + 1
  end
end
return own
