-- Set how long entries have been idle, those that still are a consumer's own: 0 keeps others from claiming them,
-- a large number hands them over. Neither counts as a delivery.
--
-- KEYS[1]  log: the stream of events
-- ARGV[1]  the consumer group
-- ARGV[2]  the consumer
-- ARGV[3]  ms that the entries shall have been idle
-- ARGV[4]  deliveries to take back: 1 if the consumer did not begin with the entries, else 0
-- ARGV[5..] IDs of entries
-- Returns  how many are the consumer's own

local own = 0
for i = 5, #ARGV do
  local pending = redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[i], ARGV[i], 1)
  if pending[1] and pending[1][2] == ARGV[2] then
    local deliveries = math.max(0, pending[1][4] - tonumber(ARGV[4]))
    redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, ARGV[i], 'IDLE', ARGV[3], 'RETRYCOUNT', deliveries, 'JUSTID')
    own = own + 1
  end
end
return own
