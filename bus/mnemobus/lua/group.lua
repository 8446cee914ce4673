-- Make the consumer group, from the log's beginning.
--
-- KEYS[1]  log: the stream of events; made if it is not there
-- ARGV[1]  the consumer group
-- Errors   BUSYGROUP if there is such a group

-- A full Redis takes the next command only after another write of the same script, and must not keep workers from
-- beginning: they make room.
redis.call('XDEL', KEYS[1], '0-1')
return redis.call('XGROUP', 'CREATE', KEYS[1], ARGV[1], '0', 'MKSTREAM')
