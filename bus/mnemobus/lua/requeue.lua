-- Put a dead letter's event back at the end of the log, under the version that it had.
--
-- KEYS[1]  log: the stream of events
-- KEYS[2]  dead: the stream of dead letters
-- KEYS[3]  meter: a hash of counters, added among them
-- KEYS[4]  heads: a hash, n among its fields: an event that keeps an older version needs no announcement
-- ARGV[1]  ID of the letter
-- Returns  the ID of the new entry; nothing if there is no such letter, or no longer
-- Errors   OOM  Redis is full; nothing has changed

local letter = redis.call('XRANGE', KEYS[2], ARGV[1], ARGV[1])[1]
if not letter then
  return false
end
local fields = letter[2] -- version, its value, reason, its value, then the event's
local event = {}
for i = 5, #fields do
  event[#event + 1] = fields[i]
end
event[#event + 1] = 'as'
event[#event + 1] = fields[2]
local id = redis.call('XADD', KEYS[1], '*', unpack(event))
redis.call('HINCRBY', KEYS[3], 'added', 1)
redis.call('HINCRBY', KEYS[4], 'n', 1)
redis.call('XDEL', KEYS[2], ARGV[1])
return id
