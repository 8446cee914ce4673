-- Create the consumer group, from the log's beginning.
--
-- KEYS[1]  log: the stream of events; created if it does not exist
-- ARGV[1]  the consumer group
-- Errors   BUSYGROUP if there is such a group

-- A full Redis takes the next command only after another write of the same script. Workers must be able to begin then,
-- because they free space.
redis.call('XDEL', KEYS[1], '0-1')
return redis.call('XGROUP', 'CREATE', KEYS[1], ARGV[1], '0', 'MKSTREAM')
