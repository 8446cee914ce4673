-- Remove a group of `hold.lua`.
--
-- KEYS[1]  log: the stream of events
-- ARGV[1]  the group
-- Returns  1; 0 if there is no such group, or no log

if redis.call('EXISTS', KEYS[1]) == 0 then
  return 0
end
-- A full Redis takes the next command only after another write of the same script.
redis.call('XDEL', KEYS[1], '0-1')
return redis.call('XGROUP', 'DESTROY', KEYS[1], ARGV[1])
