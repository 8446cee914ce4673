-- Begin a new epoch if this server process is one that nobody has met before, or was a replica since.
--
-- KEYS[1]  epoch: a hash, run_id (of the server process that the epoch began with), promotion (as ARGV[3]) and epoch
-- ARGV[1]  run id of the server that runs this script
-- ARGV[2]  name of the new epoch, should one begin; never used before
-- ARGV[3]  what names the last time that it was promoted, from a replica to the master; empty where it doesn't know any
-- Returns  the epoch that is in force

local known = redis.call('HMGET', KEYS[1], 'run_id', 'epoch', 'promotion')
if known[1] == ARGV[1] and (ARGV[3] == '' or known[3] == ARGV[3]) then
  return known[2]
end
-- A full Redis takes an HSET only after another write of the same script, and must not keep workers from connecting:
-- they make room.
redis.call('DEL', KEYS[1])
redis.call('HSET', KEYS[1], 'run_id', ARGV[1], 'promotion', ARGV[3], 'epoch', ARGV[2])
return ARGV[2]
