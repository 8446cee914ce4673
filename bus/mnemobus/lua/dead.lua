-- Add an event that can't be applied to the dead letters, once, and note its reason for its writer.
--
-- KEYS[1]  dead: the stream of dead letters: version and reason, then the event's fields
-- KEYS[2]  reasons: a hash, version -> what happened to an event that could not be applied:
--          "dead <ID of its letter> <reason>"; "dropped <reason>"; "requeued <ID of its new entry>"
-- KEYS[3]  meter: a hash; dead_last is the ID of the last letter that has a reason, dead_bytes the size of the letters,
--          dead_forgotten the highest version whose letter and reason were deleted for space, dead_given_up the number
--          of these, dead_left_out the number of letters without content; both counts begin again when no letters are
--          left
-- ARGV[1]  version of the event
-- ARGV[2]  why it can't be applied
-- ARGV[3]  most bytes of all letters
-- ARGV[4..] the event's fields and values, alternating, as they were in the log; the first 2,000 pairs are kept
-- Returns  {ID of the letter, 1 if its content was left out for space, how many older letters were deleted for space}
--          The ID is empty if the letter was dropped already.
--
-- The time does not depend on the number of letters: the reasons say what is a dead letter, no letter is read. At the
-- limit, a new letter gets no content: the log has it until it is trimmed, and requeue.lua takes it from there. If that
-- does not free enough space, the oldest letters are deleted, a few with each new one.

local function before(a, b)
  local a_ms, a_seq = string.match(a, '^(%d+)-(%d+)$')
  local b_ms, b_seq = string.match(b, '^(%d+)-(%d+)$')
  if not a_ms or not b_ms then
    return false
  elseif a_ms == b_ms then
    a_ms, b_ms = a_seq, b_seq
  end
  if #a_ms ~= #b_ms then
    return #a_ms < #b_ms
  end
  return a_ms < b_ms
end

local function size(fields)
  local bytes = 200
  for i = 1, #fields do
    bytes = bytes + #fields[i]
  end
  return bytes
end

local known = redis.call('HGET', KEYS[2], ARGV[1])
if known then
  local letter = string.match(known, '^dead (%S+)')
  if letter or string.sub(known, 1, 7) == 'dropped' then
    return {letter or '', 0, 0} -- a batch that is delivered again brings its dead events again
  end
end

-- A full Redis takes the next command only after another write of the same script. Without the letter the event would
-- stay pending, and all after it could not be trimmed.
redis.call('XDEL', KEYS[1], '0-1')
local meter = redis.call('HMGET', KEYS[3], 'dead_last', 'dead_bytes', 'dead_forgotten')
local bytes = redis.call('XLEN', KEYS[1]) > 0 and tonumber(meter[2] or 0) or 0
-- An older worker may have added letters without reasons: then dead_last stays, and index.lua goes on from it.
local complete = #redis.call('XRANGE', KEYS[1], '(' .. (meter[1] or '0-0'), '+', 'COUNT', 1) == 0

local limit = tonumber(ARGV[3])
local letter = {'version', ARGV[1], 'reason', ARGV[2], unpack(ARGV, 4, math.min(#ARGV, 4003))}
local left_out = 0
if bytes + size(letter) > limit then
  local short = {'version', ARGV[1], 'reason', ARGV[2]}
  for i = 5, math.min(#letter, 44), 2 do
    local name, value = letter[i], letter[i + 1] or ''
    if #name + #value <= 600 and name ~= 'content' and name ~= 'metadata' and name ~= 'embedding' then
      short[#short + 1] = name
      short[#short + 1] = value
    end
  end
  short[#short + 1] = 'left_out'
  short[#short + 1] = string.format('%d', size(letter))
  letter, left_out = short, 1
end

local forgotten, given_up = meter[3] or '', 0
while bytes + size(letter) > limit and given_up < 4 do
  local oldest = redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', 1)[1]
  if not oldest then
    break
  end
  redis.call('XDEL', KEYS[1], oldest[1])
  redis.call('HDEL', KEYS[2], oldest[2][2])
  if string.match(oldest[2][2], '^%d+-%d+$') and not before(oldest[2][2], forgotten) then
    forgotten = oldest[2][2]
  end
  bytes = math.max(bytes - size(oldest[2]), 0)
  given_up = given_up + 1
end

local id = redis.call('XADD', KEYS[1], '*', unpack(letter))
redis.call('HSET', KEYS[2], ARGV[1], 'dead ' .. id .. ' ' .. string.sub(ARGV[2], 1, 1000))
redis.call('HSET', KEYS[3], 'dead_bytes', string.format('%d', bytes + size(letter)))
if complete then
  redis.call('HSET', KEYS[3], 'dead_last', id)
end
if left_out > 0 then
  redis.call('HINCRBY', KEYS[3], 'dead_left_out', 1)
end
if given_up > 0 then
  redis.call('HINCRBY', KEYS[3], 'dead_given_up', given_up)
  redis.call('HSET', KEYS[3], 'dead_forgotten', forgotten)
end
return {id, left_out, given_up}
