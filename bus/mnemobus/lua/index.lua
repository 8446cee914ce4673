-- Note the missing reasons of dead letters: an older mnemobus added only letters.
--
-- KEYS[1]  dead: the stream of dead letters
-- KEYS[2]  reasons: a hash, as in dead.lua
-- KEYS[3]  meter: a hash, dead_last and dead_bytes, as in dead.lua
-- ARGV[1]  how many letters to read: each may hold a megabyte
-- Returns  how many were read; 0 once all are noted

local last = redis.call('HGET', KEYS[3], 'dead_last') or '0-0'
local letters = redis.call('XRANGE', KEYS[1], '(' .. last, '+', 'COUNT', ARGV[1])
if #letters == 0 then
  return 0
end
-- A full Redis takes the next command only after another write of the same script.
redis.call('XDEL', KEYS[1], '0-1')
for _, letter in ipairs(letters) do
  local id, fields = letter[1], letter[2]
  last = id
  local version, reason = fields[2], string.sub(fields[4] or '', 1, 1000)
  local known = redis.call('HGET', KEYS[2], version)
  if not known or not string.find(known, '^dead ') then
    redis.call('HSET', KEYS[2], version, 'dead ' .. id .. ' ' .. reason)
  end
  if not known or string.match(known, '^dead (%S+)') ~= id then
    local bytes = 200
    for i = 1, #fields do
      bytes = bytes + #fields[i]
    end
    redis.call('HINCRBY', KEYS[3], 'dead_bytes', bytes)
  end
end
redis.call('HSET', KEYS[3], 'dead_last', last)
return #letters
