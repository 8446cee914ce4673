-- The ID of the last message of a feed partition.
--
-- KEYS[1]  feed: the stream of invalidations
-- Returns  its ID; 0-0 if there is none

local last = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)
return last[1] and last[1][1] or '0-0'
