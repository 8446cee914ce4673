-- Remove the record of a producer, unless it has published meanwhile.
--
-- KEYS[1]  producers: a hash, as in publish.lua
-- ARGV[1]  producer id
-- ARGV[2]  its record, as the caller read it
-- Returns  1 if its record was removed

if redis.call('HGET', KEYS[1], ARGV[1]) ~= ARGV[2] then
  return 0
end
return redis.call('HDEL', KEYS[1], ARGV[1])
