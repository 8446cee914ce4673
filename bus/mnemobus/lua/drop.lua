-- Delete a dead letter. Its reason stays: its writer may not have read it yet.
--
-- KEYS[1]  dead: the stream of dead letters
-- KEYS[2]  reasons: a hash, as in dead.lua
-- KEYS[3]  meter: a hash, dead_bytes, as in dead.lua
-- ARGV[1]  ID of the letter
-- Returns  1; 0 if there is no such letter (any more)

local letter = redis.call('XRANGE', KEYS[1], ARGV[1], ARGV[1])[1]
if not letter then
  return 0
end
local bytes = 200
for i = 1, #letter[2] do
  bytes = bytes + #letter[2][i]
end
redis.call('XDEL', KEYS[1], ARGV[1])
if redis.call('XLEN', KEYS[1]) == 0 then
  redis.call('HDEL', KEYS[3], 'dead_left_out', 'dead_given_up') -- no letters are left to report
end
redis.call('HINCRBY', KEYS[3], 'dead_bytes', -bytes)
local version, reason = letter[2][2], string.sub(letter[2][4] or '', 1, 1000)
redis.call('HSET', KEYS[2], version, 'dropped ' .. reason)
return 1
