-- Begin a new epoch if this server process is a new one, or was a replica since the epoch began.
--
-- KEYS[1]  epoch: a hash, run_id (of the server process with which the epoch began), promotion (as ARGV[3]) and epoch
-- ARGV[1]  run id of the server that runs this script
-- ARGV[2]  name of a new epoch, if one begins; never used before
-- ARGV[3]  identifies the server's last promotion from replica to master; empty if it knows of none
-- Returns  the current epoch

local known = redis.call('HMGET', KEYS[1], 'run_id', 'epoch', 'promotion')
if known[1] == ARGV[1] and (ARGV[3] == '' or known[3] == ARGV[3]) then
  return known[2]
end
-- A full Redis takes an HSET only after another write of the same script, and must not keep workers from connecting:
-- they make room.
redis.call('DEL', KEYS[1])
redis.call('HSET', KEYS[1], 'run_id', ARGV[1], 'promotion', ARGV[3], 'epoch', ARGV[2])
return ARGV[2]
