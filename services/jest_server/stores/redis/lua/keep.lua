-- Resets the idle time of entries that still belong to this consumer. Needs held.
--
-- KEYS 1 shards (stream)
-- ARGV 1 group  2 consumer  3.. entry ids
-- Returns how many still belonged to it.
local kept = 0
for i = 3, #ARGV do
  if held(KEYS[1], ARGV[1], ARGV[2], ARGV[i]) then
    redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, ARGV[i], 'JUSTID')
    kept = kept + 1
  end
end
return kept
