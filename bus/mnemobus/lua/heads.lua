-- Report the heads of slots of a log partition, all at the same moment.
--
-- KEYS[1]  heads: a hash, slot -> version of its last event, and n: the number of announced events
-- KEYS[2]  meter: a hash; added is one of its counters
-- ARGV[1..] the slots in question
-- Returns  {number of events that were added and not announced, the head of each slot; 0-0 if there is none}

local counted = redis.call('HGET', KEYS[2], 'added')
local heads = redis.call('HMGET', KEYS[1], 'n', unpack(ARGV))
local answer = {(tonumber(counted) or 0) - (tonumber(heads[1]) or 0)}
for i = 1, #ARGV do
  answer[i + 1] = heads[i + 1] or '0-0'
end
return answer
