-- Put an event that can't be applied where people find it, once.
--
-- KEYS[1]  dead: the stream of dead letters
-- ARGV[1]  version of the event
-- ARGV[2]  why it can't be applied
-- ARGV[3..] the event's fields and values, alternating, as they were in the log; the first 2,000 pairs are kept
-- Returns  the ID of the letter
--
-- A batch that is delivered again brings its dead events again, soon after: the last letters tell.

local letters = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1000)
for _, letter in ipairs(letters) do
  if letter[2][2] == ARGV[1] then
    return letter[1]
  end
end
-- A full Redis takes the next command only after another write of the same script. Without the letter the event would
-- stay pending, and all after it could not be trimmed.
redis.call('XDEL', KEYS[1], '0-1')
return redis.call('XADD', KEYS[1], '*', 'version', ARGV[1], 'reason', ARGV[2],
  unpack(ARGV, 3, math.min(#ARGV, 4002)))
