-- Set the idle time of entries that a consumer still owns: with 0, other consumers can't claim them yet; with a large
-- number, they can. Neither counts as a delivery.
--
-- KEYS[1]  log: the stream of events
-- ARGV[1]  the consumer group
-- ARGV[2]  the consumer
-- ARGV[3]  the new idle time in ms
-- ARGV[4]  deliveries to subtract: 1 if the consumer did not begin with the entries, else 0
-- ARGV[5..] IDs of entries
-- Returns  how many the consumer owns

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
