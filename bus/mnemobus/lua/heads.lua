-- Tell how far the slots of a log partition have got, in one look.
--
-- KEYS[1]  heads: a hash, slot -> version of its last event, and n: how many events were announced
-- KEYS[2]  meter: a hash, added among its counters
-- ARGV[1..] slots asked about
-- Returns  {events added that were not announced, the head of each slot; 0-0 where there is none}

local counted = redis.call('HGET', KEYS[2], 'added')
local heads = redis.call('HMGET', KEYS[1], 'n', unpack(ARGV))
local answer = {(tonumber(counted) or 0) - (tonumber(heads[1]) or 0)}
for i = 1, #ARGV do
  answer[i + 1] = heads[i + 1] or '0-0'
end
return answer
