-- Put a dead letter's event back at the end of the log, under the version that it had.
--
-- KEYS[1]  log: the stream of events
-- KEYS[2]  dead: the stream of dead letters
-- KEYS[3]  meter: a hash of counters; added and dead_bytes are among them
-- KEYS[4]  reasons: a hash, as in dead.lua
-- KEYS[5]  heads: a hash, n among its fields: an event that keeps an older version needs no announcement
-- ARGV[1]  ID of the letter
-- Returns  the ID of the new entry; nothing if there is no such letter, or no longer
-- Errors   OOM        Redis is full; nothing has changed
--          LEFT OUT   the letter is without its content, and the log no longer has the event; nothing has changed

local letter = redis.call('XRANGE', KEYS[2], ARGV[1], ARGV[1])[1]
if not letter then
  return false
end
local fields = letter[2] -- version, its value, reason, its value, then the event's
local version, first = fields[2], 5
local bytes = 200
for i = 1, #fields do
  bytes = bytes + #fields[i]
end
if fields[#fields - 1] == 'left_out' then
  local entry = redis.call('XRANGE', KEYS[1], version, version)[1]
  if not entry then
    return redis.error_reply('LEFT OUT ' .. version)
  end
  fields, first = entry[2], 1
end
local event = {}
for i = first, #fields, 2 do
  if fields[i] ~= 'as' then
    event[#event + 1] = fields[i]
    event[#event + 1] = fields[i + 1]
  end
end
event[#event + 1] = 'as'
event[#event + 1] = version
local id = redis.call('XADD', KEYS[1], '*', unpack(event))
redis.call('HINCRBY', KEYS[3], 'added', 1)
redis.call('HINCRBY', KEYS[5], 'n', 1)
redis.call('XDEL', KEYS[2], ARGV[1])
if redis.call('XLEN', KEYS[2]) == 0 then
  redis.call('HDEL', KEYS[3], 'dead_left_out', 'dead_given_up') -- what people had to see
end
redis.call('HINCRBY', KEYS[3], 'dead_bytes', -bytes)
redis.call('HSET', KEYS[4], version, 'requeued ' .. id)
return id
