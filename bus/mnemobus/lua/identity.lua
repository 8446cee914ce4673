-- Agree on which store belongs to this bus: the first caller writes it, all later ones read it.
--
-- KEYS[1]  identity: a hash. bus, store, where, life; served, once a worker has connected; place and history of the
--          store that workers commit to; and the notes of upkeep (see identity.py)
-- ARGV[1]  the store of the caller
-- ARGV[2]  where it is, for people
-- ARGV[3]  the bus that the store belongs to, or empty
-- ARGV[4]  name of the bus and of its life, if they begin here; never used before
-- ARGV[5]  place of the store, or empty
-- ARGV[6]  its history, or empty
-- ARGV[7]  worker, if the caller is one: it replaces what an agent wrote before any worker came. adopt: replaces all
-- Returns  all fields and values, as they are now

local there = redis.call('HMGET', KEYS[1], 'bus', 'store', 'served')
local worker, adopt = ARGV[7] == 'worker', ARGV[7] == 'adopt'
local same = there[1] and there[2] == ARGV[1] and (ARGV[3] == '' or ARGV[3] == there[1])
if adopt or not there[1] or not there[2] or (worker and not there[3] and not same) then
  local bus = ARGV[3]
  if bus == '' or (adopt and there[1]) then
    bus = there[1] or ARGV[4]
  end
  -- A full Redis takes an HSET only after another write of the same script. Workers must be able to connect then,
  -- because they free space.
  redis.call('DEL', KEYS[1])
  redis.call('HSET', KEYS[1], 'bus', bus, 'store', ARGV[1], 'where', ARGV[2], 'life', ARGV[4])
  same = true
end
if same and worker and not redis.call('HGET', KEYS[1], 'served') then
  redis.call('HDEL', KEYS[1], 'served')
  redis.call('HSET', KEYS[1], 'served', '1', 'place', ARGV[5], 'history', ARGV[6])
end
return redis.call('HGETALL', KEYS[1])
