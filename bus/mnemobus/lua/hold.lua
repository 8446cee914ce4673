-- Create a consumer group that prevents the trimming of the log from some entry on.
--
-- KEYS[1]  log: the stream of events
-- ARGV[1]  the group; its consumer has the same name
-- ARGV[2]  ID before the first entry to keep
-- Returns  1; 0 if there is no log

if redis.call('EXISTS', KEYS[1]) == 0 then
  return 0
end
-- A full Redis takes the next command only after another write of the same script.
redis.call('XDEL', KEYS[1], '0-1')
redis.call('XGROUP', 'CREATE', KEYS[1], ARGV[1], ARGV[2])
-- The consumer's idle time shows whether the group is still in use.
redis.call('XGROUP', 'CREATECONSUMER', KEYS[1], ARGV[1], ARGV[1])
return 1
