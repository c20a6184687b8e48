-- Takes over entries that their consumer left alone, and forgets consumers that were not seen for long and hold nothing.
--
-- XPENDING with IDLE looks past entries in good hands, however many; XCLAIM with the same limit hands each to one taker only.
--
-- KEYS 1 shards (stream)
-- ARGV 1 group  2 consumer  3 least idle time (ms)  4 count  5 idle time of a consumer to forget (ms)
-- Returns a list of {entry id, deliveries with this one, {field, value, ...}}.
local stream, group, consumer = KEYS[1], ARGV[1], ARGV[2]
local taken, after = {}, '-'
while #taken < tonumber(ARGV[4]) do
  local idle = redis.pcall('XPENDING', stream, group, 'IDLE', ARGV[3], after, '+', 10)
  if idle.err then
    if string.find(idle.err, 'NOGROUP', 1, true) then
      return {}
    end
    return idle
  end
  if #idle == 0 then
    break
  end
  for _, entry in ipairs(idle) do
    if #taken == tonumber(ARGV[4]) then
      break
    end
    local got = redis.call('XCLAIM', stream, group, consumer, ARGV[3], entry[1])
    if got[1] then
      taken[#taken + 1] = {entry[1], entry[4] + 1, got[1][2]}
    end
    after = '(' .. entry[1]
  end
end
for _, info in ipairs(redis.call('XINFO', 'CONSUMERS', stream, group)) do
  local known = {}
  for i = 1, #info, 2 do
    known[info[i]] = info[i + 1]
  end
  if known.name ~= consumer and known.pending == 0 and known.idle > tonumber(ARGV[5]) then
    redis.call('XGROUP', 'DELCONSUMER', stream, group, known.name)
  end
end
return taken
