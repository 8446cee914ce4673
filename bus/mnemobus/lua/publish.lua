-- Append a producer's events to the log, once, however often the call is repeated.
--
-- KEYS[1]  log: the stream of events
-- KEYS[2]  producers: a hash, producer id -> JSON {seq, d, t, runs}: its last call, and what it was answered: for each
--          run of IDs with one number after the other, the first of them and how many; {seq, d, t, ids} of an older
--          mnemobus
-- KEYS[3]  meter: a hash, added and applied; their difference is the backlog
-- ARGV[1]  producer id
-- ARGV[2]  sequence number of the call: one more than the producer's last
-- ARGV[3]  backlog at which the log takes no more
-- ARGV[4]  digest of the call's events: a repetition has the same
-- ARGV[5..] for each event: how many arguments follow, then its field names and values, alternating
-- Returns  the ID of each event, in order; those of the first time if the call is a repetition
-- Errors   BACKLOG n      the backlog stands at n; nothing was written
--          SUPERSEDED n   the producer has gone on to call n; nothing was written
--          TAKEN n        call n of this producer was another one: two go by the same id; nothing was written

local seq = tonumber(ARGV[2])
local record = redis.call('HGET', KEYS[2], ARGV[1])
if record then
  local last = cjson.decode(record)
  if last.seq == seq then
    if last.d and last.d ~= ARGV[4] then -- none where an older mnemobus made the call
      return redis.error_reply('TAKEN ' .. ARGV[2])
    end
    if last.ids then
      return last.ids
    end
    local ids = {}
    for _, run in ipairs(last.runs) do
      local ms, number = string.match(run[1], '^(%d+)-(%d+)$')
      ids[#ids + 1] = run[1]
      for n = 1, run[2] - 1 do
        ids[#ids + 1] = ms .. '-' .. string.format('%d', tonumber(number) + n)
      end
    end
    return ids
  elseif last.seq > seq then
    return redis.error_reply('SUPERSEDED ' .. string.format('%d', last.seq))
  end
end

local meter = redis.call('HMGET', KEYS[3], 'added', 'applied')
local backlog = (tonumber(meter[1]) or 0) - (tonumber(meter[2]) or 0)
if backlog >= tonumber(ARGV[3]) then
  return redis.error_reply('BACKLOG ' .. string.format('%d', backlog))
end

local ids = {}
local at = 5
while at <= #ARGV do
  local last = at + tonumber(ARGV[at])
  ids[#ids + 1] = redis.call('XADD', KEYS[1], '*', unpack(ARGV, at + 1, last))
  at = last + 1
end
redis.call('HINCRBY', KEYS[3], 'added', #ids)
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local runs, run, ms, number = {}, nil, nil, nil
for _, id in ipairs(ids) do
  -- A number too large to be counted in Lua is followed by none: its ID makes a run of its own.
  if run and id == ms .. string.format('%d', number + run[2]) then
    run[2] = run[2] + 1
  else
    ms, number = string.match(id, '^(%d+%-)(%d+)$')
    run = {id, 1}
    runs[#runs + 1] = run
  end
end
redis.call('HSET', KEYS[2], ARGV[1],
  '{"seq":' .. ARGV[2] .. ',"d":"' .. ARGV[4] .. '","t":' .. string.format('%d', now)
    .. ',"runs":' .. cjson.encode(runs) .. '}')
return ids
