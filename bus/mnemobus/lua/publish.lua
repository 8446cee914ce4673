-- Append a producer's events to the log, once, however often the call is repeated, and announce them.
--
-- KEYS[1]  log: the stream of events
-- KEYS[2]  producers: a hash, producer id -> JSON {seq, d, t, runs}: its last call, and what it was answered: for each
--          run of IDs with one number after the other, the first of them and how many; {seq, d, t, ids} of an older
--          mnemobus
-- KEYS[3]  meter: a hash, added and applied; their difference is the backlog. open: there while the partition is one that
--          is written to, see layout.lua; closed: see close.lua
-- KEYS[4]  heads: a hash, slot -> version of its last event, and n: how many events were announced. Followed by a colon
--          and the slot it names the slot's channel.
-- ARGV[1]  producer id
-- ARGV[2]  sequence number of the call: one more than the producer's last
-- ARGV[3]  backlog at which the log takes no more
-- ARGV[4]  digest of the call's events: a repetition has the same
-- ARGV[5]  epoch, as far as the producer knows
-- ARGV[6]  the log's layout by which these events belong here, as open has it; empty if by none that the producer knows
-- ARGV[7..] for each event: how many slots follow (-n: it touches all n that there are; one follows), the slots; the
--          sizes of its fields, with commas between (empty: announced without them); how many arguments follow, then its
--          field names and values, alternating
-- Returns  {IDs, previous}: the ID of each event, in order, and the event before it in each of its slots, slots of one
--          event after those of another (of all, only of the one that followed). A repetition is answered with the IDs of
--          the first time, and nothing else.
-- Errors   BACKLOG n      the backlog stands at n; nothing was written
--          CLOSED n       for n ms at most the partition takes no new calls; nothing was written
--          ENDED          it takes none any more, or never did, or not these: the log is laid out differently; nothing
--                         was written, and no copy of this call will be
--          SUPERSEDED n   the producer has gone on to call n; nothing was written
--          TAKEN n        call n of this producer was another one: two go by the same id; nothing was written

local seq = tonumber(ARGV[2])
local record = redis.call('HGET', KEYS[2], ARGV[1])
if record and (tonumber(string.match(record, '^{"seq":(%d+),')) or seq) >= seq then
  local last = cjson.decode(record)
  if last.seq == seq then
    if last.d and last.d ~= ARGV[4] then -- none where an older mnemobus made the call
      return redis.error_reply('TAKEN ' .. ARGV[2])
    end
    if last.ids then
      return {last.ids}
    end
    local ids = {}
    for _, run in ipairs(last.runs) do
      local ms, number = string.match(run[1], '^(%d+)-(%d+)$')
      ids[#ids + 1] = run[1]
      for n = 1, run[2] - 1 do
        ids[#ids + 1] = ms .. '-' .. string.format('%d', tonumber(number) + n)
      end
    end
    return {ids}
  elseif last.seq > seq then
    return redis.error_reply('SUPERSEDED ' .. string.format('%d', last.seq))
  end
end

local meter = redis.call('HMGET', KEYS[3], 'added', 'applied', 'open', 'closed')
-- Numbers of partitions begin anew once Redis was flushed, and a producer may only assume how many there are: that this one
-- is written to does not say that it is the room's. In two partitions the events of a room would be in no order.
if not meter[3] or meter[3] ~= ARGV[6] then
  return redis.error_reply('ENDED')
end
if meter[4] then
  local time = redis.call('TIME')
  local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
  local since, till = string.match(meter[4], ' (%d+) (%d+)$')
  if tonumber(since) <= now and now < tonumber(till) then -- else that has lapsed, or the clock was set back since
    return redis.error_reply('CLOSED ' .. string.format('%d', tonumber(till) - now))
  end
end
local backlog = (tonumber(meter[1]) or 0) - (tonumber(meter[2]) or 0)
if backlog >= tonumber(ARGV[3]) then
  return redis.error_reply('BACKLOG ' .. string.format('%d', backlog))
end

local ids, before = {}, {}
local heads, moved = {}, {} -- slot -> its last event, of this call; and these slots, in order
local at = 7
while at <= #ARGV do
  local count = tonumber(ARGV[at])
  local named = math.max(count, 1) -- slots whose previous event the producer hears of
  local slots = {unpack(ARGV, at + 1, at + named)}
  at = at + named + 1
  if count < 0 then
    -- Those, too, that have had no event yet: the store may have memories from before this log began.
    local own = tonumber(slots[1])
    for slot = 0, -count - 1 do
      if slot ~= own then
        slots[#slots + 1] = string.format('%d', slot)
      end
    end
  end
  local first, last = at + 2, at + 1 + tonumber(ARGV[at + 1])
  local known = {}
  for i = 1, #slots do
    if not heads[slots[i]] then
      known = redis.call('HMGET', KEYS[4], unpack(slots)) -- before anything is written: the key may be another's
      break
    end
  end
  local id = redis.call('XADD', KEYS[1], '*', unpack(ARGV, first, last))
  local after = ' ' .. ARGV[5] .. ' ' .. ARGV[at] .. '\n'
  if ARGV[at] ~= '' then
    after = after .. table.concat(ARGV, '', first, last)
  end
  for i = 1, #slots do
    local slot = slots[i]
    local previous = heads[slot]
    if not previous then
      previous = known[i] or '0-0'
      moved[#moved + 1] = slot
    end
    redis.call('PUBLISH', KEYS[4] .. ':' .. slot, id .. ' ' .. previous .. after)
    heads[slot] = id
    if i <= named then
      before[#before + 1] = previous
    end
  end
  ids[#ids + 1] = id
  at = last + 1
end
for i = #moved, 1, -1 do
  moved[2 * i - 1], moved[2 * i] = moved[i], heads[moved[i]]
end
redis.call('HSET', KEYS[4], unpack(moved))
redis.call('HINCRBY', KEYS[4], 'n', #ids)
redis.call('HINCRBY', KEYS[3], 'added', #ids)
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
local told = {}
for i, each in ipairs(runs) do
  told[i] = '["' .. each[1] .. '",' .. each[2] .. ']'
end
redis.call('HSET', KEYS[2], ARGV[1],
  '{"seq":' .. ARGV[2] .. ',"d":"' .. ARGV[4] .. '","t":' .. string.match(ids[#ids], '^%d+') .. ',"runs":['
    .. table.concat(told, ',') .. ']}')
return {ids, before}
