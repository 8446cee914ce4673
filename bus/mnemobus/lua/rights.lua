-- Find the commands that the user of this connection may not run. None of them is run.
--
-- KEYS[1]   layout: any key of the bus that belongs to no partition
-- KEYS[2]   log: a stream of events
-- KEYS[3]   feed: a stream of invalidations; its channel has the same name
-- ARGV[1]   a channel of an agent's own
-- ARGV[2..] commands, with spaces between their words; KEY, LOG, FEED and CHANNEL stand for those above
-- Returns   the commands that would be refused; nil if the server can't tell (before Redis 7)

if not redis.acl_check_cmd then
  return nil
end
local names = { KEY = KEYS[1], LOG = KEYS[2], FEED = KEYS[3], CHANNEL = ARGV[1] }
local refused = {}
for i = 2, #ARGV do
  local words = {}
  for word in string.gmatch(ARGV[i], '%S+') do
    words[#words + 1] = names[word] or word
  end
  local known, allowed = pcall(redis.acl_check_cmd, unpack(words))
  if known and not allowed then
    refused[#refused + 1] = ARGV[i]
  end
end
return refused
